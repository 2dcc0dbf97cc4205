"""What memory's order decides: views by strides, as gathers of elements, and copies into a layout.

A tangent need not lie in memory as its primal does, and torch has no derivative of `aten.copy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..rule import lowerings, not_implemented
from ..sizes import same_layout

aten = torch.ops.aten


def _order(x: Tensor) -> list[int] | None:
    """The dimensions as memory has them, or None where `x` leaves gaps or overlaps itself."""
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda i: (-strides[i], x.shape[i]))
    return order if x.permute(order).is_contiguous() else None


def _places(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> Tensor | None:
    """Numbers of the elements of `x`, in memory's order, that lie where the strides lead.

    None where that is outside of `x`.
    """
    low = 0 if offset is None else offset - int(x.storage_offset())
    steps = [(n - 1) * step for n, step in zip(size, stride, strict=True)]
    if 0 not in size and (low < 0 or low + sum(steps) >= x.numel()):
        return None
    places = torch.arange(low, low + 1, device=x.device).view([1] * len(size))
    for axis, (n, step) in enumerate(zip(size, stride, strict=True)):
        shape = [-1 if i == axis else 1 for i in range(len(size))]
        places = places + (torch.arange(n, device=x.device) * step).view(shape)
    return places


def _as_strided(
    self: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Any:
    order, places = _order(self), _places(self, size, stride, storage_offset)
    if order is None or places is None:
        return NotImplemented
    return self.permute(order).reshape(-1)[places]


def _as_strided_scatter(
    self: Tensor,
    src: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Any:
    order, places = _order(self), _places(self, size, stride, storage_offset)
    if order is None or places is None:
        return NotImplemented
    memory = self.permute(order)
    written = memory.reshape(-1).index_put((places.reshape(-1),), src.reshape(-1))
    return written.view(memory.shape).permute(_back(order))


def _copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    copied = src.to(self.device, self.dtype).expand(self.shape)
    order = None if same_layout(copied, self) else _order(self)
    if order is None:
        return copied
    return copied.permute(order).contiguous().permute(_back(order))


def _back(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


lowerings[aten.copy.default] = _copy
for _op, _lower in (
    (aten.as_strided.default, _as_strided),
    (aten.as_strided_copy.default, _as_strided),
    (aten.as_strided_scatter.default, _as_strided_scatter),
):
    not_implemented(_op, "its strides lead out of its tensor's own memory; use views")
    lowerings[_op] = _lower
