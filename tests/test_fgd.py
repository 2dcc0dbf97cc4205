from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import Mlp, Tied
from torch import Tensor, nn
from torch.nn import functional as F

import fwdcompile
from fwdcompile import (
    FGD,
    ForwardGradient,
    LossError,
    Normal,
    Rademacher,
    RankOne,
    Sphere,
    TangentError,
)
from fwdcompile.words import stream_keys

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


def drawn(model: nn.Module, source: Any, step: int, sample: int = 0, seed: int = 0) -> list[Tensor]:
    count = len(list(model.parameters()))
    keys = stream_keys(torch.tensor(seed), torch.tensor(step), sample + 1, count)[sample]
    return [
        source.draw(p.shape, key=key, dtype=p.dtype)
        for key, p in zip(keys, model.parameters(), strict=True)
    ]


@pytest.mark.parametrize("source", [Normal(), Rademacher()])
def test_step_is_algorithm_one(source: Any) -> None:
    model = Mlp().double()
    x = X.double()
    twin = copy.deepcopy(model)
    fgd = FGD(model, F.cross_entropy, lr=0.1, decay=0.5, directions=source, compile=False)
    for i in range(3):
        loss = F.cross_entropy(twin(x), Y)
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        v = drawn(twin, source, i)
        slope = sum((g * d).sum() for g, d in zip(gradients, v, strict=True))
        with torch.no_grad():
            for p, d in zip(twin.parameters(), v, strict=True):
                p -= 0.1 * math.exp(-0.5 * i) * slope * d
        torch.testing.assert_close(fgd.step(x, Y), loss.detach())
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert fgd.iteration == 3
    assert fgd.lr == pytest.approx(0.1 * math.exp(-1.5))


def test_forward_gradient_is_unbiased() -> None:
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    grad = ForwardGradient(model, F.cross_entropy, samples=8, compile=False)
    draws: list[Tensor] = []
    for _ in range(500):
        model.zero_grad()
        grad(x, y)
        draws.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore
    stacked = torch.stack(draws)
    error = (stacked.mean(0) - torch.cat([g.flatten() for g in expected])).abs()
    assert (error < 4.5 * stacked.std(0) / math.sqrt(len(draws))).all()


def test_samples_differ_and_are_averaged() -> None:
    model = Mlp().double()
    grad = ForwardGradient(model, F.cross_entropy, samples=3, compile=False)
    x = X.double()
    grad(x, Y)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), Y), list(model.parameters()))
    total = [torch.zeros_like(p) for p in model.parameters()]
    for k in range(3):
        v = drawn(model, Normal(), 0, k)
        slope = sum((g * d).sum() for g, d in zip(gradients, v, strict=True))
        total = [t + slope * d / 3 for t, d in zip(total, v, strict=True)]
    for p, expected in zip(model.parameters(), total, strict=True):
        torch.testing.assert_close(p.grad, expected)


OPTIMIZERS: list[Any] = [
    lambda ps: torch.optim.SGD(ps, lr=0.01),
    lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9),
    lambda ps: torch.optim.Adam(ps, lr=0.01),
    lambda ps: torch.optim.AdamW(ps, lr=0.01),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_optimizers_schedulers_and_clipping(make: Any) -> None:
    model = Mlp()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 50)
    grad = ForwardGradient(model, F.cross_entropy, directions=Rademacher(), compile=False)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append(float(grad(X, Y)))
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    assert sum(losses[-20:]) < sum(losses[:20])


def test_gradients_accumulate_as_autograds_do() -> None:
    model = Mlp()
    grad = ForwardGradient(model, F.cross_entropy, compile=False)
    grad(X, Y)
    first = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    twin = ForwardGradient(model, F.cross_entropy, compile=False)
    twin(X, Y)
    for p, g in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def test_frozen_parameters_stay_and_buffers_move() -> None:
    model = Tied()
    model.norm.weight.requires_grad_(False)
    frozen = model.norm.weight.clone()
    fgd = FGD(model, F.cross_entropy, lr=0.1, compile=False)
    before = model.embed.weight.detach().clone()
    tokens = torch.tensor([0, 1, 2, 3])
    fgd.step(tokens, tokens)
    assert torch.equal(model.norm.weight, frozen)
    assert not torch.equal(model.embed.weight, before)
    assert model.head.weight is model.embed.weight
    assert int(model.norm.num_batches_tracked) == 1


def test_non_finite_steps_change_nothing() -> None:
    model = Tied()
    fgd = FGD(model, lambda y, t: F.cross_entropy(y, t) / 0, lr=0.1, compile=False)
    state = copy.deepcopy(model.state_dict())
    tokens = torch.tensor([0, 1, 2, 3])
    with pytest.raises(fwdcompile.NonFiniteError, match="iteration 0"):
        fgd.step(tokens, tokens)
    assert fgd.iteration == 0
    for name, x in model.state_dict().items():
        assert torch.equal(x, state[name])
    skipping = FGD(
        model, lambda y, t: F.cross_entropy(y, t) / 0, lr=0.1, compile=False, nonfinite="skip"
    )
    skipping.step(tokens, tokens)
    assert skipping.iteration == 1
    for name, x in model.state_dict().items():
        assert torch.equal(x, state[name])
    grad = ForwardGradient(model, lambda y, t: F.cross_entropy(y, t) / 0, compile=False)
    with pytest.raises(fwdcompile.NonFiniteError):
        grad(tokens, tokens)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda y, t: y.sum(1), "shape"),
        (lambda y, t: t.sum(), "int64"),
        (lambda y, t: (y.sum(), t), "int64"),
        (lambda y, t: (y.sum(), 3), "or several"),
    ],
)
def test_the_loss_must_be_a_floating_scalar(loss_fn: Any, message: str) -> None:
    with pytest.raises(fwdcompile.LossError, match=message):
        FGD(Mlp(), loss_fn, lr=0.1, compile=False).step(X, Y)


def test_numbers_of_numpy_are_whole_numbers() -> None:
    two: Any = np.int64(2)
    assert type(FGD(Mlp(), F.cross_entropy, lr=0.1, samples=two).samples) is int
    grad = ForwardGradient(
        Mlp(), F.cross_entropy, perturb="activations", samples=two, compile=False
    )
    grad(X, Y)
    assert grad.samples == 2


@pytest.mark.parametrize("compile", [False, True])
def test_a_loss_that_is_a_parameter_is_that_of_before_the_step(compile: bool) -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0))

        def forward(self) -> torch.Tensor:
            return self.w

    model = Alone()
    signs = fwdcompile.Rademacher()
    loss = fwdcompile.FGD(model, lr=0.5, directions=signs, compile=compile).step()
    assert not isinstance(loss, nn.Parameter)
    assert (float(loss), float(model.w.detach())) == (2.0, 1.5)


def test_bad_settings_are_refused() -> None:
    for settings in ({"lr": 0.0}, {"lr": 1.0, "decay": -1.0}, {"lr": 1.0, "samples": 0},
                     {"lr": 1.0, "mode": "fast"}, {"lr": float("inf")}, {"lr": 1.0, "samples": 2.0},
                     {"lr": 1.0, "samples": (2, 3)}, {"lr": 1.0, "decay": float("nan")},
                     {"lr": 1.0, "directions": fwdcompile.Rademacher}):  # fmt: skip
        with pytest.raises(ValueError, match="must be|at least|must know the mode"):
            FGD(Mlp(), F.cross_entropy, **settings)  # type: ignore[arg-type]
    for samples in (2.0, True, np.float64(2)):
        with pytest.raises(ValueError, match="samples must be a whole number"):
            ForwardGradient(Mlp(), F.cross_entropy, samples=samples)  # type: ignore[arg-type]
    with pytest.raises(fwdcompile.TangentError, match="requires a gradient"):
        FGD(nn.ReLU(), F.cross_entropy, lr=0.1)


def test_the_rate_can_be_set_between_steps() -> None:
    model, twin = Mlp(), Mlp()
    twin.load_state_dict(model.state_dict())
    mine = FGD(model, F.cross_entropy, lr=1.0, decay=0.1, compile=False)
    for lr in (0.1, 0.3):
        mine.lr = lr
        assert mine.lr == pytest.approx(lr)
        theirs = FGD(twin, F.cross_entropy, lr=lr, compile=False)
        theirs.load_state_dict(theirs.state_dict() | {"iteration": mine.iteration})
        torch.testing.assert_close(mine.step(X, Y), theirs.step(X, Y))
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, other)
    with pytest.raises(ValueError, match="lr must be positive"):
        mine.lr = -1.0


@pytest.mark.parametrize("inputs", [(), (X,), (X, Y, Y)])
def test_arguments_beside_the_target_are_the_models(inputs: Any, tmp_path: Path) -> None:
    fgd = FGD(Mlp(), F.cross_entropy, lr=0.1, compile=False)
    for call in (fgd.step, fgd.calibrate, partial(fgd.export, tmp_path / "step.pt2")):
        with pytest.raises(fwdcompile.LossError, match="all but the last positional argument"):
            call(*inputs)


def test_state_dict_continues_a_run() -> None:
    model = Mlp()
    twin = copy.deepcopy(model)
    whole = FGD(model, F.cross_entropy, lr=0.1, decay=0.1, seed=7, compile=False)
    for _ in range(4):
        whole.step(X, Y)
    first = FGD(twin, F.cross_entropy, lr=0.1, decay=0.1, seed=7, compile=False)
    for _ in range(2):
        first.step(X, Y)
    second = FGD(twin, F.cross_entropy, lr=1.0, compile=False)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.step(X, Y)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_state_dict_continues_the_directions() -> None:
    model = Mlp()
    first = ForwardGradient(model, F.cross_entropy, seed=7, compile=False)
    second = ForwardGradient(model, F.cross_entropy, compile=False)
    first(X, Y)
    second.load_state_dict(first.state_dict())
    found = []
    for gradient in (first, second):
        model.zero_grad()
        gradient(X, Y)
        found.append([p.grad for p in model.parameters()])
    assert first.state_dict() == second.state_dict() == {"iteration": 2, "seed": 7}
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.compiled
def test_compiled_step_equals_the_plain_one() -> None:
    model = Mlp()
    twin = copy.deepcopy(model)
    plain = FGD(model, F.cross_entropy, lr=0.1, directions=Rademacher(), compile=False)
    compiled = FGD(twin, F.cross_entropy, lr=0.1, directions=Rademacher())
    for _ in range(3):
        torch.testing.assert_close(compiled.step(X, Y), plain.step(X, Y), rtol=1e-4, atol=1e-5)
    torch._dynamo.utils.counters.clear()
    compiled.step(X, Y)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("source", [Normal(rank_one=True), Rademacher(rank_one=True)])
def test_a_step_along_rank_one_directions(source: Any) -> None:
    model = Mlp().double()
    x, twin = X.double(), copy.deepcopy(model)
    gradients = torch.autograd.grad(F.cross_entropy(twin(x), Y), list(twin.parameters()))
    v = [d.dense() if isinstance(d, RankOne) else d for d in drawn(twin, source, 0)]
    slope = sum((g * d).sum() for g, d in zip(gradients, v, strict=True))
    FGD(model, F.cross_entropy, lr=0.1, directions=source, compile=False).step(x, Y)
    for mine, p, d in zip(model.parameters(), twin.parameters(), v, strict=True):
        assert torch.linalg.matrix_rank(torch.atleast_2d(d)) == 1
        torch.testing.assert_close(mine, p - 0.1 * slope * d)


def test_rank_one_forward_gradients_are_unbiased_with_the_second_moment_of_signs() -> None:
    model = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    (expected,) = torch.autograd.grad(F.cross_entropy(model(x), y), [model.weight])
    for source in (Rademacher(rank_one=True), Rademacher(), Normal(rank_one=True)):
        grad = ForwardGradient(model, F.cross_entropy, directions=source, compile=False)
        draws: list[Tensor] = []
        for _ in range(1500):
            model.zero_grad()
            grad(x, y)
            draws.append(model.weight.grad.clone())  # type: ignore[union-attr]
        g = torch.stack(draws)
        assert ((g.mean(0) - expected).abs() < 4.5 * g.std(0) / math.sqrt(len(g))).all()
        if isinstance(source, Rademacher):  # every component: the squared norm of the gradient
            moment, error = (g**2).mean(0), (g**2).std(0) / math.sqrt(len(g))
            assert ((moment - expected.square().sum()).abs() < 4.5 * error).all()


@pytest.mark.parametrize("source", [Normal(), Rademacher(), Rademacher(rank_one=True)])
@pytest.mark.parametrize("samples", [1, 3])
def test_directions_drawn_again_are_those_of_the_first_time(source: Any, samples: int) -> None:
    def trained(store: bool) -> Tensor:
        torch.manual_seed(0)
        model = Tied().double()
        fgd = FGD(model, F.cross_entropy, lr=0.1, decay=0.1, directions=source, samples=samples,
                  seed=4, store_directions=store, compile=False)  # fmt: skip
        tokens = torch.tensor([1, 2, 0, 3])
        for _ in range(3):
            fgd.step(tokens, tokens)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(trained(False), trained(True), rtol=1e-12, atol=1e-12)


@pytest.mark.compiled
def test_directions_are_drawn_again_by_one_compiled_update_for_each_shape() -> None:
    def trained(compile: bool) -> tuple[FGD, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3))
        fgd = FGD(model, F.cross_entropy, lr=0.1, store_directions=False, compile=compile)
        for _ in range(3):
            fgd.step(X, Y)
        return fgd, torch.cat([p.detach().flatten() for p in model.parameters()])

    (fgd, mine), (_, expected) = trained(True), trained(False)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    assert len(fgd._redraw._functions) == 4


def test_a_step_without_stored_directions_changes_nothing_where_it_is_not_finite() -> None:
    model = Mlp()
    before = [p.clone() for p in model.parameters()]
    fgd = FGD(model, F.cross_entropy, lr=0.1, store_directions=False, compile=False)
    with pytest.raises(fwdcompile.NonFiniteError):
        fgd.step(X * math.inf, Y)
    fgd.nonfinite = "skip"
    fgd.step(X * math.inf, Y)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


def flat_gradient(model: nn.Module, *losses: Tensor) -> Tensor:
    gradients = torch.autograd.grad(sum(losses), list(model.parameters()))  # type: ignore[arg-type]
    return torch.cat([g.flatten() for g in gradients])


def estimates(model: nn.Module, grad: ForwardGradient, x: Tensor, y: Tensor, n: int) -> Tensor:
    """Forward gradients of n steps, `[n, d]`."""
    found = []
    for _ in range(n):
        model.zero_grad()
        grad(x, y)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore
    return torch.stack(found)


def test_one_direction_on_the_sphere_has_d_times_the_squared_gradient() -> None:
    model, x = nn.Linear(4, 3).double(), X[:, :4].double()
    g = flat_gradient(model, F.cross_entropy(model(x), Y))
    grad = ForwardGradient(model, F.cross_entropy, directions=Sphere(), compile=False)
    found = estimates(model, grad, x, Y, 2000)
    error = (found.mean(0) - g).abs()
    assert (error < 4.5 * found.std(0) / math.sqrt(len(found))).all()
    # (g . v) v with |v|^2 = d: the estimate's square is d (g . v)^2 = d (estimate . g)
    torch.testing.assert_close(found.square().sum(1), len(g) * (found @ g))


@pytest.mark.parametrize("samples", [1, 4])
def test_orthogonal_directions_project_the_gradient(samples: int) -> None:
    model, x = nn.Linear(4, 3).double(), X[:, :4].double()
    g = flat_gradient(model, F.cross_entropy(model(x), Y))
    grad = ForwardGradient(model, F.cross_entropy, directions=Sphere(orthogonal=True),
                           samples=samples, compile=False)  # fmt: skip
    found = estimates(model, grad, x, Y, 1000)
    error = (found.mean(0) - g).abs()
    assert (error < 4.5 * found.std(0) / math.sqrt(len(found))).all()
    # d / K times a projection P: (d / K)^2 g' P g = (d / K) g' (d / K) P g
    torch.testing.assert_close(found.square().sum(1), len(g) / samples * (found @ g))
    d = Sphere(orthogonal=True).mixing([{"w": torch.randn(9)} for _ in range(3)])
    assert torch.equal(d, d.tril())


@pytest.mark.parametrize("store", [True, False])
def test_as_many_orthogonal_directions_as_numbers_give_the_gradient(store: bool) -> None:
    model, x = nn.Linear(4, 3).double(), X[:, :4].double()
    g = flat_gradient(model, F.cross_entropy(model(x), Y))
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    source = Sphere(orthogonal=True)
    grad = ForwardGradient(model, F.cross_entropy, directions=source, samples=15, compile=False)
    torch.testing.assert_close(estimates(model, grad, x, Y, 1)[0], g)
    FGD(model, F.cross_entropy, lr=0.1, directions=source, samples=15, store_directions=store,
        compile=False).step(x, Y)  # fmt: skip
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(after, before - 0.1 * g)
    with pytest.raises(ValueError, match="16 directions of 15 numbers"):
        FGD(model, F.cross_entropy, lr=0.1, directions=source, samples=16, compile=False).step(x, Y)


@pytest.mark.parametrize("source", [Rademacher(), Sphere(orthogonal=True)])
def test_clip_bounds_every_directional_derivative(source: Any) -> None:
    model = nn.Linear(4, 3).double()
    x = 100 * X[:, :4].double()
    free, clipped = (
        ForwardGradient(model, F.cross_entropy, directions=source, clip=clip, compile=False)
        for clip in (None, 0.5)
    )
    for mine, whole in zip(
        estimates(model, clipped, x, Y, 9), estimates(model, free, x, Y, 9), strict=True
    ):
        # both are a slope times a direction of length sqrt(d)
        slope = (whole.square().sum() / len(whole)).sqrt()
        torch.testing.assert_close(mine, whole * (0.5 / slope).clamp(max=1))
    with pytest.raises(ValueError, match="clip must be positive"):
        FGD(model, F.cross_entropy, lr=0.1, clip=0.0)


class Blocks(nn.Module):
    """Two layers, a gradient stopped between them, each with an output of its own, one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(6, 3), nn.Linear(3, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.first(x))
        return h, self.second(h.detach())


def both(outs: tuple[Tensor, Tensor], target: Tensor) -> list[Tensor]:
    return [F.cross_entropy(out, target) for out in outs]


def test_of_several_losses_a_parameter_learns_from_those_that_depend_on_it() -> None:
    model, x = Blocks().double(), X.double()
    twin = copy.deepcopy(model)
    grad = ForwardGradient(model, both, directions=Rademacher(), compile=False)
    loss = grad(x, Y)
    losses = both(model(x), Y)
    torch.testing.assert_close(loss, sum(losses).detach())  # type: ignore[union-attr]
    assert model.unused.weight.grad is None
    for layer, own in ((model.first, losses[0]), (model.second, losses[1])):
        gradients = torch.autograd.grad(own, list(layer.parameters()), retain_graph=True)
        mine = torch.cat([p.grad.flatten() for p in layer.parameters()])  # type: ignore[union-attr]
        g = torch.cat([x.flatten() for x in gradients])
        # (g . v) v with signs v of this layer alone
        torch.testing.assert_close(mine.square(), (mine @ g).expand_as(mine))
    for store in (True, False):
        trained = copy.deepcopy(twin)
        FGD(trained, both, lr=0.1, directions=Rademacher(), store_directions=store,
            compile=False).step(x, Y)  # fmt: skip
        for p, old, g in zip(
            trained.parameters(), twin.parameters(), model.parameters(), strict=True
        ):
            torch.testing.assert_close(p, old if g.grad is None else old - 0.1 * g.grad)


@pytest.mark.compiled
def test_a_compiled_step_with_orthogonal_directions_and_several_losses() -> None:
    model = Blocks()
    twin = copy.deepcopy(model)
    for net, compile in ((model, True), (twin, False)):
        fgd = FGD(net, both, lr=0.1, directions=Sphere(orthogonal=True), samples=2, clip=1.0,
                  compile=compile)  # fmt: skip
        for _ in range(2):
            fgd.step(X, Y)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [FGD, ForwardGradient])
def test_complex_parameters_are_refused(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.w).abs().sum()

    options = {"lr": 0.1} if kind is FGD else {}
    steps = kind(Net(), compile=False, **options)
    with pytest.raises(TangentError, match="'w' is complex, and directions are real"):
        (steps.step if kind is FGD else steps)(torch.ones(3))


def test_losses_by_name_and_numbers_of_python_are_refused() -> None:
    def named(out: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": out.square().mean(), "norm": out.norm()}

    def number(out: Tensor, y: Tensor) -> float:
        return out.square().mean().item()

    x = torch.ones(2, 3)
    for loss, message in ((named, "in a tuple or list"), (number, "is a number of Python")):
        fgd = FGD(nn.Linear(3, 2), loss, lr=0.1, compile=False)
        with pytest.raises(LossError, match=message):
            fgd.step(x, x)


@pytest.mark.parametrize("perturb", [None, "weights", "activations"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies_go_on_where_the_first_one_was(copied: Any, perturb: Any) -> None:
    model, x, y = nn.Linear(6, 3), X, Y
    if perturb is None:
        steps: Any = FGD(model, F.cross_entropy, lr=0.1, store_directions=False, compile=False)
        run = FGD.step
    else:
        steps = ForwardGradient(model, F.cross_entropy, perturb=perturb, compile=False)
        run = ForwardGradient.__call__
    run(steps, x, y)
    model.zero_grad()  # copies of parameters have no gradients
    other = copied(steps)
    twin = other.objective.model
    assert twin is not model and other.iteration == 1
    for each in (steps, other):
        run(each, x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) and p is not q
        assert p.grad is None or torch.equal(p.grad, q.grad)
