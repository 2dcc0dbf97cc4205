"""Reductions over the segments of a dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..rule import jvp
from .reduction import recurrence, shift

aten = torch.ops.aten
Call = Callable[..., Any]


def _segment_reduce(
    d: Tensor, data: Tensor, reduce: str, lengths: Any, offsets: Any, axis: int, initial: Any,
    out: Tensor, call: Call,
) -> Tensor | None:  # fmt: skip
    if reduce in ("sum", "mean"):
        return call(data=d, initial=0)  # type: ignore[no-any-return]
    if not out.numel() or not data.numel():
        return None
    bounds = aten.constant_pad_nd(lengths.cumsum(-1), [1, 0]) if offsets is None else offsets
    segment, first = _places(bounds, data, axis)
    if reduce == "prod":
        return _prod(d, data, bounds, first, axis, 1 if initial is None else initial)
    reached = out.gather(axis, _over(segment.clamp(0, out.shape[axis] - 1), data))
    wins = ((data == reached) | data.isnan()).to(data.dtype)
    count = call(data=wins, reduce="sum", initial=0)
    return call(data=d * wins, reduce="sum", initial=0) / count.clamp_min(1)  # type: ignore


def _over(x: Tensor, data: Tensor) -> Tensor:
    """What holds for places of the dimension, for all elements there."""
    return x.reshape(*x.shape, *[1] * (data.ndim - x.ndim)).expand(*x.shape, *data.shape[x.ndim :])


def _places(bounds: Tensor, data: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The number of the segment that each place is in, and whether it is the first there."""
    places = torch.arange(data.shape[axis], device=data.device).expand(data.shape[: axis + 1])
    segment = torch.searchsorted(bounds.contiguous(), places.contiguous(), right=True) - 1
    return segment, bounds.gather(-1, segment.clamp_min(0)) == places


def _prod(
    d: Tensor, data: Tensor, bounds: Tensor, first: Tensor, axis: int, initial: Any
) -> Tensor:
    """The product rule as a recurrence that starts anew in each segment, right at zeros."""
    starts = _over(first, data)
    before = torch.where(starts, 0, shift(data, axis, 1, 0))
    before = recurrence(before, torch.where(starts, initial, torch.zeros_like(data)), axis)
    moved = recurrence(torch.where(starts, 0, data), d * before, axis)
    ends, begins = bounds[..., 1:], bounds[..., :-1]
    last = moved.gather(axis, _over((ends - 1).clamp_min(0), data))
    return torch.where(_over(ends > begins, data), last, 0)


jvp(aten.segment_reduce.default, data=_segment_reduce)
