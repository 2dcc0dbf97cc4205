"""`fwdcompile.laplacian` as its users call it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fields import backward_twice
from nets import Mlp, axes
from torch import Tensor, nn

import fwdcompile

F64 = torch.float64


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def by_autograd(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is written without a forward mode: backward through backward, axis by axis."""
    return backward_twice(lambda x: model(x).sum(-1), x)(x)


@pytest.mark.parametrize(
    "compile", [False, pytest.param(True, marks=pytest.mark.compiled)], ids=["eager", "compiled"]
)
def test_a_loss_of_derivatives_trains_weights_by_autograd(compile: bool) -> None:
    model, x = Mlp().double(), torch.randn(5, 6, dtype=F64)
    lap = fwdcompile.laplacian(model, compile=compile)

    def loss(u: Tensor, slope: Tensor, laplacian: Tensor) -> Tensor:
        return (laplacian + slope.square().sum(-1) - u).square().mean()

    y, y_dots, y_ddot = lap(x, tangents=axes(x))
    ours = loss(y.sum(-1), torch.stack(y_dots, -1).sum(1), y_ddot.sum(-1))
    theirs = loss(*by_autograd(model, x))
    close(ours, theirs)
    parameters = list(model.parameters())[:-1]  # the last bias moves no derivative
    close(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters))


def test_without_autograd_the_primal_alone_is_differentiable() -> None:
    model, x = Mlp().double(), torch.randn(5, 6, dtype=F64)
    y, y_dots, y_ddot = fwdcompile.laplacian(model, tracks_grad=False)(x, tangents=axes(x))
    assert y.requires_grad and not y_ddot.requires_grad
    assert not any(y_dot.requires_grad for y_dot in y_dots)


def test_one_program_serves_every_batch() -> None:
    model = Mlp().double()
    lap = fwdcompile.laplacian(model, dynamic=True)
    programs = set()
    for batch in (3, 8):
        x = torch.randn(batch, 6, dtype=F64)
        close(lap(x, tangents=axes(x))[2].sum(-1), by_autograd(model, x)[2])
        programs.add(lap.code)
    assert len(programs) == 1


def test_the_same_program_is_used_again_for_the_same_directions_alone() -> None:
    x, t = torch.randn(2, 4)
    lap = fwdcompile.laplacian(lambda x, t: (x * t).sin())
    first = lap.lower(x, t, tangents=["x"], first=["t"])
    assert lap.lower(x, t, tangents=["x"], first=[("t",)]) is first
    lap(x, t, tangents=[{"x": x}], first=[{"t": t}])
    assert lap.code == first.code
    assert lap.lower(x, t, tangents=["x", "t"]) is not first
    assert lap.lower(x, t, tangents=["t"], first=["x"]) is not first
    assert lap.lower(x, t, tangents=[("x", "t")]) is not first


def test_a_saved_program_gives_the_same(tmp_path: Path) -> None:
    model, x = Mlp().double(), torch.randn(5, 6, dtype=F64)
    lap = fwdcompile.laplacian(model)
    mixed = [{"x": torch.ones_like(x)}]
    expected = lap(x, tangents=axes(x), first=mixed)
    lap.save(tmp_path / "laplacian.py")
    saved = fwdcompile.load(tmp_path / "laplacian.py", model)
    torch.testing.assert_close(saved(x, tangents=[*axes(x), *mixed]), expected, rtol=0, atol=0)
    with pytest.raises(fwdcompile.TangentError, match="the program takes tangents"):
        saved(x, tangents=axes(x))


def test_products_of_all_tangents_are_stacked_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Mlp().double(), torch.randn(5, 6, dtype=F64)
    lap = fwdcompile.laplacian(model)
    apart = lap(x, tangents=axes(x)[:3])
    counts = [product.count for product in lap.calibrate(x, tangents=["x"] * 3)]
    assert sorted(counts) == [4, 5]  # x and three tangents, and behind tanh y_ddot as well
    monkeypatch.setattr("fwdcompile.stack.best_form", lambda product: "stacked")
    stacked = fwdcompile.laplacian(model)
    close(stacked(x, tangents=axes(x)[:3]), apart)
    assert stacked.code.count("aten.cat(") == 2


def test_factors_are_multiplied_out() -> None:
    model, x = Mlp().double(), torch.randn(5, 6, dtype=F64)
    u, v = torch.randn(8, dtype=F64), torch.randn(6, dtype=F64)
    lap = fwdcompile.laplacian(model)
    factors = lap(x, tangents=[{"fc1.weight": fwdcompile.RankOne(u, v)}])
    close(factors, lap(x, tangents=[{"fc1.weight": torch.outer(u, v)}]))


def test_bad_input_is_refused() -> None:
    model, x = Mlp(), torch.randn(5, 6)
    lap = fwdcompile.laplacian(model)
    for tangents in ({"x": x}, [], x):
        with pytest.raises(fwdcompile.TangentError, match="a mapping for each direction"):
            lap(x, tangents=tangents)
    with pytest.raises(fwdcompile.TangentError, match="nothing is called 'y'"):
        lap(x, tangents=[{"y": x}])
    with pytest.raises(fwdcompile.TangentError, match="shape"):
        lap(x, tangents=[{"x": x}], first=[{"x": x[0]}])
    with pytest.raises(fwdcompile.TangentError, match="nothing is called 'z'"):
        lap.lower(x, tangents=["z"])
    for nested in (fwdcompile.transform, fwdcompile.laplacian):
        with pytest.raises(fwdcompile.TangentError, match="no transform is one of it"):
            nested(lap)
    with pytest.raises(fwdcompile.TangentError, match="that of a model"):
        fwdcompile.laplacian(fwdcompile.transform(model))  # type: ignore[arg-type]
