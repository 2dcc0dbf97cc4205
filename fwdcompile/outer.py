"""Outer: tangents that are kept as two factors, and what ops make of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Rewrite = Callable[..., Any]
rewrites: dict[tuple[Any, str], Rewrite] = {}


@dataclass(frozen=True)
class Outer:
    """A tangent that is not made: `u` runs along dimension `axis`, `v` has all the others."""

    u: Tensor
    v: Tensor
    axis: int

    @property
    def ndim(self) -> int:
        """As of the tensor."""
        return self.v.ndim + 1

    @property
    def shape(self) -> torch.Size:
        """As of the tensor."""
        return torch.Size([*self.v.shape[: self.axis], *self.u.shape, *self.v.shape[self.axis :]])

    def permute(self, dims: Sequence[int]) -> Outer:
        """As `torch.permute`."""
        order = [dim % self.ndim for dim in dims]
        rest = [dim - (dim > self.axis) for dim in order if dim != self.axis]
        v = self.v if rest == sorted(rest) else self.v.permute(rest)
        return Outer(self.u, v, order.index(self.axis))

    def transpose(self, dim0: int = -2, dim1: int = -1) -> Outer:
        """As `torch.transpose`."""
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.permute(order)

    def narrow(self, dim: int, start: int | None, end: int | None, step: int = 1) -> Outer:
        """The slice `start:end:step` of one dimension."""
        dim %= self.ndim
        if dim == self.axis:
            return Outer(aten.slice(self.u, 0, start, end, step), self.v, self.axis)
        rest = dim - (dim > self.axis)
        return Outer(self.u, aten.slice(self.v, rest, start, end, step), self.axis)


def factored(argument: str, *ops: Any) -> Callable[[Rewrite], Rewrite]:
    """Registers what becomes of `ops` where `argument`, and no other, is Outer.

    The function takes arguments of the op by name, and `call`, as the terms of a rule do. It
    returns a tensor, or an `Outer` again, or NotImplemented where the tangent has to be made.
    """

    def register(function: Rewrite) -> Rewrite:
        rewrites.update(dict.fromkeys(((op, argument) for op in ops), function))
        return function

    return register


def _times(x: Tensor, w: Outer) -> Tensor:
    """The product x @ w, where `w` is one matrix or many."""
    if x.ndim == w.ndim == 2:
        column, row = (w.u, w.v) if w.axis == 0 else (w.v, w.u)
        return torch.outer(x @ column, row)
    if w.axis == w.ndim - 2:
        return (x @ w.u).unsqueeze(-1) * (w.v if w.v.ndim == 1 else w.v.unsqueeze(-2))
    if w.axis == w.ndim - 1:
        return (x @ w.v).unsqueeze(-1) * w.u if w.v.ndim == 1 else (x @ w.v.unsqueeze(-1)) * w.u
    return (x @ w.v.unsqueeze(w.axis)) * w.u.view(-1, *[1] * (w.ndim - 1 - w.axis))


def _times_left(w: Outer, x: Tensor) -> Tensor:
    """The product w @ x, by the transposed product."""
    if x.ndim > 1:
        return _times(x.mT, w.transpose()).mT
    return _times(x.unsqueeze(0), w.transpose()).squeeze(-2)


@factored("weight", aten.linear.default)
def _linear(input: Tensor, weight: Outer, bias: Tensor | None) -> Tensor:
    out = _times(input, weight.transpose())
    return out if bias is None else out + bias


@factored("other", aten.matmul.default)
def _matmul(self: Tensor, other: Outer) -> Tensor:
    return _times(self, other)


@factored("mat2", aten.mm.default, aten.bmm.default)
def _mm(self: Tensor, mat2: Outer) -> Tensor:
    return _times(self, mat2)


@factored("self", aten.matmul.default)
def _left_matmul(self: Outer, other: Tensor) -> Tensor:
    return _times_left(self, other)


@factored("self", aten.mm.default, aten.bmm.default)
def _left_mm(self: Outer, mat2: Tensor) -> Tensor:
    return _times_left(self, mat2)


@factored("self", aten.mv.default)
def _mv(self: Outer, vec: Tensor) -> Tensor:
    return _times_left(self, vec)


@factored("tensors", aten.einsum.default)
def _einsum(equation: str, tensors: list[Any]) -> Any:
    """The factors are two operands, behind all others; torch contracts from left to right."""
    terms, _, result = equation.replace(" ", "").partition("->")
    (place,) = (i for i, x in enumerate(tensors) if isinstance(x, Outer))
    split = terms.split(",")
    letters, outer = split.pop(place), tensors[place]
    if "." in letters or not result or len(set(letters)) < len(letters):
        return NotImplemented
    rest = letters[: outer.axis] + letters[outer.axis + 1 :]
    equation = ",".join([*split, rest, letters[outer.axis]]) + "->" + result
    return torch.einsum(equation, *tensors[:place], *tensors[place + 1 :], outer.v, outer.u)


@factored("weight", aten.embedding.default)
def _embedding(weight: Outer, indices: Tensor) -> Any:
    rows, columns = (weight.u, weight.v) if weight.axis == 0 else (weight.v, weight.u)
    return torch.embedding(rows.unsqueeze(-1), indices) * columns


@factored("weight", aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def _convolution(
    weight: Outer, input: Tensor, bias: Tensor | None, groups: int, call: Any,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Any:  # fmt: skip
    channels, *kernel = weight.v.shape
    if weight.axis or groups > 1 or math.prod(kernel) > channels or input.ndim < weight.ndim:
        return _padded_convolution(weight, bias, groups, call)
    geometry = [_each(x, len(kernel)) for x in (stride, padding, dilation)]
    return _spread(_by_taps(input, weight.v, *geometry), weight.u, bias, len(kernel))


@factored("weight", aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def _padded_convolution(weight: Outer, bias: Tensor | None, groups: int, call: Any) -> Any:
    """One output channel for each group."""
    if weight.axis != 0:
        return NotImplemented
    one = call(weight=weight.v.expand(groups, *weight.v.shape), bias=None)
    spatial = weight.ndim - 2
    if groups > 1:
        one = one.repeat_interleave(weight.u.shape[0] // groups, dim=-spatial - 1)
    return _spread(one, weight.u, bias, spatial)


def _spread(one: Tensor, u: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
    """An outer product over the output channels."""
    places = (-1, *[1] * spatial)
    out = one * u.view(places)
    return out if bias is None else out + bias.view(places)


def _by_taps(
    x: Tensor, v: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """Convolution to one channel: a product for each place of the kernel, shifted and added.

    Libraries make a whole block of output channels even where one is asked for.
    """
    size, kernel = x.shape[2:], v.shape[1:]
    products = (v.flatten(1).mT @ x.flatten(2)).unflatten(2, size)  # type: ignore[no-untyped-call]
    padded = torch.constant_pad_nd(products, [p for one in reversed(padding) for p in (one, one)])
    batch, tap, *steps = padded.stride()
    reach = [step * d for step, d in zip(steps, dilation, strict=True)]
    over = [tap * math.prod(kernel[i + 1 :]) + step for i, step in enumerate(reach)]
    places = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    moves = [step * s for step, s in zip(steps, stride, strict=True)]
    windows = padded.as_strided((x.shape[0], *places, *kernel), (batch, *moves, *over))
    for _ in kernel:  # one dimension at a time: short sums are unrolled
        windows = windows.sum(-1)
    return windows.unsqueeze(1)


def _each(values: Sequence[int], count: int) -> list[int]:
    return list(values) * (count if len(values) == 1 else 1)


@factored("weight", aten.conv_transpose1d.default, aten.conv_transpose2d.input,
           aten.conv_transpose3d.input)  # fmt: skip
def _transposed_convolution(weight: Outer, input: Tensor, groups: int, call: Any) -> Any:
    """The input channels of each group become one, weighted by the factor that runs along them."""
    if weight.axis != 0:
        return NotImplemented
    spatial = weight.ndim - 2
    weighted = input * weight.u.view(-1, *[1] * spatial)
    one = weighted.unflatten(-spatial - 1, (groups, -1)).sum(-spatial - 1)  # type: ignore[no-untyped-call]
    return call(input=one, weight=weight.v.expand(groups, *weight.v.shape))


@factored("self", aten.t.default)
def _t(self: Outer) -> Outer:
    return self.transpose()


@factored("self", aten.transpose.int)
def _transpose(self: Outer, dim0: int, dim1: int) -> Outer:
    return self.transpose(dim0, dim1)


@factored("self", aten.permute.default)
def _permute(self: Outer, dims: Sequence[int]) -> Outer:
    return self.permute(dims)


@factored("self", aten.unsqueeze.default)
def _unsqueeze(self: Outer, dim: int) -> Outer:
    dim %= self.ndim + 1
    before = dim <= self.axis
    return Outer(self.u, self.v.unsqueeze(dim - (not before)), self.axis + before)


@factored("self", aten.slice.Tensor)
def _slice(self: Outer, dim: int, start: int | None, end: int | None, step: int) -> Outer:
    return self.narrow(dim, start, end, step)


@factored("self", aten.split.Tensor)
def _split(self: Outer, split_size: int, dim: int) -> tuple[Outer, ...]:
    starts = range(0, self.shape[dim], split_size)
    return tuple(self.narrow(dim, start, start + split_size) for start in starts)


@factored("self", aten.alias.default, aten.detach.default, aten.clone.default)
def _same(self: Outer) -> Outer:
    return self


@factored("self", aten.mul.Tensor, aten.div.Tensor)
def _scaled(self: Outer, other: Any, call: Any) -> Any:
    number = not isinstance(other, Tensor) or other.ndim == 0
    return Outer(call(self=self.u), self.v, self.axis) if number else NotImplemented


@factored("self", aten.neg.default)
def _negated(self: Outer) -> Outer:
    return Outer(-self.u, self.v, self.axis)


@factored("self", aten._to_copy.default)
def _to_copy(self: Outer, dtype: torch.dtype | None) -> Outer:
    return Outer(self.u.to(dtype), self.v.to(dtype), self.axis) if dtype else self
