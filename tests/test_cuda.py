"""On a GPU: the numbers of the CPU, CUDA graphs without copies of the model, memory.

Nothing here runs where there is no GPU; test_triton.py, test_devices.py and test_compiling.py say
what they can about GPUs without one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nets import Decoder, Mlp, Tied
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy

import fwdcompile
from fwdcompile import FGD, ForwardGradient, Normal, Rademacher
from fwdcompile.costs import costs_path
from fwdcompile.directions import RankOne, dense_tensor
from fwdcompile.distributed import DistributedFGD
from fwdcompile.measure import cuda_peak
from fwdcompile.models import deep_mlp
from fwdcompile.words import stream_keys
from fwdcompile.workers import Workers

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.compiled,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:\nOnline softmax is disabled:UserWarning"),
]

MODES = ["default", "reduce-overhead"]
STACKED = {"stacked", "turned", "stacked and turned"}
TOKENS = torch.arange(12).view(2, 6) % 11
WORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], Any]] = {
    "mlp": (Mlp, (torch.linspace(-1, 1, 24).view(4, 6), torch.tensor([0, 1, 2, 1])), cross_entropy),
    "tied": (Tied, (torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 4])), cross_entropy),
    "decoder": (Decoder, (TOKENS, TOKENS.flip(1)), None),
}


@pytest.fixture(autouse=True)
def _counted_anew() -> Iterator[None]:
    counters.clear()
    yield
    torch._dynamo.reset()


def pair(work: str) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...], tuple[Tensor, ...], Any]:
    """A float64 model with its inputs, on the CPU and on the GPU."""
    build, inputs, loss_fn = WORKS[work]
    model = build().double()
    here = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    return model, copy.deepcopy(model).cuda(), here, tuple(x.cuda() for x in here), loss_fn


def assert_alike(here: nn.Module, there: nn.Module) -> None:
    for (name, mine), theirs in zip(
        there.state_dict().items(), here.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [Normal, Rademacher])
@pytest.mark.parametrize("rank_one", [False, True])
def test_directions_are_those_of_the_cpu(
    kind: Any, rank_one: bool, dtype: torch.dtype, compiled: bool
) -> None:
    def draw(seed: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        key = stream_keys(seed, step, 2, 3)[1, 2]
        drawn = kind(rank_one=rank_one).draw((301, 333), key=key, dtype=dtype)
        return (drawn.u, drawn.v) if isinstance(drawn, RankOne) else (dense_tensor(drawn),)

    seed, step = torch.tensor(-(2**62) + 5), torch.tensor(2**33 + 1)
    run = torch.compile(draw, fullgraph=True) if compiled else draw
    for mine, theirs in zip(run(seed.cuda(), step.cuda()), draw(seed, step), strict=True):
        assert mine.is_cuda
        if kind is Rademacher:
            assert torch.equal(mine.cpu(), theirs)
        else:
            torch.testing.assert_close(mine.cpu(), theirs)


@pytest.mark.parametrize("work", WORKS)
def test_a_program_is_that_of_the_cpu(work: str) -> None:
    here, there, inputs, placed, loss_fn = pair(work)
    taken = len(inputs) if loss_fn is None else 1
    dots = {name: torch.randn_like(p) for name, p in here.named_parameters()}
    moved = {name: dot.cuda() for name, dot in dots.items()}
    y, y_dot = fwdcompile.transform(here)(*inputs[:taken], tangents=dots)
    fwd = fwdcompile.transform(there, compile=True)
    z, z_dot = fwd(*placed[:taken], tangents=moved)
    torch.testing.assert_close((z.cpu(), z_dot.cpu()), (y, y_dot), rtol=1e-8, atol=1e-10)


SETTINGS: list[dict[str, Any]] = [
    {"directions": Normal()},
    {"directions": Rademacher(rank_one=True), "samples": 2},
    {"directions": Rademacher(), "store_directions": False},
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("work", WORKS)
def test_steps_are_those_of_the_cpu(work: str, settings: dict[str, Any], mode: str) -> None:
    here, there, inputs, placed, loss_fn = pair(work)
    plain = FGD(here, loss_fn, lr=0.05, decay=0.1, compile=False, **settings)
    fgd = FGD(there, loss_fn, lr=0.05, decay=0.1, mode=mode, **settings)
    losses = [(fgd.step(*placed), plain.step(*inputs)) for _ in range(5)]
    for mine, theirs in losses:
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-8, atol=1e-10)
    assert_alike(here, there)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("perturb", ["weights", "activations"])
def test_gradients_are_those_of_the_cpu(perturb: Any, mode: str) -> None:
    here, there, inputs, placed, loss_fn = pair("mlp")
    plain = ForwardGradient(here, loss_fn, perturb=perturb, compile=False)
    gradient = ForwardGradient(there, loss_fn, perturb=perturb, mode=mode)
    for turn in range(5):
        mine, theirs = gradient(*placed), plain(*inputs)
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-8, atol=1e-10)
        for p, q in zip(there.parameters(), here.parameters(), strict=True):
            torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-8, atol=1e-10)
        if turn % 2:
            here.zero_grad(), there.zero_grad()


@pytest.mark.parametrize("work", WORKS)
def test_a_step_is_one_cuda_graph_that_writes_in_place(
    work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, there, _, placed, loss_fn = pair(work)
    recorded, graph = [], torch.cuda.CUDAGraph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recorded.append(graph()) or recorded[-1])
    fgd = FGD(there, loss_fn, lr=0.05, decay=0.1, mode="reduce-overhead")
    before = {name: (x.data_ptr(), x.clone()) for name, x in there.state_dict().items()}
    for turn in range(5):
        fgd.step(*placed)
        if turn == 3:
            fgd.load_state_dict(fgd.state_dict() | {"lr": 0.01})
    assert counters["stats"]["unique_graphs"] == 1
    assert len(recorded) == 1
    for name, x in there.state_dict().items():
        pointer, old = before[name]
        assert x.data_ptr() == pointer
        assert not torch.equal(x, old)


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_one_step_takes_no_memory_of_the_size_of_the_model(mode: str) -> None:
    torch.cuda.empty_cache()
    model = deep_mlp(60, (1, 28, 28), 10).cuda()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    x, y = torch.randn(16, 1, 28, 28).cuda(), torch.zeros(16, dtype=torch.int64).cuda()
    before = torch.cuda.memory_reserved()
    fgd = FGD(model, cross_entropy, lr=1e-4, directions=Rademacher(rank_one=True), mode=mode)
    for _ in range(4):
        fgd.step(x, y)
    # cuBLAS takes 32 MiB for each stream
    assert torch.cuda.memory_reserved() - before < size / 2
    assert cuda_peak(lambda: fgd.step(x, y)) < size / 20


class Branching(nn.Module):
    """Has a branch that the host takes, by a number that it asks the GPU for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return torch.cond(x.sum() > 0, lambda y: 2 * y, lambda y: y.sin(), (y,))


def test_a_step_that_looks_at_numbers_goes_on_without_a_graph() -> None:
    _, inputs, _ = WORKS["mlp"]
    here = Branching().double()
    there = copy.deepcopy(here).cuda()
    plain = FGD(here, cross_entropy, lr=0.05, compile=False)
    fgd = FGD(there, cross_entropy, lr=0.05, mode="reduce-overhead")
    for turn in range(4):
        x, y = inputs[0].double() + turn / 2 - 0.7, inputs[1]
        if turn == 1:
            with pytest.warns(UserWarning, match="a step runs without a CUDA graph"):
                loss = fgd.step(x.cuda(), y.cuda())
        else:
            loss = fgd.step(x.cuda(), y.cuda())
        torch.testing.assert_close(loss.cpu(), plain.step(x, y), rtol=1e-8, atol=1e-10)
    assert_alike(here, there)


def test_dropout_goes_on_drawing_when_it_is_replayed() -> None:
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(), nn.Linear(64, 3)).cuda()
    x, y = torch.ones(4, 6).cuda(), torch.zeros(4, dtype=torch.int64).cuda()
    fgd = FGD(model, cross_entropy, lr=1e-12, mode="reduce-overhead")
    assert len({float(fgd.step(x, y)) for _ in range(6)}) == 6


def test_calibration_measures_every_product() -> None:
    model = deep_mlp(2, (1, 28, 28), 10).cuda()
    x, y = torch.randn(16, 1, 28, 28).cuda(), torch.zeros(16, dtype=torch.int64).cuda()
    fgd = FGD(model, cross_entropy, lr=1e-4, mode="reduce-overhead")
    fgd.calibrate(x, y)
    (known,) = json.loads(costs_path().read_text()).values()
    assert len(known) == 5 and set(known.values()) <= {"apart", *STACKED}
    assert fgd.step(x, y).isfinite()


@pytest.mark.parametrize("mode", MODES)
def test_nccl_sends_the_numbers_of_a_step(mode: str, tmp_path: Path) -> None:
    here, there, inputs, placed, loss_fn = pair("mlp")
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        numbers = torch.arange(3, dtype=torch.float64)
        assert torch.equal(Workers().gather(numbers), numbers[None])
        own = numbers.cuda()
        everyone = [torch.empty_like(own)]
        dist.all_gather(everyone, own)
        assert torch.equal(everyone[0], own)
        fgd = DistributedFGD(there, loss_fn, lr=0.05, mode=mode)
        plain = DistributedFGD(here, loss_fn, lr=0.05, compile=False)
        for _ in range(4):
            plain.accumulate(*inputs)
            fgd.accumulate(*placed)
            torch.testing.assert_close(fgd.step(*placed).cpu(), plain.step(*inputs).cpu())
    finally:
        dist.destroy_process_group()
    assert_alike(here, there)
