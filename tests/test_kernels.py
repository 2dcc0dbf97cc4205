"""Kernels write over what they read last, and compute the same."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nets import Block
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils._ordered_set import OrderedSet

from fwdcompile import FGD, Rademacher
from fwdcompile.compiling import compiled_step
from fwdcompile.kernels import Nodes, StepKernels, late

CPU = torch.device("cpu")
WIDE = 48
BYTES = {"bool": 1, "int8": 1, "uint8": 1, "int32": 4, "int64": 8, "float32": 4, "float64": 8}
Function = Callable[..., tuple[Tensor, ...]]


class AsTheyAre(StepKernels):
    """Leaves the kernels, and the order in which they were fused."""

    def __call__(self, nodes: Nodes) -> Nodes:
        return nodes

    def uuid(self) -> bytes:
        return b"as they are"


def peak_bytes(code: str) -> int:
    """The most bytes of buffers that are alive at once in code that Inductor wrote."""
    sizes: dict[str, int] = {}
    peak = 0
    for line in code[code.index("def call(") :].splitlines():
        if made := re.search(r"(\w+) = empty_strided_cpu\(\(([\d, ]*)\), .*torch\.(\w+)\)", line):
            name, shape, dtype = made.groups()
            sizes[name] = BYTES[dtype]
            for size in filter(None, shape.replace(" ", "").split(",")):
                sizes[name] *= int(size)
        elif moved := re.search(r"(\w+) = .*; del (\w+)  # reuse", line):
            new, old = moved.groups()
            sizes[new] = sizes.pop(old, 0)
        elif gone := re.search(r"^ +del (\w+)$", line):
            sizes.pop(gone[1], None)
        peak = max(peak, sum(sizes.values()))
    return peak


def buffers_of(code: str) -> Counter[str]:
    """How often memory is taken for each shape."""
    return Counter(re.findall(r"empty_strided_cpu\(\(([\d, ]+?),?\)", code))


def stepped(function: Function) -> Function:
    """A function that also changes its weight in place, after all that reads it."""

    def step(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        results = function(x @ w, (x + 1) @ w)
        w.add_(results[0].mean())
        return results

    return step


def _shared(h: Tensor, h_dot: Tensor) -> tuple[Tensor, ...]:
    y, y_dot = h.sin(), h_dot * h.cos()
    return y @ y.mT, y_dot @ y.mT


def _one_needs_the_other(h: Tensor, h_dot: Tensor) -> tuple[Tensor, ...]:
    y = h.sin()
    z = y.as_strided(y.shape, y.stride()) * h
    return y @ y.mT, z @ z.mT, h_dot.sum()


def _read_later(h: Tensor, h_dot: Tensor) -> tuple[Tensor, ...]:
    y, y_dot = h.sin(), h_dot * h.cos()
    return y @ y.mT, y_dot @ y.mT, (h @ y.mT).sum()


def _returned(h: Tensor, h_dot: Tensor) -> tuple[Tensor, ...]:
    y, y_dot = h.sin(), h_dot * h.cos()
    return y @ y.mT, y_dot @ y.mT, h


def _turned(h: Tensor, h_dot: Tensor) -> tuple[Tensor, ...]:
    y, y_dot = h[:WIDE].mT.sin().contiguous(), h_dot[:WIDE] * h[:WIDE].cos()
    return y @ y.mT, y_dot @ y.mT


def _narrower(h: Tensor, h_dot: Tensor) -> tuple[Tensor, ...]:
    y, y_dot = h.sin().float(), h_dot * h.cos()
    return y @ y.mT, y_dot @ y_dot.mT


def _rows(h: Tensor, h_dot: Tensor) -> tuple[Tensor, ...]:
    y = torch.softmax(h, -1)
    y_dot = y * (h_dot - (y * h_dot).sum(-1, keepdim=True))
    return y @ y.mT, y_dot @ y.mT


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("function", "most"),
    [
        (_shared, 2),
        (_one_needs_the_other, 2),
        (_read_later, 3),
        (_returned, 3),
        (_turned, 2),
        (_narrower, 3),
        (_rows, 3),
    ],
)
def test_results_are_the_same(function: Function, most: int) -> None:
    """With at most so many buffers as wide as the product that is written over."""
    rows = WIDE + 3
    x, w = torch.randn(rows, 5, dtype=torch.float64), torch.randn(5, WIDE, dtype=torch.float64)
    step, mine, theirs = stepped(function), w.clone(), w.clone()
    with fresh_cache():
        results, (code,) = run_and_get_code(compiled_step(step, "default", False, CPU), x, mine)
    expected = step(x, theirs)
    digits = {"rtol": 1e-5, "atol": 1e-6} if function is _narrower else {}
    for result, other in zip((*results, mine), (*expected, theirs), strict=True):
        torch.testing.assert_close(result, other, **digits)
    assert buffers_of(code)[f"{rows}, {WIDE}"] <= most


@pytest.mark.compiled
def test_an_activation_and_its_tangent_are_written_over_what_they_are_computed_from() -> None:
    model = nn.Sequential(nn.Linear(6, WIDE), nn.GELU(), nn.Linear(WIDE, 3))
    twin = copy.deepcopy(model)
    x, y = torch.linspace(-1, 1, 30).view(5, 6), torch.tensor([0, 1, 2, 1, 0])
    settings: dict[str, Any] = {"lr": 0.1, "directions": Rademacher(rank_one=True)}
    with fresh_cache():
        loss, (code,) = run_and_get_code(FGD(model, cross_entropy, **settings).step, x, y)
    assert buffers_of(code)[f"5, {WIDE}"] == 2
    torch.testing.assert_close(loss, FGD(twin, cross_entropy, compile=False, **settings).step(x, y))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.compiled
def test_a_step_of_a_transformer_block_needs_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-1, 1, 80).view(2, 5, 8)
    peaks, weights = [], []
    for kernels in (StepKernels, AsTheyAre):
        monkeypatch.setattr("fwdcompile.kernels.StepKernels", kernels)
        torch.manual_seed(0)
        model = Block(8, 2)
        fgd = FGD(model, mse_loss, lr=0.1, directions=Rademacher(rank_one=True))
        with fresh_cache():
            _, (code,) = run_and_get_code(fgd.step, x, x)
        peaks.append(peak_bytes(code))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert peaks[0] < 0.8 * peaks[1]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.compiled
@pytest.mark.parametrize("function", [lambda x: x, lambda x: x.view(3, 1), torch.detach])
def test_a_step_without_kernels(function: Any) -> None:
    x = torch.ones(3)
    result = compiled_step(lambda x: function(x), "default", False, CPU)(x)
    torch.testing.assert_close(result, function(x))


class Planned:
    """A kernel as far as its memory goes: `makes` bytes, and reads what others make."""

    def __init__(self, name: str, makes: int, *reads: Planned) -> None:
        self.name = name
        self.mpi_buffer = SimpleNamespace(size_free=makes, succ_nodes=OrderedSet[Any]())
        self.mpi_node = SimpleNamespace(
            size=makes, succ_nodes=OrderedSet[Any](), pred_buffers=reads
        )
        for source in reads:
            source.mpi_buffer.succ_nodes.add(self)
            source.mpi_node.succ_nodes.add(self)


def test_what_takes_memory_comes_late_and_what_frees_some_does_not() -> None:
    first, second = Planned("first", 9), Planned("second", 9)
    small = Planned("small", 1, first)
    x = Planned("x", 2)
    y = Planned("y", 2, x, small)
    z = Planned("z", 2, y, second)
    nodes: Any = [first, second, small, x, y, z]
    assert [node.name for node in late(nodes)] == ["first", "small", "x", "y", "second", "z"]


@pytest.mark.parametrize(("device", "asked"), [("cpu", True), ("cuda", False)])
def test_kernels_of_a_gpu_are_left_to_inductor(
    device: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}
    monkeypatch.setattr(
        torch, "compile", lambda function, **given: options.update(given["options"])
    )
    compiled_step(lambda x: x, "default", False, torch.device(device))
    assert ("_post_fusion_custom_pass" in options) == asked
    assert ("reorder_for_peak_memory" in options) == asked


def test_the_cache_of_compiled_code_knows_the_pass() -> None:
    assert StepKernels().uuid() == StepKernels().uuid() != AsTheyAre().uuid()
