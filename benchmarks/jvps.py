"""Time of one jvp along a model's input, from call to result.

    python benchmarks/jvps.py [--pairs 100] [--out docs/results]

Everything runs in one process; ways take turns, and a ratio is the median over paired turns. A way
whose tangent is not that of central differences in float64 is not timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from contest import CPU, Case, Contest, Run
from torch import Tensor, nn
from torch.autograd import forward_ad
from works import WIDTH, Attention, Perceptron

import fwdcompile
from fwdcompile.measure import timed

OURS = "fwdcompile.transform, compiled"
JAX = "jax.jvp, jitted"
ALONE = "the model alone, compiled"
WRONG, STEP = 1e-3, 1e-5

CASES = {
    "field of 3 inputs, batch 64": Case(
        lambda: nn.Sequential(
            nn.Linear(3, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1)
        ),
        (64, 3),
    ),
    "perceptron of width 1,024, batch 64": Case(
        lambda: nn.Sequential(
            nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 10)
        ),
        (64, 1024),
    ),
    "convolutions, 8 of 32 by 32": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 8, 3, padding=1),
        ),
        (8, 3, 32, 32),
    ),
    "transformer block, 4 of 64": Case(
        lambda: nn.Sequential(Attention(causal=False), Perceptron("tanh")), (4, 64, WIDTH)
    ),
}
Way = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def compiled(model: nn.Module) -> Way:
    fwd = fwdcompile.transform(model, compile=True)
    return lambda x, v: fwd(x, tangents={"input": v})


def dual(model: nn.Module) -> Way:
    def run(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, v)))

    return run


def alone(model: nn.Module) -> Way:
    function = torch.compile(model)
    return lambda x, v: (function(x), v)


WAYS: dict[str, Callable[[nn.Module], Way]] = {
    OURS: compiled,
    "fwdcompile.jvp, eager": lambda m: lambda x, v: fwdcompile.jvp(m, (x,), (v,)),
    "torch.func.jvp, compiled": lambda m: torch.compile(lambda x, v: torch.func.jvp(m, (x,), (v,))),
    "torch.func.jvp, eager": lambda m: lambda x, v: torch.func.jvp(m, (x,), (v,)),
    "torch.autograd.forward_ad, eager": dual,
    ALONE: alone,
}


def start(way: str, model: nn.Module, x: Tensor, v: Tensor) -> tuple[Run, float]:
    """One turn of a way, and the seconds of the first, whose result is checked."""
    if way == JAX:
        run = importlib.import_module("jacobians_jax").jvp_of(model, x, v)
        return run, timed(run, 1, CPU)
    function = WAYS[way](model)

    @torch.no_grad()
    def run() -> Any:
        return function(x, v)

    first = timed(run, 1, CPU)
    expected = by_differences(model, x, v)
    error = 0 if way == ALONE else (run()[1] - expected).abs().max() / expected.abs().max()
    if error > WRONG:
        raise ArithmeticError(f"the tangent is wrong by {float(error):.0%}")
    return run, first


@torch.no_grad()
def by_differences(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """The tangent by central differences in float64."""
    model.double()
    above, below = (model(x.double() + h * v.double()) for h in (STEP, -STEP))
    model.float()
    return (above - below) / (2 * STEP)


CONTEST = Contest("One jvp", "jvps-cpu", "make bench-jvps", CASES, [*WAYS], JAX, start, 2)
page = CONTEST.page

if __name__ == "__main__":
    CONTEST.main(__doc__, pairs=100)
