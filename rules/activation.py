"""Activations. At a kink the derivative is that of torch, see docs/kinks.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..rule import jvp, pointwise

aten = torch.ops.aten

pointwise(aten.relu.default, lambda out: out > 0)
pointwise(aten.relu6.default, lambda self: (self > 0) & (self < 6))
pointwise(aten.hardtanh.default, lambda self, min_val, max_val: (self > min_val) & (self < max_val))
jvp(
    aten.threshold.default,
    self=lambda d, self, threshold: torch.where(self <= threshold, 0.0, d),
)
jvp(
    aten.leaky_relu.default,
    self=lambda d, self, negative_slope: torch.where(self > 0, d, d * negative_slope),
)
jvp(
    aten._prelu_kernel.default,
    self=lambda d, self, weight: torch.where(self > 0, d, d * weight),
    weight=lambda d, self: torch.where(self > 0, 0.0, d * self),
)


def _elu_slope(d: Tensor, self: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    below = d * (alpha * scale * input_scale) * torch.exp(self * input_scale)
    return torch.where(self > 0, d * scale, below)


jvp(aten.elu.default, self=_elu_slope)
jvp(aten.celu.default, self=lambda d, self, alpha: _elu_slope(d, self, alpha, 1.0, 1.0 / alpha))
jvp(
    aten.selu.default,
    self=lambda d, self: _elu_slope(d, self, 1.6732632423543772, 1.0507009873554805, 1.0),
)


def _gelu_slope(self: Tensor, approximate: str) -> Tensor:
    """Phi(x) + x phi(x), or the derivative of its tanh approximation."""
    if approximate == "none":
        density = torch.exp(-0.5 * self * self) * (1 / math.sqrt(2 * math.pi))
        return 0.5 * (1 + torch.erf(self * math.sqrt(0.5))) + self * density
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (self + cubic * self * self * self))
    inner = scale * (1 + 3 * cubic * self * self)
    return 0.5 * (1 + t) + 0.5 * self * (1 - t * t) * inner


def _silu_slope(self: Tensor) -> Tensor:
    s = torch.sigmoid(self)
    return s * (1 + self * (1 - s))


def _mish_slope(self: Tensor) -> Tensor:
    t = torch.tanh(aten.softplus(self))
    return t + self * (1 - t * t) * torch.sigmoid(self)


def _softplus_dot(d: Tensor, self: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(self * beta > threshold, d, d * torch.sigmoid(self * beta))


pointwise(aten.gelu.default, _gelu_slope)
pointwise(aten.silu.default, _silu_slope)
pointwise(aten.mish.default, _mish_slope)
jvp(aten.softplus.default, self=_softplus_dot)
pointwise(aten.log_sigmoid.default, lambda self: torch.sigmoid(-self))
jvp(
    aten.log_sigmoid_forward.default,
    self=lambda d, self: (d * torch.sigmoid(-self), None),
)
pointwise(
    aten.hardsigmoid.default,
    lambda self: torch.where((self > -3) & (self < 3), 1 / 6, 0.0),
)
jvp(
    aten.hardswish.default,
    self=lambda d, self: torch.where(
        self <= -3, 0.0, torch.where(self < 3, d * (self / 3 + 0.5), d)
    ),
)
for _op in (aten.softshrink.default, aten.hardshrink.default):
    jvp(_op, self=lambda d, self, lambd: torch.where(torch.abs(self) <= lambd, 0.0, d))


def _glu_dot(d: Tensor, self: Tensor, dim: int) -> Tensor:
    a, b = torch.chunk(self, 2, dim)
    a_dot, b_dot = torch.chunk(d, 2, dim)
    gate = torch.sigmoid(b)
    return gate * (a_dot + a * (1 - gate) * b_dot)


jvp(aten.glu.default, self=_glu_dot)


def _softmax_dot(d: Tensor, dim: int, out: Tensor) -> Tensor:
    weighted = out * d
    return weighted - out * weighted.sum(dim, keepdim=True)


def _log_softmax_dot(d: Tensor, dim: int, out: Tensor) -> Tensor:
    return d - (torch.exp(out) * d).sum(dim, keepdim=True)


for _op in (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default):
    jvp(_op, self=_softmax_dot)
for _op in (aten.log_softmax.int, aten._log_softmax.default):
    jvp(_op, self=_log_softmax_dot)
