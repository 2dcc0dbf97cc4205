"""Ops between real and complex tensors, and those of complex ones that are not holomorphic."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rule import jvp, linear

aten = torch.ops.aten

for _op in (
    aten.view_as_real.default,
    aten.view_as_complex.default,
    aten._conj.default,
    aten._conj_physical.default,
    aten._neg_view.default,
):
    linear(_op, wrt="self")
linear(aten.complex.default, wrt=("real", "imag"))
jvp(
    aten.polar.default,
    abs=lambda d, angle: d * torch.polar(torch.ones_like(angle), angle),
    angle=lambda d, out: d * out * 1j,
)


def abs_dot(d: Tensor, self: Tensor) -> Tensor:
    """The part of d along self; 0 where self is 0."""
    if not self.is_complex():
        return d * torch.sign(self)
    return (torch.sgn(self).conj() * d).real


def sgn_dot(d: Tensor, self: Tensor, out: Tensor) -> Tensor | None:
    """The part of d across self, scaled: the modulus of out does not change."""
    if not self.is_complex():
        return None
    across = (d - out * (out.conj() * d).real) / self.abs()
    return torch.where(self == 0, 0, across)


def angle_dot(d: Tensor, self: Tensor) -> Tensor | None:
    if not self.is_complex():
        return None
    return torch.where(self == 0, 0, d / self).imag


jvp(aten.abs.default, self=abs_dot)
jvp(aten.sgn.default, self=sgn_dot)
jvp(aten.angle.default, self=angle_dot)
