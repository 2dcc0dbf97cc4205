from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from crew import Crew
from nets import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

import fwdcompile
from fwdcompile import FGD, ForwardGradient, Normal, Rademacher, Sphere, measure
from fwdcompile.distributed import DistributedFGD, DistributedForwardGradient, Workers
from fwdcompile.errors import HistoryError, MismatchError, NonFiniteError
from fwdcompile.workers import digest

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(16) % 3
SETTINGS: dict[str, dict[str, Any]] = {
    "normal": {"directions": Normal()},
    "rank-one": {"directions": Rademacher(rank_one=True), "samples": 2},
    "sphere, cut off": {"directions": Sphere(), "samples": 2, "clip": 0.2},
}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.fc(x)))


@pytest.fixture(scope="module", params=[2, 4])
def crew(request: pytest.FixtureRequest) -> Iterator[Crew]:
    workers = Crew(request.param)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Crew]:
    workers = Crew(2)
    yield workers
    workers.close()


def model(kind: Callable[[], nn.Module] = Mlp) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def together(net: nn.Module, **options: Any) -> DistributedFGD:
    return DistributedFGD(net, F.cross_entropy, lr=0.1, decay=0.01, compile=False, **options)


def alone(net: nn.Module, **options: Any) -> FGD:
    return FGD(net, F.cross_entropy, lr=0.1, decay=0.01, compile=False, **options)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in net.state_dict().items()}


def parts(rank: int) -> tuple[Tensor, Tensor]:
    size = dist.get_world_size()
    return X[rank::size], Y[rank::size]


def trained(rank: int, share: str, steps: int, options: dict[str, Any]) -> Any:
    """Digests after every step, losses and the last weights."""
    net = model()
    fgd = together(net, workers=Workers(share), **options)  # type: ignore[arg-type]
    batch = parts(rank) if share == "data" else (X, Y)
    digests, losses = [], []
    for _ in range(steps):
        losses.append(float(fgd.step(*batch)))
        digests.append(digest(net.parameters()))
    return digests, losses, state(net)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("share", ["data", "directions"])
def test_workers_do_the_step_of_one(crew: Crew, share: str, options: dict[str, Any]) -> None:
    steps = 200 if len(options) == 1 else 20
    found = crew(trained, share, steps, options)
    digests, losses, weights = found[0]
    assert all(other[:2] == (digests, losses) for other in found)
    assert len(set(digests)) == steps
    net = model()
    samples = options.get("samples", 1) * (len(found) if share == "directions" else 1)
    fgd = alone(net, **options | {"samples": samples})
    expected = [float(fgd.step(X, Y)) for _ in range(steps)]
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights, state(net), rtol=1e-12, atol=1e-12)


def with_adam(rank: int) -> Any:
    net = model()
    gradient = DistributedForwardGradient(net, F.cross_entropy, compile=False, seed=3)
    return optimized(net, gradient, parts(rank))


def optimized(net: nn.Module, gradient: Any, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        gradient(*batch)
        gradient(*batch)
        optimizer.step()
    return state(net)


def test_any_optimizer(pair: Crew) -> None:
    net = model()
    gradient = ForwardGradient(net, F.cross_entropy, compile=False, seed=3)
    expected = optimized(net, gradient, (X, Y))
    for weights in pair(with_adam):
        torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-12)


def in_parts(rank: int) -> dict[str, Tensor]:
    net = model()
    fgd = together(net)
    x, y = parts(rank)
    for _ in range(5):
        fgd.accumulate(x[:4], y[:4])
        fgd.step(x[4:], y[4:])
    return state(net)


def test_parts_of_a_batch_add_up(pair: Crew) -> None:
    net = model()
    fgd = alone(net)
    for _ in range(5):
        fgd.step(X, Y)
    for weights in pair(in_parts):
        torch.testing.assert_close(weights, state(net), rtol=1e-12, atol=1e-12)


def normed(rank: int, follow: bool) -> list[Tensor]:
    """Running means after each step."""
    net = model(Normed)
    fgd = together(net, broadcast_buffers=follow)
    means = []
    for _ in range(3):
        fgd.step(*parts(rank))
        means.append(net.norm.running_mean.clone())  # type: ignore[union-attr, operator]
    return means


def test_buffers_are_those_of_worker_0(pair: Crew) -> None:
    """At the start of a step, as in DistributedDataParallel: worker 1 goes on from those of 0."""
    (first, second), (_, apart) = pair(normed, True), pair(normed, False)
    torch.testing.assert_close(first, pair(normed, False)[0], rtol=0, atol=0)
    for before, (own, after) in zip(first, itertools.pairwise(apart), strict=False):
        seen = (after - 0.9 * own) / 0.1  # of worker 1's batch
        index = next(i for i, x in enumerate(apart) if x is after)
        torch.testing.assert_close(second[index], 0.9 * before + 0.1 * seen)
    assert not torch.equal(second[-1], apart[-1])


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 20_000), nn.Linear(20_000, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def bytes_written(rank: int, kind: Callable[[], nn.Module]) -> float:
    """Bytes that this process wrote a step, sockets and files, as the kernel counts them."""
    fgd = together(model(kind), directions=Rademacher(), check_every=1000)
    fgd.step(*parts(rank))
    return measure.bytes_written(lambda: fgd.step(*parts(rank)), 20)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel counts no bytes here")
def test_a_step_sends_few_bytes_whatever_the_model(pair: Crew) -> None:
    small, large = pair(bytes_written, Mlp), pair(bytes_written, Wide)
    assert max(small) < 1000  # 48 of numbers, the rest are gloo's messages around them
    assert large == pytest.approx(small, abs=64)


def infected(rank: int, nonfinite: str, bad: tuple[int, ...], kind: Callable[[], nn.Module]) -> Any:
    net = model(kind)
    fgd = together(net, nonfinite=nonfinite)
    x, y = parts(rank)
    fgd.step(x, y)
    before = state(net)
    try:
        loss = fgd.step(x * float("nan") if rank in bad else x, y)
    except NonFiniteError as error:
        return before, state(net), str(error), fgd.iteration
    return before, state(net), float(loss), fgd.iteration


def test_not_finite_stops_all_and_moves_none(pair: Crew) -> None:
    for before, after, message, iteration in pair(infected, "raise", (1,), Normed):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert "iteration 1, worker 1: the loss (nan)" in message
        assert iteration == 1


def test_not_finite_worker_is_left_out(pair: Crew) -> None:
    (before, after, loss, iteration), other = pair(infected, "skip", (1,), Mlp)
    torch.testing.assert_close((after, loss, iteration), other[1:], rtol=0, atol=0)
    net = model()
    net.load_state_dict(before)
    fgd = alone(net)
    fgd.load_state_dict(fgd.state_dict() | {"iteration": 1})
    half = X[0::2], Y[0::2]
    assert float(fgd.step(*half)) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(after, state(net), rtol=1e-12, atol=1e-12)


def test_nothing_moves_where_no_worker_is_finite(pair: Crew) -> None:
    for before, after, _, iteration in pair(infected, "skip", (0, 1), Normed):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert iteration == 2


def unlike(rank: int, what: str) -> Any:
    net = model()
    options: dict[str, Any] = {}
    if what == "seed" and rank:
        options["seed"] = 7
    if what == "directions" and rank:
        options["directions"] = Rademacher()
    if what == "shape" and rank:
        net.fc2 = nn.Linear(8, 4).double()
    if what == "weights" and rank:
        torch.nn.init.zeros_(net.fc2.bias)
    version = "9.9" if what == "version" and rank else fwdcompile.__version__
    with mock.patch("fwdcompile.together.__version__", version):
        return refusal(net, lambda: together(net, **options).step(*parts(rank)))


def refusal(net: nn.Module, act: Callable[[], object]) -> str:
    """What the MismatchError of `act` says; the net is as it was."""
    before = state(net)
    try:
        act()
    except MismatchError as error:
        torch.testing.assert_close(state(net), before, rtol=0, atol=0)
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("seed", "its state is {'iteration': 0, 'seed': 7"),
        ("directions", "directions is Rademacher"),
        ("version", "the version of fwdcompile is 9.9 in worker 1"),
        ("shape", "parameter fc2.weight is torch.float64 of shape [4, 8] in worker 1"),
        ("weights", "parameter fc2.bias is "),
    ],
)
def test_unlike_workers_are_refused(pair: Crew, what: str, told: str) -> None:
    for message in pair(unlike, what):
        assert told in message


def apart(rank: int, what: str) -> Any:
    net = model(Normed)
    fgd = together(net, check_every=3)
    for _ in range(3):
        fgd.step(*parts(rank))
        if rank and what == "weights":
            with torch.no_grad():
                net.fc.weight += 1e-9
    if rank and what == "iteration":
        fgd.load_state_dict(fgd.state_dict() | {"iteration": 6})
    if rank and what == "program":
        net.out.bias.requires_grad_(False)
        fgd = together(net, check_every=3, workers=Alone())
        fgd.load_state_dict(fgd.state_dict() | {"iteration": 3})
    return refusal(net, lambda: fgd.step(*parts(rank)))


class Alone(Workers):
    """A worker that asks nobody whether all agree at the start."""

    def agree(self, what: Any) -> None:
        if "parameter names" not in what:
            super().agree(what)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("weights", "parameter fc.weight is "),
        ("iteration", "its iteration is 6 in worker 1, and 3 in worker 0"),
        ("program", "parameter out.bias is None in worker 1"),
    ],
)
def test_workers_that_come_apart_are_found(pair: Crew, what: str, told: str) -> None:
    for message in pair(apart, what):
        assert told in message


def recorded(rank: int, path: Path, share: str, steps: int) -> dict[str, Tensor]:
    net = model().float()
    workers = Workers(share)  # type: ignore[arg-type]
    fgd = together(net, workers=workers, history=path, check_every=50, samples=2)
    x, y = parts(rank)
    for _ in range(steps):
        fgd.step(x.float(), y)
    fgd.close()
    return state(net)


@pytest.mark.parametrize(("share", "steps"), [("data", 500), ("directions", 100)])
def test_history_gives_the_weights_again(
    pair: Crew, tmp_path: Path, share: str, steps: int
) -> None:
    path = tmp_path / "history"
    weights, _ = pair(recorded, path, share, steps)
    assert path.stat().st_size < 140 * steps
    torch.set_num_threads(1)
    net = model().float()
    fgd = together(net, samples=2)
    assert fgd.replay(path, until=40) == 40
    middle = state(net), fgd.state_dict()
    assert fgd.replay(path) == steps
    torch.testing.assert_close(state(net), weights, rtol=0, atol=0)

    late = model().float()
    late.load_state_dict(middle[0])
    joined = together(late, samples=2)
    joined.load_state_dict(middle[1])
    assert joined.replay(path) == steps
    torch.testing.assert_close(state(late), weights, rtol=0, atol=0)


def test_history_of_gradients(tmp_path: Path) -> None:
    path = tmp_path / "history"
    net = model()
    gradient = DistributedForwardGradient(net, F.cross_entropy, compile=False, history=path)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        gradient(X, Y)
        optimizer.step()
    gradient.close()
    again = model()
    other = DistributedForwardGradient(again, F.cross_entropy, compile=False)
    optimizer = torch.optim.Adam(again.parameters(), lr=0.01)
    for _ in other.replay(path):
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(state(again), state(net), rtol=0, atol=0)


def test_replay_refuses_other_weights_and_other_runs(tmp_path: Path) -> None:
    path = tmp_path / "history"
    fgd = together(model(), history=path)
    for _ in range(3):
        fgd.step(X, Y)
    fgd.close()
    torch.manual_seed(1)
    with pytest.raises(HistoryError, match="other weights at iteration 0"):
        together(Mlp().double()).replay(path)
    with pytest.raises(HistoryError, match="seed is 0 there, 1 here"):
        together(model(), seed=1).replay(path)
    with pytest.raises(HistoryError, match=r"trains fc1.weight, .* here it is missing"):
        together(model(Normed)).replay(path)
    with pytest.raises(HistoryError, match="ends at iteration 3, before 9"):
        together(model()).replay(path, until=9)
    with pytest.raises(HistoryError, match="holds the steps of a run"):
        together(model(), history=path).step(X, Y)


def test_run_goes_on_behind_its_history(tmp_path: Path) -> None:
    path = tmp_path / "history"
    whole, net = model(), model()
    fgd = together(whole)
    for _ in range(6):
        fgd.step(X, Y)
    stopped = together(net, history=path)
    for _ in range(4):
        stopped.step(X, Y)
    assert stopped._history is not None
    stopped._history._file.close()  # as a kill does, without an end
    again = model()
    fgd = together(again, history=path)
    assert fgd.replay(unfinished=True) == 4
    for _ in range(2):
        fgd.step(X, Y)
    fgd.close()
    torch.testing.assert_close(state(again), state(whole), rtol=0, atol=0)
    assert together(model()).replay(path) == 6


def test_several_losses_reach_their_own_parameters() -> None:
    def both(out: Tensor, y: Tensor) -> list[Tensor]:
        hidden, last = out
        return [F.cross_entropy(hidden, y), F.cross_entropy(last, y)]

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            hidden = self.fc1(x)
            return hidden, self.fc2(hidden.detach())

    one, other = model(Blocks), model(Blocks)
    fgd = FGD(one, both, lr=0.1, compile=False)
    many = DistributedFGD(other, both, lr=0.1, compile=False)
    for _ in range(3):
        torch.testing.assert_close(many.step(X, Y), fgd.step(X, Y))
    torch.testing.assert_close(state(other), state(one), rtol=1e-12, atol=1e-12)


@pytest.mark.compiled
def test_compiled_is_as_eager() -> None:
    one, other = model(), model()
    fgd, many = alone(one), DistributedFGD(other, F.cross_entropy, lr=0.1, decay=0.01)
    for _ in range(3):
        torch.testing.assert_close(many.step(X, Y), fgd.step(X, Y))
    torch.testing.assert_close(state(other), state(one))


def test_what_cannot_be_shared_is_refused() -> None:
    net = model()
    with pytest.raises(ValueError, match='workers share "data" or "directions"'):
        Workers("batches")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="orthogonal directions are drawn together"):
        together(net, workers=Workers("directions"), directions=Sphere(orthogonal=True))
    with pytest.raises(ValueError, match="check_every must be at least 1"):
        together(net, check_every=0)
    with pytest.raises(ValueError, match="activity perturbation has gradients"):
        DistributedForwardGradient(net, F.cross_entropy, perturb="activations")
    with pytest.raises(ValueError, match="needs the path of a history"):
        together(net).replay()


def test_inputs_are_checked_before_anything_changes() -> None:
    net = model()
    before = state(net)
    with pytest.raises(fwdcompile.LossError):
        DistributedFGD(net, lr=0.1, compile=False).step(X)
    torch.testing.assert_close(state(net), before, rtol=0, atol=0)
