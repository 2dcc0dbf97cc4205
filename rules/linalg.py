"""Matrix products, linear layers and distances between rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..rule import joint, jvp, lowerings, multilinear
from .elementwise import times
from .reduction import norm_dot

aten = torch.ops.aten
Call = Callable[..., Any]

multilinear(aten.mm.default, wrt=("self", "mat2"))
multilinear(aten.bmm.default, wrt=("self", "mat2"))
multilinear(aten.mv.default, wrt=("self", "vec"))
multilinear(aten.dot.default, wrt=("self", "tensor"))
multilinear(aten.outer.default, wrt=("self", "vec2"))
multilinear(aten.linalg_vecdot.default, wrt=("x", "y"))
multilinear(aten._trilinear.default, wrt=("i1", "i2", "i3"))
for _op in (
    aten.matmul.default,
    aten.vdot.default,
    aten.inner.default,
    aten.kron.default,
    aten.tensordot.default,
    aten.linalg_cross.default,
):
    multilinear(_op, wrt=("self", "other"))


def _dense(d: Tensor) -> Tensor:
    """A tangent laid out as grouped products want it, that is, not expanded."""
    return d if 1 in d.stride()[-2:] and 0 not in d.stride() else d.contiguous()


# Experts: rows of one matrix by a matrix for each group of them.
jvp(
    aten._grouped_mm.default,
    self=lambda d, call: call(self=_dense(d)),
    mat2=lambda d, call: call(mat2=_dense(d)),
)


@joint(aten.einsum.default, aten.linalg_multi_dot.default, wrt=("tensors",))
def _product(d: dict[str, list[Tensor | None]], tensors: list[Tensor], call: Call) -> Any:
    """The product rule over a list of factors."""
    terms = [
        call(tensors=[*tensors[:i], dot, *tensors[i + 1 :]])
        for i, dot in enumerate(d["tensors"])
        if dot is not None
    ]
    return sum(terms[1:], start=terms[0])


@joint(aten.linear.default, wrt=("input", "weight", "bias"))
def linear(d: dict[str, Tensor], call: Call) -> Any:
    """x W' + b: the bias tangent rides along with the product by the weight's tangent."""
    return affine(d, d.get("bias"), call)


def affine(d: dict[str, Tensor], bias_dot: Tensor | None, call: Call) -> Any:
    """The tangent of product(input, weight) + bias, for every op with these three arguments."""
    rest = call(weight=d["weight"], bias=d.get("bias")) if "weight" in d else bias_dot
    if "input" not in d:
        return rest
    by_input = call(input=d["input"], bias=None)
    return by_input if rest is None else by_input + rest


jvp(
    aten.bilinear.default,
    input1=lambda d, call: call(input1=d, bias=None),
    input2=lambda d, call: call(input2=d, bias=None),
    weight=lambda d, call: call(weight=d, bias=None),
    bias=lambda d: d,
)

# beta * self + alpha * product.
jvp(
    aten.addmm.default,
    self=lambda d, beta: times(d, beta),
    mat1=lambda d, mat2, alpha: times(d @ mat2, alpha),
    mat2=lambda d, mat1, alpha: times(mat1 @ d, alpha),
)
jvp(
    aten.addmv.default,
    self=lambda d, beta: times(d, beta),
    mat=lambda d, vec, alpha: times(d @ vec, alpha),
    vec=lambda d, mat, alpha: times(mat @ d, alpha),
)
jvp(
    aten.addr.default,
    self=lambda d, beta: times(d, beta),
    vec1=lambda d, vec2, alpha: times(torch.outer(d, vec2), alpha),
    vec2=lambda d, vec1, alpha: times(torch.outer(vec1, d), alpha),
)
jvp(
    aten.baddbmm.default,
    self=lambda d, beta: times(d, beta),
    batch1=lambda d, batch2, alpha: times(torch.bmm(d, batch2), alpha),
    batch2=lambda d, batch1, alpha: times(torch.bmm(batch1, d), alpha),
)
jvp(
    aten.addbmm.default,
    self=lambda d, beta: times(d, beta),
    batch1=lambda d, batch2, alpha: times(torch.bmm(d, batch2).sum(0), alpha),
    batch2=lambda d, batch1, alpha: times(torch.bmm(batch1, d).sum(0), alpha),
)


# Distances between rows; where two coincide the tangent is zero.
def _rows(x: Tensor) -> Tensor:
    return x.unsqueeze(-2)


def _columns(x: Tensor) -> Tensor:
    return x.unsqueeze(-3)


jvp(
    aten._cdist_forward.default,
    x1=lambda d, x1, x2, p, out: norm_dot(_rows(d), _rows(x1) - _columns(x2), p, out, -1),
    x2=lambda d, x1, x2, p, out: norm_dot(-_columns(d), _rows(x1) - _columns(x2), p, out, -1),
)


def _euclidean(d: Tensor, x: Tensor, other: Tensor, out: Tensor) -> Tensor:
    """The scalar product of d and x - other, by matrix products, over the distance."""
    product = (d * x).sum(-1, keepdim=True) - d @ other.mT
    return (product / out).masked_fill(out == 0, 0)


jvp(
    aten._euclidean_dist.default,
    x1=lambda d, x1, x2, out: _euclidean(d, x1, x2, out),
    x2=lambda d, x1, x2, out: _euclidean(d, x2, x1, out.mT).mT,
)


def _pairs(x: Tensor) -> tuple[Tensor, ...]:
    """The numbers of the first and of the second row of each pair, in pdist's order."""
    return torch.triu_indices(len(x), len(x), 1, device=x.device).unbind()


def _pdist(d: Tensor, self: Tensor, p: float, out: Tensor) -> Tensor:
    first, second = _pairs(self)
    return norm_dot(d[first] - d[second], self[first] - self[second], p, out, -1)


jvp(aten._pdist_forward.default, self=_pdist)


def _slope(x: Tensor, p: float, norm: Tensor) -> Tensor:
    """The derivative of the p-norm along the last dimension of x; where it is zero, zero."""
    norm = norm.unsqueeze(-1)
    if p == 0:
        return torch.zeros_like(x)
    if math.isinf(p):
        return x.sign() * (x.abs() == norm)
    if p == 1:
        return x.sign()
    slope = x / norm if p == 2 else x.sign() * (x.abs() / norm).pow(p - 1).masked_fill(x == 0, 0)
    return slope.masked_fill(norm == 0, 0)


def _cdist_backward(grad: Tensor, x1: Tensor, x2: Tensor, p: float, cdist: Tensor) -> Tensor:
    return (grad.unsqueeze(-1) * _slope(_rows(x1) - _columns(x2), p, cdist)).sum(-2)


def _pdist_backward(grad: Tensor, self: Tensor, p: float, pdist: Tensor) -> Tensor:
    first, second = _pairs(self)
    moved = grad.unsqueeze(-1) * _slope(self[first] - self[second], p, pdist)
    return torch.zeros_like(self).index_add(0, first, moved).index_add(0, second, -moved)


lowerings[aten._cdist_backward.default] = _cdist_backward
lowerings[aten._pdist_backward.default] = _pdist_backward
