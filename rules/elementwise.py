"""Elementwise ops: arithmetic, powers, exponentials, trigonometry, rounding, comparison, copies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..rule import joint, jvp, linear, pointwise, zero

aten = torch.ops.aten

LN2, LN10 = math.log(2), math.log(10)


def times(d: Tensor, number: Any) -> Tensor:
    """`d * number`, without an op where the number is 1 and with `neg` where it is -1."""
    if number == 1:
        return d
    return -d if number == -1 else d * number


def chosen(mask: Tensor, d: dict[str, Tensor], yes: str, no: str) -> Tensor:
    """The tangent named `yes` where the mask holds, else `no`; an absent one is zero."""
    return torch.where(mask, d.get(yes, 0), d.get(no, 0))


# Sums and products


@joint(aten.add.Tensor, wrt=("self", "other"))
def add(d: dict[str, Tensor], alpha: Any) -> Tensor:
    if len(d) == 2:
        return torch.add(d["self"], d["other"], alpha=alpha)
    return d["self"] if "self" in d else times(d["other"], alpha)


@joint(aten.sub.Tensor, wrt=("self", "other"))
def sub(d: dict[str, Tensor], alpha: Any) -> Tensor:
    if len(d) == 2:
        return torch.sub(d["self"], d["other"], alpha=alpha)
    return d["self"] if "self" in d else times(d["other"], -alpha)


@joint(aten.rsub.Tensor, wrt=("self", "other"))
def rsub(d: dict[str, Tensor], alpha: Any) -> Tensor:
    if len(d) == 2:
        return torch.sub(d["other"], d["self"], alpha=alpha)
    return d["other"] if "other" in d else times(d["self"], -alpha)


jvp(aten.add.Scalar, self=lambda d: d)
jvp(aten.sub.Scalar, self=lambda d: d)
jvp(aten.rsub.Scalar, self=lambda d, alpha: times(d, -alpha))
jvp(aten.mul.Tensor, self=lambda d, other: d * other, other=lambda d, self: d * self)
linear(aten.mul.Scalar, wrt="self")
linear(aten.div.Scalar, wrt="self")
linear(aten.neg.default, wrt="self")
pointwise(aten.reciprocal.default, lambda out: -out * out)


def quotient(d: dict[str, Tensor], other: Tensor | float, out: Tensor) -> Tensor:
    if "other" not in d:
        return d["self"] / other
    if "self" not in d:
        return -d["other"] * out / other
    return (d["self"] - out * d["other"]) / other


joint(aten.div.Tensor, wrt=("self", "other"))(quotient)


@joint(aten.div.Tensor_mode, wrt=("self", "other"))
def div_mode(
    d: dict[str, Tensor], other: Tensor | float, rounding_mode: str | None, out: Tensor
) -> Tensor | None:
    return quotient(d, other, out) if rounding_mode is None else None


jvp(
    aten.div.Scalar_mode,
    self=lambda d, other, rounding_mode: d / other if rounding_mode is None else None,
)
jvp(
    aten.fmod.Tensor,
    self=lambda d: d,
    other=lambda d, self, other: -d * torch.div(self, other, rounding_mode="trunc"),
)
jvp(
    aten.remainder.Tensor,
    self=lambda d: d,
    other=lambda d, self, other: -d * torch.div(self, other, rounding_mode="floor"),
)
jvp(aten.fmod.Scalar, self=lambda d: d)
jvp(aten.remainder.Scalar, self=lambda d: d)
jvp(
    aten.remainder.Scalar_Tensor,
    other=lambda d, self, other: -d * torch.floor(self / other),
)
jvp(
    aten.addcmul.default,
    self=lambda d: d,
    tensor1=lambda d, tensor2, value: times(d * tensor2, value),
    tensor2=lambda d, tensor1, value: times(d * tensor1, value),
)
jvp(
    aten.addcdiv.default,
    self=lambda d: d,
    tensor1=lambda d, tensor2, value: times(d / tensor2, value),
    tensor2=lambda d, tensor1, tensor2, value: times(d * tensor1 / (tensor2 * tensor2), -value),
)
for _op in (aten.lerp.Scalar, aten.lerp.Tensor):
    jvp(
        _op,
        self=lambda d, weight: d * (1 - weight),
        end=lambda d, weight: d * weight,
        **({"weight": lambda d, self, end: d * (end - self)} if _op is aten.lerp.Tensor else {}),
    )

# Powers, exponentials and logarithms


def pow_exponent(d: Tensor, self: Any, exponent: Tensor, out: Tensor) -> Tensor:
    """d self**exponent / d exponent; zero at base 0 for exponents that are not negative."""
    if isinstance(self, int | float) and self > 0:
        return d * out * math.log(self)
    base = self if isinstance(self, Tensor) else out.new_full((), self)
    sign = exponent.real if exponent.is_complex() else exponent
    return d * torch.where((base == 0) & (sign >= 0), 0, out * torch.log(base))


def pow_scalar(d: Tensor, self: Tensor, exponent: Any) -> Tensor | None:
    if exponent == 0:
        return None
    if exponent == 1:
        return d
    return d * (self * 2 if exponent == 2 else self ** (exponent - 1) * exponent)


jvp(aten.pow.Tensor_Scalar, self=pow_scalar)
jvp(aten.pow.Scalar, exponent=pow_exponent)
jvp(
    aten.pow.Tensor_Tensor,
    self=lambda d, self, exponent: (
        d * torch.where((self == 0) & (exponent == 0), 0, exponent * self ** (exponent - 1))
    ),
    exponent=pow_exponent,
)
pointwise(aten.square.default, lambda self: self * 2)
jvp(aten.sqrt.default, self=lambda d, out: d / (out * 2))
pointwise(aten.rsqrt.default, lambda out: out**3 * -0.5)
jvp(aten.hypot.default, self=lambda d, self, out: d * self / out,
    other=lambda d, other, out: d * other / out)  # fmt: skip
pointwise(aten.exp.default, lambda out: out)
pointwise(aten.exp2.default, lambda out: out * LN2)
pointwise(aten.expm1.default, lambda out: out + 1)
jvp(aten.log.default, self=lambda d, self: d / self)
jvp(aten.log2.default, self=lambda d, self: d / (self * LN2))
jvp(aten.log10.default, self=lambda d, self: d / (self * LN10))
jvp(aten.log1p.default, self=lambda d, self: d / (self + 1))
pointwise(
    aten.logaddexp.default,
    self=lambda self, other: torch.sigmoid(self - other),
    other=lambda self, other: torch.sigmoid(other - self),
)
pointwise(
    aten.logaddexp2.default,
    self=lambda self, other: torch.sigmoid((self - other) * LN2),
    other=lambda self, other: torch.sigmoid((other - self) * LN2),
)
jvp(
    aten.ldexp.Tensor,
    self=lambda d, other: torch.ldexp(d, other),
    other=lambda d, out: d * out * LN2,
)
jvp(aten.frexp.Tensor, self=lambda d, out: (torch.ldexp(d, -out[1]), None))
pointwise(aten.sigmoid.default, lambda out: out * (1 - out))

# Trigonometric and hyperbolic functions

pointwise(aten.sin.default, lambda self: torch.cos(self))
pointwise(aten.cos.default, lambda self: -torch.sin(self))
pointwise(aten.tan.default, lambda out: out * out + 1)
pointwise(aten.asin.default, lambda self: torch.rsqrt(1 - self * self))
pointwise(aten.acos.default, lambda self: -torch.rsqrt(1 - self * self))
jvp(aten.atan.default, self=lambda d, self: d / (self * self + 1))
pointwise(aten.sinh.default, lambda self: torch.cosh(self))
pointwise(aten.cosh.default, lambda self: torch.sinh(self))
pointwise(aten.tanh.default, lambda out: 1 - out * out)
pointwise(aten.asinh.default, lambda self: torch.rsqrt(self * self + 1))
pointwise(aten.acosh.default, lambda self: torch.rsqrt(self - 1) * torch.rsqrt(self + 1))
jvp(aten.atanh.default, self=lambda d, self: d / (1 - self * self))


@joint(aten.atan2.default, wrt=("self", "other"))
def atan2(d: dict[str, Tensor], self: Tensor, other: Tensor) -> Tensor:
    square = self * self + other * other
    if "other" not in d:
        return d["self"] * other / square
    if "self" not in d:
        return -d["other"] * self / square
    return (d["self"] * other - d["other"] * self) / square


# Rounding and signs

zero(
    aten.sign.default,
    aten.floor.default,
    aten.ceil.default,
    aten.round.default,
    aten.round.decimals,
    aten.trunc.default,
)
jvp(
    aten.nan_to_num.default,
    self=lambda d, self: torch.where(self.abs() < math.inf, d, 0),
)
for _op in (aten.copysign.Tensor, aten.copysign.Scalar):
    jvp(
        _op,
        self=lambda d, self, out: d * (self.sign() * out.sign()),
        **({"other": lambda d: None} if _op is aten.copysign.Tensor else {}),
    )

# Choices: maxima share a tie evenly, bounds pass the tangent of what they bound


@joint(aten.maximum.default, wrt=("self", "other"))
def maximum(d: dict[str, Tensor], self: Tensor, other: Tensor) -> Tensor:
    return _shared(d, self > other, self == other)


@joint(aten.minimum.default, wrt=("self", "other"))
def minimum(d: dict[str, Tensor], self: Tensor, other: Tensor) -> Tensor:
    return _shared(d, self < other, self == other)


def _shared(d: dict[str, Tensor], mask: Tensor, tie: Tensor) -> Tensor:
    total = d["self"] + d["other"] if len(d) == 2 else next(iter(d.values()))
    return torch.where(tie, total * 0.5, chosen(mask, d, "self", "other"))


@joint(aten.fmax.default, wrt=("self", "other"))
def fmax(d: dict[str, Tensor], self: Tensor, other: Tensor) -> Tensor:
    return chosen((self > other) | other.isnan(), d, "self", "other")


@joint(aten.fmin.default, wrt=("self", "other"))
def fmin(d: dict[str, Tensor], self: Tensor, other: Tensor) -> Tensor:
    return chosen((self <= other) | other.isnan(), d, "self", "other")


@joint(aten.clamp_min.default, aten.clamp_min.Tensor, wrt=("self", "min"))
def clamp_min(d: dict[str, Tensor], self: Tensor, min: Any) -> Tensor:
    return chosen(self >= min, d, "self", "min")


@joint(aten.clamp_max.default, aten.clamp_max.Tensor, wrt=("self", "max"))
def clamp_max(d: dict[str, Tensor], self: Tensor, max: Any) -> Tensor:
    return chosen(self <= max, d, "self", "max")


@joint(aten.clamp.default, aten.clamp.Tensor, wrt=("self", "min", "max"))
def clamp(d: dict[str, Tensor], self: Tensor, min: Any, max: Any) -> Tensor:
    if max is None:
        return chosen(self >= min, d, "self", "min")
    if min is None:
        return chosen(self <= max, d, "self", "max")
    if set(d) == {"self"}:
        return torch.where((self >= min) & (self <= max), d["self"], 0)
    below = chosen(self < min, d, "min", "self") if d.keys() & {"self", "min"} else 0
    return torch.where((self > max) | (min > max), d.get("max", 0), below)


@joint(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, wrt=("self", "other"))
def where(d: dict[str, Tensor], condition: Tensor) -> Tensor:
    return chosen(condition, d, "self", "other")


# Copies keep the tangent's layout like the primal's, so that views of both stay possible

for _op in (
    aten._to_copy.default,
    aten.clone.default,
    aten.alias_copy.default,
    aten.alias.default,
):
    linear(_op, wrt="self")
linear(torch.ops.prims.convert_element_type.default, wrt="a")
jvp(aten.fill.Tensor, self=lambda d: None, value=lambda d: d)

zero(
    aten.detach.default,
    aten.detach_copy.default,
    aten.fill.Scalar,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
