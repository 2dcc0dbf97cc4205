"""Losses over sequences and vocabularies whose kernels hide what they sum over."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rule import jvp, lowerings, not_implemented, shapes

aten = torch.ops.aten


# Connectionist temporal classification (Graves et al., 2006): the slope of a loss in the
# log-probability of a symbol at a time is minus the chance that an alignment has it there.
def _ctc_loss(
    d: Tensor, log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any,
    blank: int, zero_infinity: bool, out: tuple[Tensor, Tensor],
) -> tuple[Tensor, None]:  # fmt: skip
    """Torch's backward adds the probabilities, which a log-softmax before it would take off."""
    loss, log_alpha = out
    slope = aten._ctc_loss_backward(
        torch.ones_like(loss), log_probs, targets, input_lengths, target_lengths, loss, log_alpha,
        blank, zero_infinity,
    )  # fmt: skip
    seen = _times(log_probs) < _as_tensor(input_lengths, log_probs)
    if zero_infinity:
        seen = seen & (loss < torch.inf)
    added = torch.where(seen.unsqueeze(-1), log_probs.exp(), 0)
    return ((slope - added) * d).sum((0, 2)), None


def _times(log_probs: Tensor) -> Tensor:
    return torch.arange(log_probs.shape[0], device=log_probs.device).unsqueeze(-1)


def _as_tensor(lengths: Any, like: Tensor) -> Tensor:
    """Lengths that come as numbers: one constant for each run of equal ones."""
    if isinstance(lengths, Tensor):
        return lengths.to(like.device)
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    return torch.cat([like.new_full((count,), length) for length, count in runs])


def _ctc_shapes(
    log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any,
    blank: int = 0, zero_infinity: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The table of the forward pass, which nobody but the backward sees, at its largest."""
    times, batch, _ = log_probs.shape
    given = not isinstance(target_lengths, Tensor)
    longest = max(target_lengths, default=0) if given else targets.shape[-1]
    return log_probs.new_empty([batch]), log_probs.new_empty([batch, times, 2 * longest + 1])


for _op in (aten._ctc_loss.default, aten._ctc_loss.Tensor):
    jvp(_op, log_probs=_ctc_loss)
    shapes[_op] = _ctc_shapes
for _op in (aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor):
    not_implemented(_op, "the second derivative of ctc_loss is not known to torch's kernels")


# The cross entropy of a linear layer in chunks, which torch has since 2.13: all of it at once.
def _cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Any, weight: Any,
    acc_dtype: torch.dtype, **kwargs: Any,
) -> Tensor:  # fmt: skip
    def cast(x: Any) -> Any:
        return None if x is None else x.to(acc_dtype)

    logits = F.linear(cast(input), cast(linear_weight), cast(linear_bias))
    return F.cross_entropy(logits, target, cast(weight), **kwargs).to(input.dtype)


def _chunked(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Any, weight: Any,
    reduction: str, ignore_index: int, label_smoothing: float, batch_chunk_size: int,
    acc_policy: str, acc_dtype: torch.dtype, *flags: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients that the op also returns are for torch's backward alone."""
    loss = _cross_entropy(
        input, linear_weight, target, linear_bias, weight, acc_dtype,
        reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss, input.new_empty(0), input.new_empty(0), input.new_empty(0)


def _chunked_apart(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Any, weight: Any,
    ignore_index: int, batch_chunk_size: int, acc_policy: str, acc_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _cross_entropy(
        input, linear_weight, target, linear_bias, weight, acc_dtype,
        reduction="none", ignore_index=ignore_index,
    )  # fmt: skip


with suppress(ImportError):  # the module that registers the two ops
    import_module("torch.nn.modules.linear_cross_entropy")
for _name, _lower in (
    ("_linear_cross_entropy_batch_chunked", _chunked),
    ("_linear_cross_entropy_batch_chunked_no_reduction", _chunked_apart),
):
    if hasattr(torch.ops.torch_nn, _name):
        lowerings[getattr(torch.ops.torch_nn, _name).default] = _lower
