from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Mlp
from torch import Tensor
from torch._inductor import compile_fx
from torch._inductor.utils import fresh_cache
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

from fwdcompile import FGD, ForwardGradient, Normal, Rademacher
from fwdcompile.compiling import Replayed, compiled_step, replays, with_own_code
from fwdcompile.config import Config
from fwdcompile.distributed import DistributedFGD
from fwdcompile.methods import METHODS
from fwdcompile.stepper import Stepper

Run = Callable[..., Any]
X, Y = torch.linspace(-1, 1, 24).view(4, 6), torch.tensor([0, 1, 2, 1])


def as_graph(function: Run, **options: Any) -> Run:
    """What a CUDA graph makes of a function: its results are in the same memory at every run."""
    kept: list[list[Tensor]] = []

    def run(*args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(function(*args))
        kept[:] = kept or [[x.clone() for x in leaves if x is not None]]
        own = iter(kept[0])
        leaves = [None if x is None else next(own).copy_(x) for x in leaves]
        return pytree.tree_unflatten(leaves, spec)

    return run


def descent(**settings: Any) -> list[Tensor]:
    fgd = FGD(Mlp(), cross_entropy, lr=0.1, **settings)
    return [*(fgd.step(X, Y) for _ in range(3)), *fgd.objective.model.parameters()]


def exchanged(**settings: Any) -> list[Tensor]:
    fgd = DistributedFGD(Mlp(), cross_entropy, lr=0.1, **settings)
    losses = []
    for _ in range(3):
        losses += [fgd.accumulate(X, Y), fgd.accumulate(-X, Y), fgd.step(2 * X, Y)]
    return [*losses, *fgd.objective.model.parameters()]


def gradients(**settings: Any) -> list[Tensor]:
    model, found = Mlp(), []
    gradient = ForwardGradient(model, cross_entropy, **settings)
    for turn in range(4):
        found.append(gradient(X + turn, Y))
        found += [p.grad for p in model.parameters()]
        if turn % 2:
            model.zero_grad()
    return found


STEPS = [
    (descent, {"directions": Normal()}),
    (descent, {"directions": Rademacher(rank_one=True), "samples": 2}),
    (descent, {"directions": Normal(), "samples": 2, "store_directions": False}),
    (exchanged, {"directions": Rademacher(), "samples": 2}),
    (gradients, {"directions": Normal()}),
    (gradients, {"perturb": "activations"}),
]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Steps run as CUDA graphs do, without a GPU or a compiler; what is recorded is in the list."""
    recorded: list[Run] = []

    def record(self: Replayed, run: Run, tensors: Any) -> Run:
        recorded.append(run)
        return as_graph(run)

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(Stepper, "_as_graph", lambda self: self._compile)
    monkeypatch.setattr(Replayed, "_record", record)
    return recorded


@pytest.mark.parametrize(("steps", "settings"), STEPS)
def test_a_step_that_is_replayed_is_the_step(
    steps: Callable[..., list[Tensor]], settings: dict[str, Any], graphs: list[Run]
) -> None:
    torch.manual_seed(0)
    expected = steps(compile=False, **settings)
    torch.manual_seed(0)
    found = steps(compile=True, **settings)
    assert len(graphs) == 1
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_a_graph_is_recorded_anew_where_the_model_moves(graphs: list[Run]) -> None:
    model, plain = Mlp(), Mlp()
    plain.load_state_dict(model.state_dict())
    steps = [
        FGD(net, cross_entropy, lr=0.1, compile=net is model, dynamic=True)
        for net in (model, plain)
    ]
    for turn in range(8):
        if turn == 4:
            for p in model.parameters():
                p.data = p.detach().clone()
        rows = 3 + turn % 2
        mine, theirs = (fgd.step(X[:rows] + turn, Y[:rows]) for fgd in steps)
        assert torch.equal(mine, theirs)
    # two shapes before and two behind, each run once by itself
    assert len(graphs) == 4
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_replayed_step_writes_to_the_inputs_that_the_model_changes(graphs: list[Run]) -> None:
    net, seen = Mlp(), torch.zeros(6)

    def loss(x: Tensor, seen: Tensor, y: Tensor) -> Tensor:
        seen.add_(x.sum(0))
        return cross_entropy(net(x), y)

    fgd = FGD(loss, lr=0.1)
    for turn in range(4):
        fgd.step(X + turn, seen, Y)
    assert len(graphs) == 1
    torch.testing.assert_close(seen, sum((X + turn).sum(0) for turn in range(4)))


def test_tensors_of_several_devices_are_not_recorded() -> None:
    runs = []
    replayed = Replayed(lambda tensors, step: runs.append(tensors), [0], [])
    tensors = torch.ones(2), torch.ones(2, device="meta")
    replayed(tensors, torch.tensor(0))
    with pytest.warns(UserWarning, match="without a CUDA graph: its tensors are on cpu, meta"):
        replayed(tensors, torch.tensor(0))
    replayed(tensors, torch.tensor(0))
    assert len(runs) == 3


def test_modes_that_record_cuda_graphs() -> None:
    assert replays("reduce-overhead") and replays("max-autotune")
    assert not replays("default") and not replays("max-autotune-no-cudagraphs")


@pytest.mark.compiled
def test_all_that_a_peer_writes_stays_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's CUDA graphs refuse to write to what they were not told to keep."""
    asked, seen = compile_fx.compile_fx, []

    def inner(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch._guards.TracingContext.get().fw_metadata)
        return compile_fx.compile_fx_inner(*args, **kwargs)

    def watched(*args: Any, **kwargs: Any) -> Any:
        return asked(*args, **({"inner_compile": inner} | kwargs))

    monkeypatch.setattr(compile_fx, "compile_fx", watched)
    step = METHODS["torch-jvp-randn-compiled"](Mlp(), Config(mode="reduce-overhead"), 0)
    with fresh_cache():
        step(X, Y)
    (known,) = seen
    written = {i for i, info in enumerate(known.input_info) if info.mutates_data}
    assert written and written <= set(known.static_input_indices)


@pytest.mark.compiled
def test_a_product_and_a_sum_round_once() -> None:
    x = 1 + torch.arange(1, 1001, dtype=torch.float32) * 2**-12
    step = compiled_step(lambda a, b, c: a * b + c, "default", False, torch.device("cpu"))
    with fresh_cache():
        found = step(x, x, -(x * x))
    assert torch.equal(found.double(), x.double() ** 2 - (x * x).double())
    assert int(found.count_nonzero()) > 100


def test_a_code_object_of_its_own() -> None:
    def double(x: int) -> int:
        return 2 * x

    own = with_own_code(double)
    assert own(2) == 4 and own.__code__ is not double.__code__
