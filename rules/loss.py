"""Losses that torch has an op for; composite ones are lowered to the ops of other files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rule import jvp

aten = torch.ops.aten


def _reduced(x: Tensor, reduction: int) -> Tensor:
    """Torch's codes: 0 keeps every element, 1 averages, 2 sums."""
    if reduction == 0:
        return x
    return x.mean() if reduction == 1 else x.sum()


# The negative log-likelihood is linear in its log-probabilities; the total weight is constant.
for _op in (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default):
    jvp(
        _op,
        self=lambda d, target, weight, reduction, ignore_index, op=_op: (
            op(d, target, weight, reduction, ignore_index)[0],
            None,
        ),
    )


# Losses of the difference z = self - target, by their slope.
def _mse(d: Tensor, self: Tensor, target: Tensor, reduction: int) -> Tensor:
    return _reduced(2 * (self - target) * d, reduction)


def _smooth_l1(d: Tensor, self: Tensor, target: Tensor, reduction: int, beta: float) -> Tensor:
    z = self - target
    slope = torch.sgn(z) if beta == 0 else torch.clamp(z / beta, -1, 1)
    return _reduced(slope * d, reduction)


def _huber(d: Tensor, self: Tensor, target: Tensor, reduction: int, delta: float) -> Tensor:
    return _reduced(torch.clamp(self - target, -delta, delta) * d, reduction)


jvp(aten.mse_loss.default, self=_mse, target=lambda d, self, target, reduction:
    _mse(-d, self, target, reduction))  # fmt: skip
jvp(aten.smooth_l1_loss.default, self=_smooth_l1, target=lambda d, self, target, reduction, beta:
    _smooth_l1(-d, self, target, reduction, beta))  # fmt: skip
jvp(aten.huber_loss.default, self=_huber, target=lambda d, self, target, reduction, delta:
    _huber(-d, self, target, reduction, delta))  # fmt: skip

# Losses of probabilities and logits.
_TINY = 1e-12


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def _bce(d: Tensor, self: Tensor, target: Tensor, weight: Any, reduction: int) -> Tensor:
    slope = (self - target) / torch.clamp_min(self * (1 - self), _TINY)
    return _reduced(_weighted(slope * d, weight), reduction)


def _bce_target(d: Tensor, self: Tensor, weight: Any, reduction: int) -> Tensor:
    slope = torch.clamp_min(torch.log1p(-self), -100) - torch.clamp_min(torch.log(self), -100)
    return _reduced(_weighted(slope * d, weight), reduction)


def _soft_margin(d: Tensor, self: Tensor, target: Tensor, reduction: int) -> Tensor:
    return _reduced(-target * torch.sigmoid(-target * self) * d, reduction)


jvp(aten.binary_cross_entropy.default, self=_bce, target=_bce_target)
jvp(aten.soft_margin_loss.default, self=_soft_margin)
