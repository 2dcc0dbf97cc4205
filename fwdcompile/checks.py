"""Checks in torch that read a tensor's values, which a captured program cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._higher_order_ops import effects
from torch.distributions import Distribution, Gamma
from torch.nn import functional
from torch.nn.modules import transformer

from . import rule

aten = torch.ops.aten
_gaussian_nll_loss = functional.gaussian_nll_loss
_effects = effects.has_effects


@contextmanager
def without_value_checks() -> Iterator[None]:
    """Leaves out checks while a model is captured; what they guard is computed all the same.

    `nn.Transformer` and its parts ask whether a mask is causal, to choose a faster kernel: the
    program applies the mask as it is. `nn.GaussianNLLLoss` asks whether a variance is negative:
    the program takes it for `eps`, as the loss does with what is below it. `torch.cov` and
    `torch.corrcoef` ask whether weights are valid, and are captured as what lowers them, as is
    `multilabel_margin_loss`, which torch takes apart wrongly below autograd. Whether a
    matrix was singular is no effect that keeps its place among others. Distributions do not ask
    whether their parameters are valid, unless they are told to (`validate_args=True`).
    """
    with ExitStack() as stack:
        for op, key in (
            (aten.cov.default, DispatchKey.CompositeImplicitAutograd),
            (aten.corrcoef.default, DispatchKey.CompositeImplicitAutograd),
            (aten.multilabel_margin_loss_forward.default, DispatchKey.Autograd),
        ):
            lower = {key: rule.lowerings[op]}
            stack.enter_context(mock.patch.dict(op.py_kernels, lower))
        for owner, name, instead in (
            (transformer, "_detect_is_causal_mask", _is_causal),
            (functional, "gaussian_nll_loss", _unchecked),
            (effects, "has_effects", _has_effects),
            (Distribution, "_validate_args", False),
            (Gamma, "rsample", _gamma),
        ):
            stack.enter_context(mock.patch.object(owner, name, instead))
        yield


def _gamma(self: Gamma, sample_shape: Any = ()) -> Tensor:
    """Torch's sample, kept from zero in its value alone, by ops in place of a hidden write."""
    shape = self._extended_shape(sample_shape)
    value = torch._standard_gamma(self.concentration.expand(shape)) / self.rate.expand(shape)
    least = torch.finfo(value.dtype).tiny
    return torch.where(value.detach() < least, value - value.detach() + least, value)


def _is_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return bool(is_causal)


def _unchecked(*args: Any, **kwargs: Any) -> Tensor:
    with mock.patch.object(torch, "any", return_value=False):
        return _gaussian_nll_loss(*args, **kwargs)


def _has_effects(op: Any, *args: Any) -> bool:
    return op is not aten._linalg_check_errors.default and bool(_effects(op, *args))
