"""Special functions: error, gamma and Bessel functions, and products with logarithms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import RuleError
from ..rule import pointwise

aten = torch.ops.aten
special = torch.special

# Error functions

pointwise(aten.erf.default, lambda self: torch.exp(-self * self) * (2 / math.sqrt(math.pi)))
pointwise(aten.erfc.default, lambda self: torch.exp(-self * self) * (-2 / math.sqrt(math.pi)))
pointwise(
    aten.special_erfcx.default,
    lambda self, out: 2 * self * out - 2 / math.sqrt(math.pi),
)
pointwise(aten.erfinv.default, lambda out: torch.exp(out * out) * (math.sqrt(math.pi) / 2))
pointwise(aten.special_ndtri.default, lambda out: torch.exp(out * out / 2) * math.sqrt(2 * math.pi))
pointwise(
    aten.special_log_ndtr.default,
    lambda self: math.sqrt(2 / math.pi) / special.erfcx(self * -math.sqrt(0.5)),
)
pointwise(aten.special_entr.default, lambda self: torch.where(self > 0, -torch.log(self), 0) - 1)

# Gamma functions and the zeta function

pointwise(aten.lgamma.default, lambda self: torch.digamma(self))
pointwise(aten.digamma.default, lambda self: torch.polygamma(1, self))
pointwise(aten.polygamma.default, self=lambda n, self: torch.polygamma(n + 1, self))


def gamma_density(self: Tensor, other: Tensor) -> Tensor:
    """Slope of the regularised lower incomplete gamma function in its upper limit."""
    return torch.exp((self - 1) * torch.log(other) - other - torch.lgamma(self))


def no_slope() -> Tensor:
    raise RuleError(
        "the incomplete gamma functions have no closed derivative in their first argument; give "
        "it no tangent (detach it), or give a custom op with your own quadrature a row"
    )


pointwise(aten.igamma.default, self=no_slope, other=gamma_density)
pointwise(
    aten.igammac.default,
    self=no_slope,
    other=lambda self, other: -gamma_density(self, other),
)
for _op in (aten.special_zeta.default, aten.special_zeta.self_scalar):
    pointwise(_op, other=lambda self, other: -self * special.zeta(self + 1, other))

# Bessel functions; those of order one need their limit at 0


def at_zero(self: Tensor, value: Any, elsewhere: Tensor) -> Tensor:
    return torch.where(self == 0, value, elsewhere)


def sinc_slope(self: Tensor, out: Tensor) -> Tensor:
    # The limit is written as -x pi^2 / 3, and not 0: so the second derivative is right as well.
    slope = (torch.cos(self * math.pi) - out) / self
    return at_zero(self, self * (-(math.pi**2) / 3), slope)


pointwise(aten.sinc.default, sinc_slope)
pointwise(
    aten.special_spherical_bessel_j0.default,
    x=lambda x, out: at_zero(x, x / -3, (torch.cos(x) - out) / x),
)
pointwise(aten.special_bessel_j0.default, lambda self: -special.bessel_j1(self))
pointwise(aten.special_bessel_y0.default, lambda self: -special.bessel_y1(self))
pointwise(
    aten.special_bessel_j1.default,
    lambda self, out: at_zero(self, 0.5, special.bessel_j0(self) - out / self),
)
pointwise(aten.special_bessel_y1.default, lambda self, out: special.bessel_y0(self) - out / self)
_BESSEL_I: tuple[tuple[Any, Any, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], ...] = (
    (aten.i0, aten.special_i1, torch.i0, special.i1),
    (
        aten.special_modified_bessel_i0,
        aten.special_modified_bessel_i1,
        special.modified_bessel_i0,
        special.modified_bessel_i1,
    ),
)
for _i0, _i1, _f0, _f1 in _BESSEL_I:
    pointwise(_i0.default, lambda self, f1=_f1: f1(self))
    pointwise(_i1.default, lambda self, out, f0=_f0: at_zero(self, 0.5, f0(self) - out / self))
pointwise(aten.special_i0e.default, lambda self, out: special.i1e(self) - torch.sign(self) * out)
pointwise(
    aten.special_i1e.default,
    lambda self, out: at_zero(self, 0.5, special.i0e(self) - out * (torch.sign(self) + 1 / self)),
)
pointwise(aten.special_modified_bessel_k0.default, lambda self: -special.modified_bessel_k1(self))
pointwise(
    aten.special_modified_bessel_k1.default,
    lambda self, out: -special.modified_bessel_k0(self) - out / self,
)
pointwise(
    aten.special_scaled_modified_bessel_k0.default,
    lambda x, out: out - special.scaled_modified_bessel_k1(x),
)
pointwise(
    aten.special_scaled_modified_bessel_k1.default,
    lambda x, out: out - special.scaled_modified_bessel_k0(x) - out / x,
)

# self * log(other) and self * log1p(other), which are 0 where self is 0


def log_factor(self: Tensor, other: Any, shift: int) -> Tensor:
    """Slope of xlogy in self: the logarithm, and 0 where self is 0 and the logarithm has none."""
    y = other if isinstance(other, Tensor) else self.new_full((), other)
    return torch.where((self == 0) & (y <= -shift), 0, torch.log1p(y) if shift else torch.log(y))


pointwise(
    aten.xlogy.Tensor,
    self=lambda self, other: log_factor(self, other, 0),
    other=lambda self, other: self / other,
)
pointwise(aten.xlogy.Scalar_Self, other=lambda self, other: self / other)
pointwise(aten.xlogy.Scalar_Other, lambda self, other: log_factor(self, other, 0))
pointwise(
    aten.special_xlog1py.default,
    self=lambda self, other: log_factor(self, other, 1),
    other=lambda self, other: self / (other + 1),
)
pointwise(aten.special_xlog1py.self_scalar, other=lambda self, other: self / (other + 1))
pointwise(aten.special_xlog1py.other_scalar, lambda self, other: log_factor(self, other, 1))
