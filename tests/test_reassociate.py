"""Rank-one tangents: the program with factors against the one with their outer products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Block, Decoder
from torch import Tensor, nn
from torch.nn import functional as F

import fwdcompile
from fwdcompile import Forward, RankOne, TangentError
from fwdcompile.data import import_torchvision
from fwdcompile.models import MODELS

DENSE = ("identities", "cse", "dce")
F64 = torch.float64


def factors(shape: torch.Size) -> RankOne:
    return RankOne(torch.randn(shape[0], dtype=F64), torch.randn(shape[1:], dtype=F64))


def tangents_of(model: nn.Module) -> dict[str, Any]:
    return {
        n: factors(p.shape) if p.ndim > 1 else torch.randn_like(p)
        for n, p in model.named_parameters()
    }


def made(fwd: Forward, shapes: set[torch.Size]) -> list[str]:
    """Names of the values in a program that have one of these shapes."""
    nodes = (n for n in fwd.program.graph.nodes if n.op == "call_function")
    return [n.name for n in nodes if getattr(n.meta["val"], "shape", None) in shapes]


def agree(model: Callable[..., Any], inputs: tuple[Any, ...], tangents: dict[str, Any]) -> Forward:
    """Compares with the unoptimised program; the primal has to be the very same."""
    fwd = fwdcompile.transform(model)
    torch.manual_seed(0)
    y, y_dot = fwd(*inputs, tangents=tangents)
    torch.manual_seed(0)
    x, x_dot = fwdcompile.transform(model, passes=())(*inputs, tangents=tangents)
    assert torch.equal(x, y)
    torch.testing.assert_close(y_dot, x_dot, rtol=1e-10, atol=1e-10)
    return fwd


X, IMAGE = torch.randn(5, 6, dtype=F64), torch.randn(2, 6, 7, 8, dtype=F64)
OPS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "linear": (lambda w: F.linear(X, w), (4, 6)),
    "linear of more dimensions": (lambda w: F.linear(IMAGE, w), (3, 8)),
    "linear of a vector": (lambda w: F.linear(X[0], w), (4, 6)),
    "matmul": (lambda w: X @ w, (6, 4)),
    "matmul from the left": (lambda w: w @ X, (4, 5)),
    "matmul with a transpose": (lambda w: X @ w.T, (4, 6)),
    "matmul of many from the left": (lambda w: w @ IMAGE, (3, 7)),
    "matmul by many": (lambda w: X @ w, (3, 6, 2)),
    "matmul by many, transposed": (lambda w: X @ w.mT, (3, 2, 6)),
    "matrix by vector": (lambda w: w @ X[0], (4, 6)),
    "transposed matrix by vector": (lambda w: w.T @ X[0], (6, 4)),
    "mm": (lambda w: torch.mm(X, w), (6, 4)),
    "mm from the left": (lambda w: torch.mm(w, X), (4, 5)),
    "bmm": (lambda w: torch.bmm(X[None], w[None]), (6, 4)),
    "addmm": (lambda w: torch.addmm(X, X, w, alpha=2), (6, 6)),
    "einsum": (lambda w: torch.einsum("bi,oi->bo", X, w), (4, 6)),
    "embedding": (lambda w: F.embedding(torch.tensor([[0, 3], [1, 1]]), w), (4, 6)),
    "embedding of a transpose": (lambda w: F.embedding(torch.tensor([0, 3]), w.T), (6, 4)),
    "conv1d": (lambda w: F.conv1d(IMAGE[0], w, padding=1), (4, 7, 3)),
    "conv1d of a batch": (lambda w: F.conv1d(IMAGE[0], w, stride=2, padding=1), (4, 7, 3)),
    "conv2d": (lambda w: F.conv2d(IMAGE, w), (4, 6, 3, 2)),
    "conv2d, all options": (
        lambda w: F.conv2d(IMAGE, w, torch.ones(4, dtype=F64), (2, 1), (1, 2), (1, 2)),
        (4, 6, 2, 3),
    ),
    "conv2d of one place": (lambda w: F.conv2d(IMAGE, w, stride=2), (4, 6, 1, 1)),
    "conv2d with a large kernel": (lambda w: F.conv2d(IMAGE, w, stride=2, padding=3), (4, 6, 7, 7)),
    "conv2d, padding by name": (lambda w: F.conv2d(IMAGE, w, padding="same"), (4, 6, 3, 3)),
    "conv2d without a batch": (lambda w: F.conv2d(IMAGE[0], w, padding=1), (4, 6, 3, 3)),
    "conv2d in groups": (lambda w: F.conv2d(IMAGE, w, groups=3), (9, 2, 3, 3)),
    "conv2d by channels": (lambda w: F.conv2d(IMAGE, w, groups=6), (6, 1, 3, 3)),
    "conv3d": (lambda w: F.conv3d(IMAGE[None], w, padding=1), (4, 2, 1, 2, 2)),
    "conv_transpose2d": (lambda w: F.conv_transpose2d(IMAGE, w, stride=2), (6, 4, 3, 3)),
    "conv_transpose2d in groups": (lambda w: F.conv_transpose2d(IMAGE, w, groups=2), (6, 4, 3, 3)),
    "rows of a weight": (lambda w: X @ w[:6], (9, 4)),
    "columns of a weight": (lambda w: X @ w[:, 1:7].T, (4, 9)),
    "thirds of a weight": (lambda w: sum(X @ part.T for part in w.chunk(3)), (12, 6)),
    "another dimension": (lambda w: X @ w.unsqueeze(0), (6, 4)),
    "permuted": (lambda w: X @ w.permute(1, 2, 0), (4, 3, 6)),
    "cast": (lambda w: X.float() @ w.float(), (6, 4)),
    "scaled by a number": (lambda w: X @ (-w.T * 8 / 3), (4, 6)),
    "scaled by a tensor": (lambda w: X @ (X.mean() * w), (6, 4)),
    "scaled by columns": (lambda w: X @ (w * X[0, :4]), (6, 4)),
    "elementwise": (lambda w: torch.tanh(w), (6, 4)),
    "both factors of a product": (lambda w: w @ w.T, (6, 4)),
    "convolution turned round": (lambda w: F.conv2d(IMAGE, w.transpose(0, 1)), (6, 4, 3, 3)),
}  # fmt: skip
STAY_DENSE = {
    "elementwise",
    "scaled by columns",
    "both factors of a product",
    "convolution turned round",
}


@pytest.mark.parametrize("name", OPS)
def test_op(name: str) -> None:
    function, shape = OPS[name]
    w = torch.randn(shape, dtype=F64)
    fwd = fwdcompile.transform(lambda w: function(w))
    dot = factors(w.shape)
    y, y_dot = fwd(w, tangents={"w": dot})
    expected = torch.func.jvp(function, (w,), (dot.dense(),))
    assert torch.equal(y, function(w))
    rough = {"rtol": 1e-4, "atol": 1e-4} if name == "cast" else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(y_dot, expected[1], **rough)
    if name not in STAY_DENSE:
        assert not [n for n in made(fwd, {w.shape}) if n.endswith("w_dot")]


@pytest.mark.parametrize("name", ["logistic-regression", "mlp", "cnn"])
def test_no_dense_tangent_of_a_weight_in_the_papers_models(name: str) -> None:
    model = MODELS[name]((1, 8, 8), 10).double()
    fwd = agree(model, (torch.randn(3, 1, 8, 8, dtype=F64),), tangents_of(model))
    assert not made(fwd, {p.shape for p in model.parameters() if p.ndim > 1})


def test_no_dense_tangent_of_a_weight_in_resnet18() -> None:
    model = import_torchvision().models.resnet18(num_classes=10).double().eval()
    fwd = agree(model, (torch.randn(2, 3, 32, 32, dtype=F64),), tangents_of(model))
    assert not made(fwd, {p.shape for p in model.parameters() if p.ndim > 1})


@pytest.mark.parametrize("training", [True, False])
def test_no_dense_tangent_of_a_weight_in_a_transformer(training: bool) -> None:
    for model in (Block(16, 2), nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)):
        model = model.double().train(training)
        fwd = agree(model, (torch.randn(3, 5, 16, dtype=F64),), tangents_of(model))
        assert not made(fwd, {p.shape for p in model.parameters() if p.ndim > 1})


def test_tied_weights_and_embeddings() -> None:
    model, tokens = Decoder().double(), torch.randint(11, (2, 6))
    fwd = agree(model, (tokens, tokens), tangents_of(model))
    assert not made(fwd, {p.shape for p in model.parameters() if p.ndim > 1})


def test_several_directions() -> None:
    model, x = nn.Linear(6, 4).double(), X
    each = [tangents_of(model) for _ in range(3)]
    _, dots = fwdcompile.transform(model)(x, tangents=each)
    for dot, tangents in zip(dots, each, strict=True):
        expected = F.linear(x, tangents["weight"].dense(), tangents["bias"])
        torch.testing.assert_close(dot, expected)


def test_a_saved_program_takes_factors(tmp_path: Any) -> None:
    model, x = nn.Linear(6, 4).double(), X
    tangents = tangents_of(model)
    fwd = fwdcompile.transform(model)
    _, expected = fwd(x, tangents=tangents)
    fwd.save(tmp_path / "linear.py")
    saved = fwdcompile.load(tmp_path / "linear.py", model)
    torch.testing.assert_close(saved(x, tangents=tangents)[1], expected)
    dense = tangents | {"weight": tangents["weight"].dense()}
    with pytest.raises(TangentError, match=r"'weight' \(RankOne, direction 0\), not"):
        saved(x, tangents=dense)


def test_second_derivatives_take_the_outer_product() -> None:
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh()).double(), X
    tangents = tangents_of(model)
    dense = tangents | {"0.weight": tangents["0.weight"].dense()}
    twice = fwdcompile.transform(fwdcompile.transform(model))
    torch.testing.assert_close(twice(x, tangents=tangents), twice(x, tangents=dense))
    mixed = twice(x, tangents=dense, inner=tangents)
    torch.testing.assert_close(mixed, twice(x, tangents=dense))


def test_factors_are_checked() -> None:
    fwd = fwdcompile.transform(nn.Linear(6, 4))
    x, u, v = torch.randn(5, 6), torch.randn(4), torch.randn(6)
    with pytest.raises(TangentError, match=r"factor u of the tangent of 'weight' has shape \[6\]"):
        fwd(x, tangents={"weight": RankOne(v, u)})
    with pytest.raises(TangentError, match="factor v of the tangent of 'weight' has dtype"):
        fwd(x, tangents={"weight": RankOne(u, v.double())})
    with pytest.raises(TangentError, match="'bias' has 1 dimensions, RankOne needs two or more"):
        fwd(x, tangents={"bias": RankOne(u, v)})
    with pytest.raises(TangentError, match="RankOne in all directions or in none"):
        fwd(x, tangents=[{"weight": RankOne(u, v)}, {"weight": torch.ones(4, 6)}])


def test_factors_of_any_layout() -> None:
    model = nn.Conv2d(3, 4, 3).double()
    w = model.weight
    wide = torch.randn(8, *w.shape[1:], dtype=F64)
    dot = RankOne(wide[::2, 0, 0, 0], torch.randn(3, 3, 3, dtype=F64).permute(2, 1, 0))
    x = torch.randn(2, 3, 5, 5, dtype=F64)
    y_dot = fwdcompile.transform(model)(x, tangents={"weight": dot})[1]
    torch.testing.assert_close(y_dot, F.conv2d(x, dot.dense()))
