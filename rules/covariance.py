"""Covariance and correlation as plain ops: torch's own look at the values of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rule import lowerings

aten = torch.ops.aten


def _cov(
    self: Tensor, *, correction: int = 1, fweights: Any = None, aweights: Any = None
) -> Tensor:
    """Variables in rows, observations in columns; weights are counts and importances."""
    x = self.reshape(1, -1) if self.ndim < 2 else self
    if fweights is None and aweights is None:
        weighted, total, norm = x, x.shape[1], max(x.shape[1] - correction, 0)
    else:
        weights = _product(fweights, aweights)
        weighted, total = x * weights, weights.sum()
        lost = total if aweights is None else (weights * aweights).sum()
        kept = total - correction * (1 if aweights is None else lost / total)
        norm = kept.clamp_min(0)
    mean = weighted.sum(1, keepdim=True) / total
    centred = x - mean
    spread = centred if weighted is x else centred * weights
    return (centred @ spread.mH / norm).squeeze()


def _product(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    return a * b


def _corrcoef(self: Tensor) -> Tensor:
    c: Tensor = aten.cov.default(self)
    if not c.ndim:
        return c / c
    deviation = torch.diagonal(c.real if c.is_complex() else c).sqrt()
    c = c / deviation.unsqueeze(1) / deviation.unsqueeze(0)
    if not c.is_complex():
        return c.clamp(-1, 1)
    return torch.complex(c.real.clamp(-1, 1), c.imag.clamp(-1, 1))


lowerings[aten.cov.default] = _cov
lowerings[aten.corrcoef.default] = _corrcoef
