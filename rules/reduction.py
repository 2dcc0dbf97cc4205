"""Sums, means, products, moments, norms, extrema, sorting and scans."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..rule import jvp, linear

aten = torch.ops.aten
Dims = Any

for _op in (
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.cumsum.default,
    aten.trace.default,
):
    linear(_op, wrt="self")
for _op in (aten.nansum.default,):
    jvp(_op, self=lambda d, self, call: call(self=torch.where(torch.isnan(self), 0.0, d)))


def _count(self: Tensor, dim: Dims) -> int:
    dims = range(self.ndim) if not dim and dim != 0 else [dim] if isinstance(dim, int) else dim
    return math.prod(self.shape[i] for i in dims)


# Moments.
def _var_dot(d: Tensor, self: Tensor, dim: Dims, correction: Any, keepdim: bool) -> Tensor:
    degrees = _count(self, dim) - (1 if correction is None else correction)
    dims = list(range(self.ndim)) if dim is None else dim
    centred = self - self.mean(dims, keepdim=True)
    return (centred * d).sum(dims, keepdim=keepdim) * (2 / degrees if degrees > 0 else math.nan)


def _std_dot(d: Tensor, self: Tensor, dim: Dims, correction: Any, keepdim: bool, out: Tensor) -> Any:
    return _var_dot(d, self, dim, correction, keepdim) / (2 * out)


jvp(aten.var.correction, self=_var_dot)
jvp(aten.std.correction, self=_std_dot)
jvp(
    aten.var_mean.correction,
    self=lambda d, self, dim, correction, keepdim: (
        _var_dot(d, self, dim, correction, keepdim),
        d.mean(list(range(self.ndim)) if dim is None else dim, keepdim=keepdim),
    ),
)
jvp(
    aten.std_mean.correction,
    self=lambda d, self, dim, correction, keepdim, out: (
        _std_dot(d, self, dim, correction, keepdim, out[0]),
        d.mean(list(range(self.ndim)) if dim is None else dim, keepdim=keepdim),
    ),
)


# Products, as a tree of dual numbers: right where factors are zero, to every order.
def _prod_dot(d: Tensor, self: Tensor, dim: int) -> Tensor:
    x, x_dot = self.movedim(dim, 0), d.movedim(dim, 0)
    if x.shape[0] == 0:
        return torch.zeros_like(x.sum(0))
    while (n := x.shape[0]) > 1:
        left, right, rest = x[0 : n - 1 : 2], x[1:n:2], slice(n - n % 2, n)
        left_dot, right_dot = x_dot[0 : n - 1 : 2], x_dot[1:n:2]
        pair, pair_dot = left * right, left_dot * right + left * right_dot
        x = torch.cat([pair, x[rest]]) if n % 2 else pair
        x_dot = torch.cat([pair_dot, x_dot[rest]]) if n % 2 else pair_dot
    return x_dot[0]


def _cumprod_dot(d: Tensor, self: Tensor, dim: int) -> Tensor:
    if self.ndim == 0 or self.shape[dim] == 0:
        return d
    x, x_dot, step = self.movedim(dim, 0), d.movedim(dim, 0), 1
    while step < x.shape[0]:
        before, before_dot, here, here_dot = x[:-step], x_dot[:-step], x[step:], x_dot[step:]
        moved = before_dot * here + before * here_dot
        x, x_dot = torch.cat([x[:step], before * here]), torch.cat([x_dot[:step], moved])
        step *= 2
    return x_dot.movedim(0, dim)


jvp(aten.prod.default, self=lambda d, self: _prod_dot(d.reshape(-1), self.reshape(-1), 0))
jvp(
    aten.prod.dim_int,
    self=lambda d, self, dim, keepdim: (
        _prod_dot(d, self, dim).unsqueeze(dim) if keepdim else _prod_dot(d, self, dim)
    ) if self.ndim else d,
)  # fmt: skip
jvp(aten.cumprod.default, self=_cumprod_dot)


# Norms; at a zero vector the derivative is zero, as in torch.
def _kept(out: Tensor, dim: Dims, keepdim: bool, ndim: int) -> Tensor:
    """`out` with the reduced dimensions still there, of size one."""
    if keepdim or ndim == 0:
        return out
    dims = range(ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    for i in sorted(i % ndim for i in dims):
        out = out.unsqueeze(i)
    return out


def _share(d: Tensor, wins: Tensor, dim: Dims, keepdim: bool) -> Tensor:
    """The mean of d over the elements that win."""
    dims = list(range(d.ndim)) if dim is None or dim == [] else dim
    chosen = torch.where(wins, d, 0.0).sum(dims, keepdim=keepdim)
    return chosen / wins.sum(dims, keepdim=keepdim)


def _norm_dot(d: Tensor, self: Tensor, ord: float, dim: Dims, keepdim: bool, out: Tensor) -> Any:
    if ord == 0:
        return None
    if math.isinf(ord):
        size = torch.abs(self)
        wins = size == _kept(out, dim, keepdim, self.ndim)
        return _share(d * torch.sgn(self), wins, dim, keepdim)
    dims = list(range(self.ndim)) if dim is None else dim
    if ord == 1:
        return (d * torch.sgn(self)).sum(dims, keepdim=keepdim)
    slope = self if ord == 2 else torch.sgn(self) * torch.abs(self) ** (ord - 1)
    total = (slope * d).sum(dims, keepdim=keepdim)
    return torch.where(out == 0, 0.0, total / (out if ord == 2 else out ** (ord - 1)))


jvp(aten.linalg_vector_norm.default, self=_norm_dot)
jvp(
    aten.logsumexp.default,
    self=lambda d, self, dim, keepdim, out: (
        torch.exp(self - _kept(out, dim, keepdim, self.ndim)) * d
    ).sum(dim, keepdim=keepdim),
)


# Extrema without an index share the derivative among ties; those with an index take its element.
for _op in (aten.amax.default, aten.amin.default):
    jvp(
        _op,
        self=lambda d, self, dim, keepdim, out: _share(
            d, self == _kept(out, dim, keepdim, self.ndim), dim, keepdim
        ),
    )
for _op in (aten.max.default, aten.min.default, aten.median.default):
    jvp(_op, self=lambda d, self, out: _share(d, self == out, None, False))


def _picked(d: Tensor, indices: Tensor, dim: int, keepdim: bool) -> Tensor:
    if d.ndim == 0:
        return d
    if keepdim:
        return d.gather(dim, indices)
    return d.gather(dim, indices.unsqueeze(dim)).squeeze(dim)


for _op in (
    aten.max.dim,
    aten.min.dim,
    aten.kthvalue.default,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.mode.default,
):
    jvp(_op, self=lambda d, dim, keepdim, out: (_picked(d, out[1], dim, keepdim), None))
for _op in (aten.sort.default, aten.sort.stable, aten.topk.default, aten.cummax.default,
            aten.cummin.default):  # fmt: skip
    jvp(_op, self=lambda d, dim, out: (_picked(d, out[1], dim, True), None))
