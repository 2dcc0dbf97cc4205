from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Mlp, Tied
from torch import Tensor
from torch._inductor import compile_fx
from torch._inductor.utils import fresh_cache
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

from fwdcompile import FGD, ForwardGradient, Normal, Rademacher
from fwdcompile.compiling import replays, with_own_code
from fwdcompile.distributed import DistributedFGD

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


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize(("steps", "settings"), STEPS)
def test_results_outlast_the_next_run_of_a_cuda_graph(
    steps: Callable[..., list[Tensor]],
    settings: dict[str, Any],
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    expected = steps(compile=False, **settings)
    monkeypatch.setattr(torch, "compile", as_graph)
    torch.manual_seed(0)
    found = steps(compile=True, mode=mode, **settings)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_modes_that_record_cuda_graphs() -> None:
    assert replays("reduce-overhead") and replays("max-autotune")
    assert not replays("default") and not replays("max-autotune-no-cudagraphs")


@pytest.mark.compiled
@pytest.mark.parametrize("made", [FGD, ForwardGradient])
def test_all_that_a_step_writes_stays_in_place(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs refuse to write to what they were not told to keep."""
    asked, seen = compile_fx.compile_fx, []

    def inner(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch._guards.TracingContext.get().fw_metadata)
        return compile_fx.compile_fx_inner(*args, **kwargs)

    def watched(*args: Any, **kwargs: Any) -> Any:
        return asked(*args, **({"inner_compile": inner} | kwargs))

    monkeypatch.setattr(compile_fx, "compile_fx", watched)
    settings = {"lr": 0.1} if made is FGD else {}
    step = made(Tied(), cross_entropy, mode="reduce-overhead", **settings)
    tokens = torch.tensor([0, 1, 2, 3])
    with fresh_cache():
        step.step(tokens, tokens) if made is FGD else step(tokens, tokens)
    (known,) = seen
    written = {i for i, info in enumerate(known.input_info) if info.mutates_data}
    assert written and written <= set(known.static_input_indices)


def test_a_code_object_of_its_own() -> None:
    def double(x: int) -> int:
        return 2 * x

    own = with_own_code(double)
    assert own(2) == 4 and own.__code__ is not double.__code__
