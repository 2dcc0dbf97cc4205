"""Activations and softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..rule import jvp, pointwise
from .elementwise import times

aten = torch.ops.aten

# Piecewise linear ones: the tangent passes, is scaled, or stops, even where it is infinite

jvp(aten.relu.default, self=lambda d, out: torch.where(out > 0, d, 0))
jvp(aten.relu6.default, self=lambda d, out: torch.where((out > 0) & (out < 6), d, 0))
jvp(
    aten.hardtanh.default,
    self=lambda d, out, min_val, max_val: torch.where((out > min_val) & (out < max_val), d, 0),
)
jvp(
    aten.hardsigmoid.default,
    self=lambda d, self: torch.where((self > -3) & (self < 3), d / 6, 0),
)
jvp(aten.threshold.default, self=lambda d, self, threshold: torch.where(self > threshold, d, 0))
for _op in (aten.hardshrink.default, aten.softshrink.default):
    jvp(_op, self=lambda d, self, lambd: torch.where(self.abs() > lambd, d, 0))
jvp(
    aten.leaky_relu.default,
    self=lambda d, self, negative_slope: torch.where(self > 0, d, d * negative_slope),
)
jvp(
    aten._prelu_kernel.default,
    self=lambda d, self, weight: torch.where(self >= 0, d, d * weight),
    weight=lambda d, self: torch.where(self >= 0, 0, d * self),
)

# Smooth ones


def elu_dot(
    d: Tensor, self: Tensor, alpha: float, scale: float, input_scale: float, out: Tensor
) -> Tensor:
    return torch.where(self > 0, times(d, scale), times(d * (out + alpha * scale), input_scale))


jvp(aten.elu.default, self=elu_dot)
jvp(
    aten.celu.default,
    self=lambda d, self, alpha, out: elu_dot(d, self, alpha, 1.0, 1 / alpha, out),
)
jvp(
    aten.selu.default,
    self=lambda d, self, out: elu_dot(
        d, self, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0, out
    ),
)

# Torch's kernel is linear in its first argument and one node, where the formula takes eleven.
jvp(
    aten.gelu.default,
    self=lambda d, self, approximate: aten.gelu_backward(d, self, approximate=approximate),
)


def gelu_curvature(self: Tensor, approximate: str) -> Tensor:
    """The second derivative of gelu."""
    square = self * self
    if approximate == "none":
        return torch.exp(square * -0.5) * (2 - square) / math.sqrt(2 * math.pi)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(self * (1 + cubic * square) * scale)
    slope = (1 + 3 * cubic * square) * scale
    bend = self * (6 * cubic * scale) - 2 * t * slope * slope
    return (1 - t * t) * (slope + 0.5 * self * bend)


jvp(
    aten.gelu_backward.default,
    grad_output=lambda d, self, approximate: aten.gelu_backward(d, self, approximate=approximate),
    self=lambda d, grad_output, self, approximate: (
        d * grad_output * gelu_curvature(self, approximate)
    ),
)


def silu_slope(self: Tensor, out: Tensor) -> Tensor:
    gate = torch.sigmoid(self)
    return gate + out * (1 - gate)


def mish_slope(self: Tensor) -> Tensor:
    t = torch.tanh(aten.softplus(self))
    return t + self * torch.sigmoid(self) * (1 - t * t)


def softplus_dot(d: Tensor, self: Tensor, beta: float, threshold: float) -> Tensor:
    z = times(self, beta)
    return torch.where(z > threshold, d, d * torch.sigmoid(z))


def hardswish_dot(d: Tensor, self: Tensor) -> Tensor:
    middle = torch.where(self < 3, d * (self / 3 + 0.5), d)
    return torch.where(self <= -3, 0, middle)


pointwise(aten.silu.default, silu_slope)
pointwise(aten.mish.default, mish_slope)
jvp(aten.softplus.default, self=softplus_dot)
pointwise(aten.log_sigmoid.default, lambda self: torch.sigmoid(-self))
jvp(aten.hardswish.default, self=hardswish_dot)


def glu_dot(d: Tensor, self: Tensor, dim: int) -> Tensor:
    a, b = self.chunk(2, dim)
    a_dot, b_dot = d.chunk(2, dim)
    gate = torch.sigmoid(b)
    return gate * (a_dot + a * (1 - gate) * b_dot)


jvp(aten.glu.default, self=glu_dot)

# Softmax


def _real(d: Tensor, out: Tensor) -> Tensor:
    """With `dtype` given, these ops drop the imaginary part of what they read."""
    return d.real if d.is_complex() and not out.is_complex() else d


def softmax_dot(d: Tensor, dim: int, out: Tensor) -> Tensor:
    weighted = out * _real(d, out)
    return weighted - out * weighted.sum(dim, keepdim=True)


def log_softmax_dot(d: Tensor, dim: int, out: Tensor) -> Tensor:
    d = _real(d, out)
    return d - (torch.exp(out) * d).sum(dim, keepdim=True)


for _op in (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default):
    jvp(_op, self=softmax_dot)
for _op in (aten.log_softmax.int, aten._log_softmax.default):
    jvp(_op, self=log_softmax_dot)
