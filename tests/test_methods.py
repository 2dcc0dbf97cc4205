from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fwdcompile.errors import NonFiniteError
from fwdcompile.methods import METHODS, Config

EAGER = ("fgd", "fgd-activations", "backprop", "torch-jvp")


def config(**changes: Any) -> Config:
    settings: dict[str, Any] = {"methods": EAGER, "compile": False, "lr": 0.1, "decay": 0.5}
    return Config(**(settings | changes))


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return model, torch.randn(8, 4), torch.randint(2, (8,))


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", EAGER)
def test_a_step_gives_the_loss_before_it_and_changes_every_parameter(method: str) -> None:
    model, x, y = problem()
    before, expected = copied(model), cross_entropy(model(x), y).item()
    loss = METHODS[method](model, config(), 0)(x, y)
    assert loss.ndim == 0 and not loss.requires_grad
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_backprop_is_gradient_descent_with_the_papers_decay() -> None:
    model, x, y = problem()
    step = METHODS["backprop"](model, config(), 0)
    for i in range(3):
        before = copied(model)
        gradients = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
        step(x, y)
        rate = 0.1 * math.exp(-0.5 * i)
        for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(p.detach(), before[name] - rate * gradient)


@pytest.mark.parametrize("directions", ["normal", "rademacher"])
@pytest.mark.parametrize("method", ["fgd", "torch-jvp"])
def test_forward_gradient_moves_along_one_direction_by_its_slope(
    method: str, directions: str
) -> None:
    model, x, y = problem()
    step = METHODS[method](model, config(directions=directions), 3)
    for i in range(2):
        before = copied(model)
        gradients = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
        step(x, y)
        moves = [before[name] - p.detach() for name, p in model.named_parameters()]
        flat = torch.cat([move.flatten() for move in moves])
        slope_times_length = sum((m * g).sum() for m, g in zip(moves, gradients, strict=True))
        assert slope_times_length >= 0  # lr (grad . v) v . grad
        if directions == "rademacher":
            size = flat.abs().median()
            torch.testing.assert_close(flat.abs(), size.expand_as(flat), rtol=1e-2, atol=1e-6)
            v = flat.sign()
            slope = sum(
                (d.view_as(g) * g).sum()
                for d, g in zip(v.split([g.numel() for g in gradients]), gradients, strict=True)
            )
            expected = 0.1 * math.exp(-0.5 * i) * float(slope)
            assert float((flat * v).mean()) == pytest.approx(abs(expected), rel=1e-3)


@pytest.mark.parametrize("method", ["fgd", "fgd-activations", "torch-jvp"])
def test_more_samples_bring_the_move_nearer_to_the_gradient(method: str) -> None:
    def similarity(samples: int) -> float:
        model, x, y = problem()
        gradients = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
        before = copied(model)
        METHODS[method](model, config(samples=samples), 0)(x, y)
        move = torch.cat([(before[n] - p.detach()).flatten() for n, p in model.named_parameters()])
        gradient = torch.cat([g.flatten() for g in gradients])
        return float(torch.cosine_similarity(move, gradient, 0))

    assert similarity(64) > 0.8 and similarity(64) > similarity(1)


@pytest.mark.parametrize("method", EAGER)
def test_the_seed_decides_a_run(method: str) -> None:
    def trained(seed: int) -> list[Tensor]:
        model, x, y = problem()
        step = METHODS[method](model, config(), seed)
        for _ in range(3):
            step(x, y)
        return [p.detach() for p in model.parameters()]

    same = [torch.equal(a, b) for a, b in zip(trained(1), trained(1), strict=True)]
    other = [torch.equal(a, b) for a, b in zip(trained(1), trained(2), strict=True)]
    assert all(same)
    assert all(other) == (method == "backprop")


@pytest.mark.parametrize("method", EAGER)
def test_a_loss_that_is_not_finite_stops_and_changes_nothing(method: str) -> None:
    model, x, y = problem()
    step = METHODS[method](model, config(), 0)
    step(x, y)
    before = copied(model)
    with pytest.raises(NonFiniteError, match="iteration 1: the loss"):
        step(x * math.inf, y)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("method", EAGER)
def test_a_loss_that_is_not_finite_is_left_out_if_asked(method: str) -> None:
    model, x, y = problem()
    step = METHODS[method](model, config(skip_nonfinite=True), 0)
    before = copied(model)
    assert not math.isfinite(float(step(x * math.inf, y)))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert math.isfinite(float(step(x, y)))
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.compiled
@pytest.mark.parametrize("rank_one", [False, True])
def test_compiled_peer_takes_the_very_steps_of_fgd(rank_one: bool) -> None:
    losses = {}
    for method in ("fgd", "torch-jvp-compiled"):
        model, x, y = problem()
        step = METHODS[method](model, config(samples=2, rank_one=rank_one), 5)
        losses[method] = [float(step(x, y)) for _ in range(4)]
    assert losses["torch-jvp-compiled"] == pytest.approx(losses["fgd"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, not 0"),
        ({"batch": -1}, "batch must be at least 1"),
        ({"runs": 0}, "runs must be"),
        ({"samples": 0}, "samples must be"),
        ({"every": 0}, "every must be"),
        ({"methods": ()}, "name each method once, not none"),
        ({"methods": ("fgd", "fgd")}, "name each method once"),
        ({"methods": ("adam",)}, "no method is called 'adam'; there are fgd, fgd-activations"),
        ({"directions": "uniform"}, "no kind of directions is called 'uniform'"),
        ({"mode": "fast"}, "no mode of torch.compile is called 'fast'"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"lr": math.inf}, "lr must be positive"),
        ({"decay": -1.0}, "decay not negative"),
        ({"decay": math.nan}, "decay not negative"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_which_methods_compile() -> None:
    plain = {m for m in METHODS if not Config().compiles(m)}
    assert plain == {"backprop", "torch-jvp"}
    assert not config().compiles("fgd")
    assert not config().compiles("fgd-activations")


@pytest.mark.compiled
@pytest.mark.parametrize("directions", ["normal", "rademacher"])
def test_the_peer_with_torchs_own_numbers_learns(directions: str) -> None:
    model, x, y = problem()
    settings = config(directions=directions, lr=0.05, decay=0.0)
    step = METHODS["torch-jvp-randn-compiled"](model, settings, 0)
    losses = [float(step(x, y)) for _ in range(30)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("directions", ["normal", "rademacher"])
def test_the_eager_peer_moves_weights_along_rank_one_directions(directions: str) -> None:
    model, x, y = problem()
    before = copied(model)
    METHODS["torch-jvp"](model, config(directions=directions, rank_one=True), 0)(x, y)
    moves = [p.detach() - before[n] for n, p in model.named_parameters() if p.ndim > 1]
    assert moves and all(torch.linalg.matrix_rank(m, rtol=1e-4) == 1 for m in moves)
