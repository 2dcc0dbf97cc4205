"""Rows and lowerings of rules/sequence.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functions import check_function, normal
from torch import Tensor, nn

import fwdcompile

TIMES, BATCH, SYMBOLS = 7, 3, 5
X = normal(TIMES, BATCH, SYMBOLS)
TARGETS = torch.tensor([[1, 2, 2, 3], [4, 1, 0, 0], [3, 0, 0, 0]])
FLAT = torch.tensor([1, 2, 2, 3, 4, 1, 3])
LENGTHS, SIZES = [7, 5, 7], [4, 2, 1]


def _ctc(x: Tensor, targets: Tensor, lengths: Any, sizes: Any, **kwargs: Any) -> Tensor:
    return F.ctc_loss(x, targets, lengths, sizes, **kwargs)


@pytest.mark.parametrize(
    ("reduction", "as_tensor"),
    # The mean over lengths that are numbers is one that torch cannot capture.
    [("none", False), ("none", True), ("sum", False), ("sum", True), ("mean", True)],
)
@pytest.mark.parametrize("targets", [TARGETS, FLAT])
def test_ctc_loss(reduction: str, as_tensor: bool, targets: Tensor) -> None:
    """Of any numbers, and of log-probabilities, where torch's backward is right as well."""
    lengths: Any = torch.tensor(LENGTHS) if as_tensor else LENGTHS
    sizes: Any = torch.tensor(SIZES) if as_tensor else SIZES

    def loss(x: Tensor) -> Tensor:
        return _ctc(x, targets, lengths, sizes, reduction=reduction)

    check_function(loss, X, oracle="difference", second=False)
    check_function(lambda x: loss(x.log_softmax(-1)), X, oracle="difference", second=False)


def test_ctc_loss_agrees_with_reverse_mode() -> None:
    x, x_dot = X.clone().requires_grad_(), normal(TIMES, BATCH, SYMBOLS, seed=2)

    def loss(x: Tensor) -> Tensor:
        return _ctc(x.log_softmax(-1), TARGETS, LENGTHS, SIZES, reduction="sum")

    (slope,) = torch.autograd.grad(loss(x), x)
    _, loss_dot = fwdcompile.jvp(loss, (X,), (x_dot,))
    torch.testing.assert_close(loss_dot, (slope * x_dot).sum())


def test_ctc_loss_of_one_sequence() -> None:
    sizes = torch.tensor(TIMES), torch.tensor(4)
    check_function(lambda x: _ctc(x, FLAT[:4], *sizes), X[:, 0], oracle="difference", second=False)


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_loss_of_what_cannot_be_aligned(zero_infinity: bool) -> None:
    """Three symbols do not fit into two times: that loss is infinite, or zero."""
    x_dot = normal(TIMES, BATCH, SYMBOLS, seed=2)

    def loss(x: Tensor) -> Tensor:
        return _ctc(x, TARGETS, [2, 5, 7], SIZES, reduction="none", zero_infinity=zero_infinity)

    _, dots = fwdcompile.jvp(loss, (X,), (x_dot,))
    assert dots[0] == 0 if zero_infinity else not dots[0].isfinite()
    step = 1e-6 * x_dot
    torch.testing.assert_close(dots[1:], ((loss(X + step) - loss(X - step)) / 2e-6)[1:])


def test_the_second_derivative_of_ctc_loss_is_refused() -> None:
    with pytest.raises(fwdcompile.MissingRuleError, match="second derivative of ctc_loss"):
        check_function(
            lambda x: _ctc(x, TARGETS, LENGTHS, SIZES, reduction="sum"), X, oracle="difference"
        )


FEATURES, WEIGHT, BIAS = normal(6, 4), normal(SYMBOLS, 4, seed=2), normal(SYMBOLS, seed=3)
LABELS, CLASSES = torch.tensor([0, 4, 2, 1, 1, 3]), normal(SYMBOLS, seed=4).abs()


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch does not have it")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_linear_cross_entropy_in_chunks(reduction: str) -> None:
    """Torch gives the op that does it no tangent, and no derivative by the class weights."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2, allow_retain_graph=True)

    def loss(x: Tensor, weight: Tensor, bias: Tensor, classes: Tensor, by: Any = options) -> Tensor:
        return F.linear_cross_entropy(
            x, weight, LABELS, linear_bias=bias, weight=classes, reduction=reduction,
            ignore_index=2, options=by,
        )  # fmt: skip

    ops = check_function(loss, FEATURES, WEIGHT, BIAS, CLASSES, oracle="difference")
    assert not any("chunked" in str(op) for op in ops)
    xs = (FEATURES.float(), WEIGHT.float(), BIAS.float(), CLASSES.float())
    out, _ = fwdcompile.jvp(loss, xs, xs)
    torch.testing.assert_close(out, loss(*xs))
    plain = loss(*xs, by=None)
    torch.testing.assert_close(out, plain)
