from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fwdcompile.config import Config
from fwdcompile.errors import NonFiniteError
from fwdcompile.methods import METHODS, Step

ACTIVITIES = "fgd:perturb=activations"
LAYERS = f"{ACTIVITIES}:samples=1/2"
EAGER = ("fgd", ACTIVITIES, LAYERS, "fgd:optimizer=momentum", "backprop", "torch-jvp")


def config(**changes: Any) -> Config:
    settings: dict[str, Any] = {"methods": EAGER, "compile": False, "lr": 0.1, "decay": 0.5}
    return Config(**(settings | changes))


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return model, torch.randn(8, 4), torch.randint(2, (8,))


def make(method: str, model: nn.Module, config: Config, seed: int) -> Step:
    name, own = config.of(method)
    return METHODS[name](model, own, seed)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", EAGER)
def test_a_step_gives_the_loss_before_it_and_changes_every_parameter(method: str) -> None:
    model, x, y = problem()
    before, expected = copied(model), cross_entropy(model(x), y).item()
    loss = make(method, model, config(), 0)(x, y)
    assert loss.ndim == 0 and not loss.requires_grad
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_backprop_is_gradient_descent_with_the_papers_decay() -> None:
    model, x, y = problem()
    step = make("backprop", model, config(), 0)
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
    step = make(method, model, config(directions=directions), 3)
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


@pytest.mark.parametrize("method", ["fgd", ACTIVITIES, "torch-jvp"])
def test_more_samples_bring_the_move_nearer_to_the_gradient(method: str) -> None:
    def similarity(samples: int) -> float:
        model, x, y = problem()
        gradients = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
        before = copied(model)
        make(method, model, config(samples=samples), 0)(x, y)
        move = torch.cat([(before[n] - p.detach()).flatten() for n, p in model.named_parameters()])
        gradient = torch.cat([g.flatten() for g in gradients])
        return float(torch.cosine_similarity(move, gradient, 0))

    assert similarity(64) > 0.8 and similarity(64) > similarity(1)


@pytest.mark.parametrize("method", EAGER)
def test_the_seed_decides_a_run(method: str) -> None:
    def trained(seed: int) -> list[Tensor]:
        model, x, y = problem()
        step = make(method, model, config(), seed)
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
    step = make(method, model, config(), 0)
    step(x, y)
    before = copied(model)
    with pytest.raises(NonFiniteError, match="iteration 1: the loss"):
        step(x * math.inf, y)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("method", EAGER)
def test_a_loss_that_is_not_finite_is_left_out_if_asked(method: str) -> None:
    model, x, y = problem()
    step = make(method, model, config(skip_nonfinite=True), 0)
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
        step = make(method, model, config(samples=2, rank_one=rank_one), 5)
        losses[method] = [float(step(x, y)) for _ in range(4)]
    assert losses["torch-jvp-compiled"] == pytest.approx(losses["fgd"], rel=1e-4)


@pytest.mark.compiled
@pytest.mark.parametrize("directions", ["normal", "rademacher"])
def test_the_peer_with_torchs_own_numbers_learns(directions: str) -> None:
    model, x, y = problem()
    settings = config(directions=directions, lr=0.05, decay=0.0)
    step = make("torch-jvp-randn-compiled", model, settings, 0)
    losses = [float(step(x, y)) for _ in range(30)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("directions", ["normal", "rademacher"])
def test_the_eager_peer_moves_weights_along_rank_one_directions(directions: str) -> None:
    model, x, y = problem()
    before = copied(model)
    make("torch-jvp", model, config(directions=directions, rank_one=True), 0)(x, y)
    moves = [p.detach() - before[n] for n, p in model.named_parameters() if p.ndim > 1]
    assert moves and all(torch.linalg.matrix_rank(m, rtol=1e-4) == 1 for m in moves)


@pytest.mark.parametrize("method", ["backprop", "fgd"])
@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_optimizers_are_those_of_torch(method: str, kind: str) -> None:
    model, x, y = problem()
    step = make(f"{method}:optimizer={kind}:decay=0", model, config(), 0)
    first: list[Tensor] = []
    second: list[Tensor] = []
    for moves in (first, second):
        old = copied(model)
        step(x, y)
        moves += [p.detach() - old[name] for name, p in model.named_parameters()]
    if kind == "adam":  # the first step is the rate in the direction of the sign
        for move in first:
            torch.testing.assert_close(move.abs(), torch.full_like(move, 0.1), rtol=1e-3, atol=1e-3)
    else:
        twin, x, y = problem()
        plain = make(f"{method}:decay=0", twin, config(), 0)
        for moves, kept in ((first, 0.0), (second, 0.9)):
            old = copied(twin)
            plain(x, y)
            for move, past, (name, p) in zip(moves, first, twin.named_parameters(), strict=True):
                torch.testing.assert_close(move, p.detach() - old[name] + kept * past)


@pytest.mark.parametrize("method", [*EAGER, "fgd:optimizer=adam", "backprop:optimizer=adam"])
def test_a_step_goes_on_from_its_state(method: str) -> None:
    model, x, y = problem()
    step = make(method, model, config(directions="rademacher"), 5)
    for _ in range(2):
        step(x, y)
    state, weights = copy.deepcopy(step.state_dict()), copied(model)
    step(x, y)
    expected = copied(model)
    twin, _, _ = problem()
    twin.load_state_dict(weights)
    other = make(method, twin, config(directions="rademacher"), 0)
    other.load_state_dict(state)
    other(x, y)
    assert all(torch.equal(expected[name], p) for name, p in copied(twin).items())


@pytest.mark.parametrize("method", EAGER)
def test_a_step_starts_anew_from_the_state_of_a_new_one(method: str) -> None:
    model, x, y = problem()
    start, used = copied(model), make(method, model, config(), 0)
    for _ in range(2):
        used(x, y)
    model.load_state_dict(start)
    used.load_state_dict(make(method, problem()[0], config(), 3).state_dict())
    used(x, y)
    twin, _, _ = problem()
    make(method, twin, config(), 3)(x, y)
    assert all(torch.equal(p, copied(twin)[name]) for name, p in copied(model).items())


@pytest.mark.parametrize("method", ["fgd", ACTIVITIES, "backprop"])
def test_a_model_with_outputs_for_its_blocks_minimises_the_sum_of_losses(method: str) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> list[Tensor]:
            h = self.first(x)
            return [h, self.second(torch.tanh(h).detach())]

    torch.manual_seed(0)
    model, (_, x, y) = Blocks(), problem()
    expected = sum(cross_entropy(out, y) for out in model(x))
    step = make(method, model, config(samples=16, decay=0.0), 0)
    torch.testing.assert_close(step(x, y), expected.detach())
    found = [float(step(x, y)) for _ in range(60)]
    assert found[-1] < 0.8 * found[0]
