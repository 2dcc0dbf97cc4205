"""Lookup, gather and scatter by integer indices or boolean masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import RuleError
from ..rule import joint, jvp, linear, lowerings, not_implemented

aten = torch.ops.aten

linear(aten.embedding.default, wrt="weight")
for _op in (
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.take.default,
    aten.take_along_dim.default,
):
    linear(_op, wrt="self")


def _by_number(self: Tensor, indices: list[Tensor | None]) -> Any:
    """A mask becomes the numbers of its true places: primal and tangent then share one count."""
    masks = [i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices]
    if not any(masks):
        return NotImplemented
    pairs = zip(indices, masks, strict=True)
    numbers = [i.nonzero().unbind(1) if mask else (i,) for i, mask in pairs]  # type: ignore
    return aten.index.Tensor(self, [i for group in numbers for i in group])


lowerings[aten.index.Tensor] = _by_number

not_implemented(
    aten.masked_select.default,
    "the shape of its output depends on values; keep the shape with torch.where(mask, x, 0)",
)


def _repeat_each(d: Tensor, output_size: int | None, call: Callable[..., Any]) -> Any:
    if output_size is None:
        raise RuleError("repeat_interleave by a tensor needs output_size, or its shape is unknown")
    return call(self=d)


jvp(aten.repeat_interleave.self_Tensor, self=_repeat_each)

# Where one place is written twice, torch leaves open which write wins.
for _op in (aten.scatter.src, aten.scatter_add.default):
    linear(_op, wrt=("self", "src"))
for _op in (
    aten.index_put.default,
    aten._unsafe_index_put.default,
    aten._unsafe_masked_index_put_accumulate.default,
):
    linear(_op, wrt=("self", "values"))
for _op in (
    aten.index_add.default,
    aten.index_copy.default,
    aten.masked_scatter.default,
    aten.put.default,
):
    linear(_op, wrt=("self", "source"))

linear(aten.index_fill.int_Tensor, wrt=("self", "value"))
jvp(aten.index_fill.int_Scalar, self=lambda d, call: call(self=d, value=0))
jvp(aten.scatter.value, self=lambda d, call: call(self=d, value=0))
jvp(aten._unsafe_masked_index.default, self=lambda d, call: call(self=d, fill=0))
jvp(aten.masked_fill.Scalar, self=lambda d, call: call(self=d, value=0))
jvp(
    aten.masked_fill.Tensor,
    self=lambda d, mask: d.masked_fill(mask, 0),
    value=lambda d, mask: torch.where(mask, d, 0),
)


@joint(aten.scatter_reduce.two, wrt=("self", "src"))
def _scatter_reduce(
    d: dict[str, Tensor],
    self: Tensor,
    dim: int,
    index: Tensor,
    src: Tensor,
    reduce: str,
    include_self: bool,
    out: Tensor,
    call: Callable[..., Any],
) -> Any:
    self_dot = d["self"] if "self" in d else torch.zeros_like(self)
    src_dot = d["src"] if "src" in d else torch.zeros_like(src)
    if reduce in ("sum", "mean"):
        return call(self=self_dot, src=src_dot)
    if reduce == "prod":
        raise RuleError("reduce='prod' has no row; reduce by 'sum' of logarithms, or torch.prod")
    of_self = (self == out).to(self.dtype)
    of_src = (src == out.gather(dim, index)).to(self.dtype)
    if not include_self:
        of_self = of_self.scatter(dim, index, 0)
    # Elements that equal the extremum share the derivative evenly.
    total = (self_dot * of_self).scatter_add(dim, index, src_dot * of_src)
    return total / of_self.scatter_add(dim, index, of_src)


@joint(aten.index_reduce.default, wrt=("self", "source"))
def _index_reduce(
    d: dict[str, Tensor],
    self: Tensor,
    dim: int,
    index: Tensor,
    source: Tensor,
    reduce: str,
    include_self: bool,
    out: Tensor,
    call: Callable[..., Any],
) -> Any:
    def as_scatter(**changed: Any) -> Any:
        return call(**{"source" if name == "src" else name: x for name, x in changed.items()})

    dots = {"src" if name == "source" else name: x for name, x in d.items()}
    shape = [1] * source.ndim
    if shape:
        shape[dim] = -1
    rows = index.view(shape).expand(source.shape)
    return _scatter_reduce(dots, self, dim, rows, source, reduce, include_self, out, as_scatter)


def _bag(
    d: Tensor, mode: int, out: tuple[Tensor, Tensor, Tensor, Tensor], call: Callable[..., Any]
) -> Any:
    """A bag's maximum (mode 2) takes the tangent at its index; an empty bag has none."""
    if mode != 2:
        return call(weight=d)[0], None, None, None
    _, _, size, rows = out
    return d.gather(0, rows).masked_fill((size == 0).unsqueeze(-1), 0), None, None, None


for _op in (aten._embedding_bag.default, aten._embedding_bag_forward_only.default):
    jvp(
        _op,
        weight=_bag,
        per_sample_weights=lambda d, call: (
            call(per_sample_weights=d)[0],
            None,
            None,
            None,
        ),
    )
