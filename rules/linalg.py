"""Matrix products and linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..rule import joint, jvp, multilinear
from .elementwise import times

aten = torch.ops.aten
Call = Callable[..., Any]

multilinear(aten.mm.default, wrt=("self", "mat2"))
multilinear(aten.bmm.default, wrt=("self", "mat2"))
multilinear(aten.mv.default, wrt=("self", "vec"))
multilinear(aten.dot.default, wrt=("self", "tensor"))
multilinear(aten.vdot.default, wrt=("self", "other"))
multilinear(aten.matmul.default, wrt=("self", "other"))
multilinear(aten.linalg_cross.default, wrt=("self", "other"))
multilinear(aten._trilinear.default, wrt=("i1", "i2", "i3"))


@joint(aten.linear.default, wrt=("input", "weight", "bias"))
def linear(d: dict[str, Tensor], call: Call) -> Tensor:
    """x W' + b: the bias tangent rides along with the product by the weight's tangent."""
    return affine(d, d.get("bias"), call)


def affine(d: dict[str, Tensor], bias_dot: Tensor | None, call: Call) -> Tensor:
    """The tangent of product(input, weight) + bias, for every op with these three arguments."""
    rest = call(weight=d["weight"], bias=d.get("bias")) if "weight" in d else bias_dot
    if "input" not in d:
        return rest
    by_input = call(input=d["input"], bias=None)
    return by_input if rest is None else by_input + rest


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
    aten.baddbmm.default,
    self=lambda d, beta: times(d, beta),
    batch1=lambda d, batch2, alpha: times(torch.bmm(d, batch2), alpha),
    batch2=lambda d, batch1, alpha: times(torch.bmm(batch1, d), alpha),
)
