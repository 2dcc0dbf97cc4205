"""Reductions over the segments of a dimension, or over the places that an index names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..rule import joint, jvp
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
    moved = _products(d, data, _over(first, data), axis, initial)
    ends, begins = bounds[..., 1:], bounds[..., :-1]
    last = moved.gather(axis, _over((ends - 1).clamp_min(0), data))
    return torch.where(_over(ends > begins, data), last, 0)


def _products(d: Tensor, data: Tensor, starts: Tensor, axis: int, initial: Any) -> Tensor:
    """Tangents of running products, which begin anew with `initial` where `starts` holds.

    The product rule as a recurrence: without division, so right at zeros to every order.
    """
    before = torch.where(starts, 0, shift(data, axis, 1, 0))
    before = recurrence(before, torch.where(starts, initial, torch.zeros_like(data)), axis)
    return recurrence(torch.where(starts, 0, data), d * before, axis)


jvp(aten.segment_reduce.default, data=_segment_reduce)


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
    if reduce == "prod":
        return _scatter_prod(d, self, dim % max(self.ndim, 1), index, src, include_self)
    self_dot = d["self"] if "self" in d else torch.zeros_like(self)
    src_dot = d["src"] if "src" in d else torch.zeros_like(src)
    if reduce in ("sum", "mean"):
        return call(self=self_dot, src=src_dot)
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


def _scatter_prod(
    d: dict[str, Tensor], self: Tensor, dim: int, index: Tensor, src: Tensor, include_self: bool
) -> Any:
    """Sorts the factors by their place, so that those of one place are a segment."""
    if not index.numel():
        return d.get("self")
    if not self.ndim:
        rows = {name: x.reshape(1) for name, x in d.items()}
        self, index, src = (x.reshape(1) for x in (self, index, src))
        return _scatter_prod(rows, self, 0, index, src, include_self).reshape(())
    used = tuple(slice(size) for size in index.shape)
    ones = torch.ones_like(self)
    reached = ones.scatter(dim, index, 0) == 0
    terms = []
    if "self" in d:
        product = ones.scatter_reduce(dim, index, src[used], "prod") if include_self else 0.0
        terms.append(d["self"] * torch.where(reached, product, ones))
    if "src" in d:
        places, order = index.sort(dim=dim, stable=True)
        starts = places != shift(places, dim, 1, -1)
        factors, dots = (x[used].gather(dim, order) for x in (src, d["src"]))
        moved = _products(dots, factors, starts, dim, 1.0)
        ends = torch.where(starts.roll(-1, dim), moved, 0.0)
        others = self if include_self else ones
        terms.append(others * torch.zeros_like(self).scatter_add(dim, places, ends))
    return sum(terms[1:], terms[0])
