"""Rows of rules/loss.py, and the losses that are lowered to rows of other files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import check, jvp_by_rule
from functions import check_function
from torch import Tensor

import fwdcompile

aten = torch.ops.aten
MEAN, SUM, NONE = 1, 2, 0


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y, Z, EMPTY = _t(4, 5), _t(4, 5, seed=2), _t(4, 5, seed=3), _t(0, 5)
P, Q = torch.sigmoid(X), torch.sigmoid(Y)
WEIGHT = _t(5, seed=4).abs()
LABELS, SIGNS = torch.tensor([0, 4, 2, 1]), torch.sign(Y)
IMAGE, PIXELS = _t(2, 5, 2, 3), torch.tensor([[[0, 1, 2], [3, 4, 4]], [[1, 1, 0], [2, 3, 0]]])

ROWS: list[tuple[Any, tuple[Any, ...]]] = [
    *((aten.mse_loss.default, (X, Y, r)) for r in range(3)),
    *((aten.smooth_l1_loss.default, (X, Y, r, b)) for r in range(3) for b in (0.0, 0.5, 1.0)),
    *((aten.huber_loss.default, (X, Y, r, delta)) for r in range(3) for delta in (0.5, 1.0)),
    (aten.mse_loss.default, (X, WEIGHT)),
    (aten.mse_loss.default, (EMPTY, EMPTY, SUM)),
    *((aten.binary_cross_entropy.default, (P, Q, None, r)) for r in range(3)),
    *((aten.binary_cross_entropy_with_logits.default, (X, Q, None, None, r)) for r in range(3)),
]
WEIGHTED: list[tuple[Any, tuple[Any, ...]]] = [
    *((aten.binary_cross_entropy.default, (P, Q, WEIGHT, r)) for r in range(3)),
    *(
        (aten.binary_cross_entropy_with_logits.default, (X, Q, weight, WEIGHT, r))
        for weight in (None, Z)
        for r in range(3)
    ),
]
LIKELIHOOD: list[tuple[Any, tuple[Any, ...]]] = [
    (op, (x, labels, weight, reduction, ignored))
    for op in (aten.nll_loss_nd.default, aten.nll_loss_forward.default)
    for x, labels in ((X, LABELS), (X[0], LABELS[1]))
    for weight in (None, WEIGHT)
    for reduction in range(3)
    for ignored in (-100, 2)
]
LIKELIHOOD += [(aten.nll_loss.default, (X, LABELS, WEIGHT))]
LIKELIHOOD += [
    (op, (IMAGE, PIXELS, weight, reduction, 1))
    for op in (aten.nll_loss2d.default, aten.nll_loss_nd.default, aten.nll_loss2d_forward.default)
    for weight in (None, WEIGHT)
    for reduction in range(3)
]


# Their second output, the total weight, is no loss.
NO_WEIGHT = (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)


@pytest.mark.parametrize(("op", "args"), ROWS)
def test_row(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args)


@pytest.mark.parametrize(("op", "args"), WEIGHTED)
def test_weighted_row(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args, oracle="difference")


@pytest.mark.parametrize(("op", "args"), LIKELIHOOD)
def test_likelihood(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args, wrt=(0,))


@pytest.mark.parametrize(("op", "args"), LIKELIHOOD)
def test_weights_of_a_likelihood(op: Any, args: tuple[Any, ...]) -> None:
    """Torch gives the weights no tangent."""
    if args[2] is WEIGHT and op not in NO_WEIGHT:
        check(op, *args, wrt=(0, 2), oracle="difference")


def test_weights_of_a_cross_entropy() -> None:
    for smoothing in (0.0, 0.1):

        def loss(x: Tensor, weight: Tensor, by: float = smoothing) -> Tensor:
            return F.cross_entropy(x, LABELS, weight, ignore_index=2, label_smoothing=by)

        check_function(loss, X, WEIGHT, oracle="difference")


def test_kink_follows_torch() -> None:
    z = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    for beta in (0.5, 1.0):
        check(aten.smooth_l1_loss.default, z, torch.zeros_like(z), NONE, beta, second=False)
    for delta in (0.5, 1.0):
        check(aten.huber_loss.default, z, torch.zeros_like(z), NONE, delta, second=False)


def test_certain_probabilities_follow_torch() -> None:
    p = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.3], dtype=torch.float64)
    target = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    check(
        aten.binary_cross_entropy.default, p, target, None, NONE, second=False, wrt=(0,), rtol=1e-7
    )


def test_large_logits_stay_finite() -> None:
    x = torch.tensor([-800.0, 800.0], dtype=torch.float64)
    check(aten.binary_cross_entropy_with_logits.default, x, x.sigmoid(), second=False)
    _, (tangent,) = jvp_by_rule(aten.soft_margin_loss.default, (x, -x.sign(), NONE), {}, {0: x / x})
    assert tangent is not None
    torch.testing.assert_close(tangent, x.sign())


Loss = Callable[..., Tensor]
LOWERED: list[tuple[Loss, tuple[Tensor, ...]]] = [
    *(
        (lambda x, k=kwargs: F.cross_entropy(x, LABELS, **k), (X,))
        for kwargs in (
            {},
            {"weight": WEIGHT},
            {"ignore_index": 2},
            {"label_smoothing": 0.1},
            {"label_smoothing": 0.1, "weight": WEIGHT, "ignore_index": 2, "reduction": "sum"},
            {"reduction": "none"},
        )
    ),
    (lambda x, p: F.cross_entropy(x, p.softmax(1)), (X, Y)),
    (lambda x, p: F.cross_entropy(x, p, weight=WEIGHT, label_smoothing=0.2), (X, Q)),
    (lambda x: F.cross_entropy(x, PIXELS, ignore_index=0), (IMAGE,)),
    (lambda x: F.nll_loss(F.log_softmax(x, 1), LABELS), (X,)),
    (lambda x, y: F.l1_loss(x, y), (X, Y)),
    (lambda x, y: F.kl_div(x, y, reduction="batchmean"), (X, Q)),
    (lambda x, y: F.kl_div(x, y, reduction="sum", log_target=True), (X, Y)),
    (lambda x, y: F.poisson_nll_loss(x, y, log_input=True), (X, Q)),
    (lambda x, y: F.poisson_nll_loss(x, y, log_input=False, full=True), (P, Q + 1)),
    (lambda x: F.hinge_embedding_loss(x, SIGNS), (X,)),
    (lambda x, y: F.margin_ranking_loss(x, y, SIGNS, margin=0.3), (X, Y)),
    (lambda x, y: F.cosine_embedding_loss(x, y, SIGNS[:, 0], margin=0.1), (X, Y)),
    (lambda x, y, z: F.triplet_margin_loss(x, y, z, swap=True), (X, Y, Z)),
    (lambda x: F.multilabel_soft_margin_loss(x, (Y > 0).double()), (X,)),
    (lambda x, y: F.cosine_similarity(x, y), (X, Y)),
    (lambda x, y: F.pairwise_distance(x, y), (X, Y)),
]


@pytest.mark.parametrize(("loss", "primals"), LOWERED)
def test_lowered_loss(loss: Loss, primals: tuple[Tensor, ...]) -> None:
    tangents = tuple(_t(*x.shape, seed=7 + i) for i, x in enumerate(primals))
    out, out_dot = fwdcompile.jvp(loss, primals, tangents)
    expected, expected_dot = torch.func.jvp(loss, primals, tangents)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out_dot, expected_dot, rtol=1e-9, atol=1e-10)


LABEL_SETS = torch.tensor([[3, 0, -1, 1, 2], [1, -1, 0, 0, 0], [0, 1, 2, 3, 4], [-1, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: F.multi_margin_loss(x, LABELS),
        lambda x: F.multi_margin_loss(x, LABELS, p=2, weight=WEIGHT, reduction="sum"),
        lambda x: F.multilabel_margin_loss(x, LABEL_SETS),
        lambda x: F.multilabel_margin_loss(x[1], LABEL_SETS[0]),
    ],
)
def test_loss_without_forward_mode_in_torch(loss: Loss) -> None:
    x, d = X.clone().requires_grad_(), _t(4, 5, seed=7)
    out, out_dot = fwdcompile.jvp(loss, (X,), (d,))
    torch.testing.assert_close(out, loss(X))
    (gradient,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(out_dot, (gradient * d).sum())


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_row_beyond_torch(reduction: int) -> None:
    # Torch leaves the target's part out of the jvp of soft_margin_loss.
    check(aten.soft_margin_loss.default, X, Y, reduction, oracle="difference")
    op = aten.multilabel_margin_loss.default
    check(op, X, LABEL_SETS, reduction, wrt=(0,), oracle="difference")
    if reduction != NONE:
        check(op, X[0, 0], LABEL_SETS[0, 1], reduction, wrt=(0,), oracle="difference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    x, y, d = X.to(dtype), Y.to(dtype), Z.to(dtype)
    for op, args in ((aten.mse_loss.default, (x, y)), (aten.huber_loss.default, (x, y))):
        (out,), (tangent,) = jvp_by_rule(op, args, {}, {0: d})
        assert tangent is not None and tangent.dtype == out.dtype == dtype


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [None, 3])
def test_gradients_of_labels_that_end_early(reduction: str, rows: int | None) -> None:
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).cos().view(3, 4)
    target = torch.tensor([[3, 0, -1, 1], [1, -1, 0, 2], [0, 1, 2, -1]])
    if rows is None:
        x, target = x[0], target[0]

    def gradient(x: Tensor) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            y = torch.nn.functional.multilabel_margin_loss(x, target, reduction=reduction)
            return (y * y).sum()

        return torch.func.grad(loss)(x)

    step, dot = 1e-5, torch.ones_like(x).cumsum(-1)
    difference = (gradient(x + step * dot) - gradient(x - step * dot)) / (2 * step)
    found = fwdcompile.jvp(gradient, (x,), (dot,))
    torch.testing.assert_close(found, (gradient(x), difference), rtol=1e-7, atol=1e-8)
