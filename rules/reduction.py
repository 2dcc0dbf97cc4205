"""Sums, means, products, moments, norms, extrema, sorting and scans."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..rule import jvp, linear

aten = torch.ops.aten
Dims = list[int] | int | None

for _op in (
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.trace.default,
    aten.cumsum.default,
):
    linear(_op, wrt="self")

jvp(aten.nansum.default, self=lambda d, self, call: call(self=d.masked_fill(self.isnan(), 0)))


def _dims(dim: Dims, ndim: int) -> set[int]:
    """The reduced dimensions; none given, or an empty list, means all of them."""
    if isinstance(dim, int):
        dim = [dim]
    return {i % ndim for i in dim or range(ndim)} if ndim else set()


def _kept(out: Tensor, dim: Dims, keepdim: bool, like: Tensor) -> Tensor:
    """`out` with the reduced dimensions still there, of size one."""
    if keepdim:
        return out
    for i in sorted(_dims(dim, like.ndim)):
        out = out.unsqueeze(i)
    return out


def _total(x: Tensor, dim: Dims, keepdim: bool) -> Tensor:
    return x.sum() if dim is None and not keepdim else x.sum(dim, keepdim)


# Extrema without an index share the derivative among ties; those with an index take its element.
def _share(d: Tensor, wins: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """The mean of d over the elements that win."""
    return _total(d * wins, dim, keepdim) / _total(wins, dim, keepdim)


def _extremum(d: Tensor, self: Tensor, dim: Dims, keepdim: bool, out: Tensor) -> Tensor:
    return _share(d, self == _kept(out, dim, keepdim, self), dim, keepdim)


for _op in (aten.amax.default, aten.amin.default):
    jvp(_op, self=_extremum)
for _op in (
    aten.max.default,
    aten.min.default,
    aten.median.default,
    aten.nanmedian.default,
):
    jvp(_op, self=lambda d, self, out: _share(d, self == out))


def _picked(d: Tensor, dim: int, keepdim: bool, out: tuple[Tensor, Tensor]) -> Any:
    if d.ndim == 0:
        return d, None
    if keepdim:
        return d.gather(dim, out[1]), None
    return d.gather(dim, out[1].unsqueeze(dim)).squeeze(dim), None


for _op in (
    aten.max.dim,
    aten.min.dim,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.kthvalue.default,
    aten.mode.default,
):
    jvp(_op, self=_picked)
for _op in (
    aten.sort.default,
    aten.sort.stable,
    aten.topk.default,
    aten.cummax.default,
    aten.cummin.default,
):
    jvp(_op, self=lambda d, dim, out: (d.gather(dim, out[1]), None))


def real_product(x: Tensor, d: Tensor) -> Tensor:
    """x * d, and for complex numbers the scalar product of the two as vectors in the plane."""
    return (x.conj() * d).real if x.is_complex() else x * d


# Moments. The mean moves too, but deviations from it sum to zero, so its tangent drops out.
def _var(
    d: Tensor, self: Tensor, mean: Tensor, dim: Dims, correction: float | None, keepdim: bool
) -> Tensor:
    size = math.prod(self.shape[i] for i in _dims(dim, self.ndim))
    freedom = size - (1 if correction is None else correction)
    total = _total(real_product(self - mean, d), dim, keepdim)
    return total * (2 / freedom if freedom > 0 else math.nan)


def _deviation(var_dot: Tensor, std: Tensor) -> Tensor:
    """Half the variance's tangent over the deviation; zero where that is zero, as in torch."""
    return (var_dot / (2 * std)).masked_fill(std == 0, 0)


def _var_alone(
    d: Tensor, self: Tensor, dim: Dims, correction: float | None, keepdim: bool
) -> Tensor:
    return _var(d, self, self.mean(dim, keepdim=True), dim, correction, keepdim)


def _var_mean(
    d: Tensor,
    self: Tensor,
    dim: Dims,
    correction: float | None,
    keepdim: bool,
    out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    mean = _kept(out[1], dim, keepdim, self)
    return _var(d, self, mean, dim, correction, keepdim), d.mean(dim, keepdim)


def _std_mean(
    d: Tensor,
    self: Tensor,
    dim: Dims,
    correction: float | None,
    keepdim: bool,
    out: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    var_dot, mean_dot = _var_mean(d, self, dim, correction, keepdim, out)
    return _deviation(var_dot, out[0]), mean_dot


jvp(aten.var.correction, self=_var_alone)
jvp(
    aten.std.correction,
    self=lambda d, self, dim, correction, keepdim, out: _deviation(
        _var_alone(d, self, dim, correction, keepdim), out
    ),
)
jvp(aten.var_mean.correction, self=_var_mean)
jvp(aten.std_mean.correction, self=_std_mean)


# Norms and log-sum-exp.
def norm_dot(
    d: Tensor, x: Tensor, p: float, out: Tensor, dim: Dims = None, keepdim: bool = False
) -> Tensor:
    """The tangent of the p-norm `out` of x; where the norm is zero, so is its tangent."""
    if p == 0:
        return torch.zeros_like(out)
    if p == 2:
        return (_total(real_product(x, d), dim, keepdim) / out).masked_fill(out == 0, 0)
    lengthened = real_product(x.sgn() if x.is_complex() else x.sign(), d)
    if p == 1:
        return _total(lengthened, dim, keepdim)
    if math.isinf(p):
        wins = x.abs() == _kept(out, dim, keepdim, x)
        return _share(lengthened, wins, dim, keepdim)
    slope = x.abs().pow(p - 1).masked_fill(x == 0, 0)
    total = _total(lengthened * slope, dim, keepdim)
    return (total / out.pow(p - 1)).masked_fill(out == 0, 0)


jvp(
    aten.linalg_vector_norm.default,
    self=lambda d, self, ord, dim, keepdim, out: norm_dot(d, self, ord, out, dim, keepdim),
)
jvp(
    aten.dist.default,
    self=lambda d, self, other, p, out: norm_dot(d, self - other, p, out),
    other=lambda d, self, other, p, out: -norm_dot(d, self - other, p, out),
)


def _logsumexp(d: Tensor, self: Tensor, dim: Dims, keepdim: bool, out: Tensor) -> Tensor:
    finite = out.masked_fill(out.abs() == math.inf, 0)
    weights = (self - _kept(finite, dim, keepdim, self)).exp()
    return _total(weights * d, dim, keepdim)


jvp(aten.logsumexp.default, self=_logsumexp)


# Scans and products, right where factors are zero, to every order.
def shift(x: Tensor, dim: int, by: int, fill: float) -> Tensor:
    """Moves elements `by` places up along `dim`, which is not negative; `fill` comes in below."""
    rest = x.narrow(dim, 0, x.shape[dim] - by)
    return torch.cat([torch.full_like(x.narrow(dim, 0, by), fill), rest], dim)


def recurrence(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Solves y[i] = a[i] * y[i - 1] + b[i] along `dim` from y[-1] = 0, by log2(n) doublings."""
    step = 1
    while step < b.shape[dim]:
        b = b + a * shift(b, dim, step, 0)
        a = a * shift(a, dim, step, 0)
        step *= 2
    return b


def _cumprod(d: Tensor, self: Tensor, dim: int, out: Tensor) -> Tensor:
    if d.numel() == 0 or d.ndim == 0:
        return d
    dim %= d.ndim
    return recurrence(self.to(out.dtype), d * shift(out, dim, 1, 1), dim)


def _logcumsumexp(d: Tensor, self: Tensor, dim: int, out: Tensor) -> Tensor:
    """Neither exp(self[i] - out[i]) nor exp(out[i - 1] - out[i]) exceeds 1: nothing overflows."""
    if d.numel() == 0 or d.ndim == 0:
        return d
    dim %= d.ndim
    finite = out.masked_fill(out.abs() == math.inf, 0)
    decay = (shift(out, dim, 1, -math.inf) - finite).exp()
    return recurrence(decay, d * (self - finite).exp(), dim)


def _prod(d: Tensor, self: Tensor, dim: int) -> Tensor:
    """Each element's tangent times the product of all before it and of all behind it."""
    if d.numel() == 0 or d.ndim == 0:
        return d.sum([dim]) if d.ndim else d
    dim %= d.ndim
    before = shift(self.cumprod(dim), dim, 1, 1)
    behind = shift(self.flip(dim).cumprod(dim), dim, 1, 1).flip(dim)
    return (d * before * behind).sum([dim])


def _prod_dim(d: Tensor, self: Tensor, dim: int, keepdim: bool) -> Tensor:
    total = _prod(d, self, dim)
    return total.unsqueeze(dim) if keepdim and d.ndim else total


jvp(aten.cumprod.default, self=_cumprod)
jvp(aten.logcumsumexp.default, self=_logcumsumexp)
jvp(aten.prod.default, self=lambda d, self: _prod(d.reshape(-1), self.reshape(-1), 0))
jvp(aten.prod.dim_int, self=_prod_dim)
