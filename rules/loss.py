"""Losses that torch has an op for; composite ones are lowered to the ops of other files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rule import joint, jvp, lowerings

aten = torch.ops.aten


def reduced(x: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    """Applies the weight of each element, then torch's code: 0 keeps all, 1 averages, 2 sums."""
    x = x if weight is None else x * weight
    if reduction == 0:
        return x
    return x.mean() if reduction == 1 else x.sum()


# The negative log-likelihood is linear in the log-probabilities.
def nll_weight(
    d: Tensor, self: Tensor, weight: Tensor, reduction: int, out: Tensor, call: Callable[..., Any]
) -> Any:
    """Linear in the weights too, but for the mean: that divides by the total weight."""
    if reduction != 1:
        return call(weight=d)
    ones = torch.ones_like(self)
    by_sum = call(weight=d, reduction=2) + out * call(self=ones, weight=d, reduction=2)
    return -by_sum / call(self=ones, reduction=2)


for _op in (aten.nll_loss_nd.default, aten.nll_loss.default, aten.nll_loss2d.default):
    jvp(_op, self=lambda d, call: call(self=d), weight=nll_weight)
for _op in (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default):
    jvp(_op, self=lambda d, call: (call(self=d)[0], None))

# Losses of the difference z = self - target


def difference(d: dict[str, Tensor]) -> Tensor:
    """The tangent of z."""
    if "target" not in d:
        return d["self"]
    return d["self"] - d["target"] if "self" in d else -d["target"]


@joint(aten.mse_loss.default, wrt=("self", "target"))
def mse_loss(d: dict[str, Tensor], self: Tensor, target: Tensor, reduction: int) -> Tensor:
    return reduced(2 * (self - target) * difference(d), None, reduction)


@joint(aten.smooth_l1_loss.default, wrt=("self", "target"))
def smooth_l1_loss(
    d: dict[str, Tensor], self: Tensor, target: Tensor, reduction: int, beta: float
) -> Tensor:
    z = self - target
    slope = torch.sign(z) if beta == 0 else torch.clamp(z / beta, -1, 1)
    return reduced(slope * difference(d), None, reduction)


@joint(aten.huber_loss.default, wrt=("self", "target"))
def huber_loss(
    d: dict[str, Tensor], self: Tensor, target: Tensor, reduction: int, delta: float
) -> Tensor:
    slope = torch.clamp(self - target, -delta, delta)
    return reduced(slope * difference(d), None, reduction)


# Losses of probabilities and logits; each is linear in its weight of each element


def call_with_weight(d: Tensor, call: Callable[..., Tensor]) -> Tensor:
    return call(weight=d)


def bce_self(
    d: Tensor, self: Tensor, target: Tensor, weight: Tensor | None, reduction: int
) -> Tensor:
    # Torch's bound: it keeps the slope finite where the loss is clamped at -log(p) = 100.
    slope = (self - target) / torch.clamp_min(self * (1 - self), 1e-12)
    return reduced(slope * d, weight, reduction)


def bce_target(d: Tensor, self: Tensor, weight: Tensor | None, reduction: int) -> Tensor:
    slope = torch.clamp_min(torch.log1p(-self), -100) - torch.clamp_min(torch.log(self), -100)
    return reduced(slope * d, weight, reduction)


jvp(
    aten.binary_cross_entropy.default,
    self=bce_self,
    target=bce_target,
    weight=call_with_weight,
)


def logits_self(
    d: Tensor, self: Tensor, target: Tensor, weight: Any, pos_weight: Any, reduction: int
) -> Tensor:
    p = torch.sigmoid(self)
    if pos_weight is None:
        return reduced((p - target) * d, weight, reduction)
    positive = pos_weight * target
    return reduced(((positive + 1 - target) * p - positive) * d, weight, reduction)


def logits_target(d: Tensor, self: Tensor, weight: Any, pos_weight: Any, reduction: int) -> Tensor:
    if pos_weight is None:
        return reduced(-self * d, weight, reduction)
    slope = F.logsigmoid(-self) - pos_weight * F.logsigmoid(self)
    return reduced(slope * d, weight, reduction)


def logits_pos_weight(
    d: Tensor, self: Tensor, target: Tensor, weight: Any, reduction: int
) -> Tensor:
    return reduced(-target * F.logsigmoid(self) * d, weight, reduction)


jvp(
    aten.binary_cross_entropy_with_logits.default,
    self=logits_self,
    target=logits_target,
    weight=call_with_weight,
    pos_weight=logits_pos_weight,
)


def soft_margin_slope(self: Tensor, target: Tensor) -> Tensor:
    """The slope of log(1 + exp(-self * target)) in the product."""
    return -torch.sigmoid(-self * target)


jvp(
    aten.soft_margin_loss.default,
    self=lambda d, self, target, reduction: reduced(
        soft_margin_slope(self, target) * target * d, None, reduction
    ),
    target=lambda d, self, target, reduction: reduced(
        soft_margin_slope(self, target) * self * d, None, reduction
    ),
)


def _labels(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries are labels, the labels, and the classes among them; the first -1 ends them."""
    classes = torch.arange(target.shape[-1], device=target.device)
    listed = torch.cumsum(target < 0, -1) == 0
    index = torch.where(listed, target, 0)
    chosen = ((index.unsqueeze(-1) == classes) & listed.unsqueeze(-1)).any(-2, keepdim=True)
    return listed.unsqueeze(-1), index, chosen


def _differences(x: Tensor, index: Tensor) -> Tensor:
    return x.unsqueeze(-2) - torch.gather(x, -1, index).unsqueeze(-1)


def multilabel_margin(d: Tensor, self: Tensor, target: Tensor, reduction: int) -> Tensor:
    """The mean over classes of the margins that are violated."""
    if self.ndim == 0:
        d, self, target = d.reshape(1), self.reshape(1), target.reshape(1)
    listed, index, chosen = _labels(target)
    violated = (_differences(self, index) > -1) & listed & ~chosen
    total = (_differences(d, index) * violated).sum((-2, -1))
    return reduced(total / self.shape[-1], None, reduction)


def _multilabel_margin(self: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """The loss itself; torch's decomposition counts what stands behind the first -1."""
    shape, size = target.shape, self.shape[-1] if self.ndim else 1
    self, target = self.reshape(-1, size), target.reshape(-1, size)
    listed, index, chosen = _labels(target)
    margins = torch.where(listed & ~chosen, (1 + _differences(self, index)).clamp_min(0), 0)
    total = margins.sum((-2, -1)) / self.shape[-1]
    total = total.reshape(()) if len(shape) < 2 else total
    return reduced(total, None, reduction), chosen.to(self.dtype).reshape(shape)


lowerings[aten.multilabel_margin_loss_forward.default] = _multilabel_margin
jvp(aten.multilabel_margin_loss.default, self=multilabel_margin)
