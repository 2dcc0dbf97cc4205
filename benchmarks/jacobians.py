"""Time of a Jacobian: all columns by forward mode, or all rows by reverse mode.

    python benchmarks/jacobians.py [--pairs 24] [--out docs/results]

Everything runs in one process; ways take turns, and a ratio is the median over paired turns. A way
of torch whose Jacobian is not that of autograd in float64 is not timed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from contest import CPU, Case, Contest, Run
from forces import Forces
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from works import WIDTH, Attention, Perceptron

import fwdcompile
from fwdcompile.measure import timed

OURS = "fwdcompile.jacfwd, compiled"
JAX = "jax.jacfwd, jitted"
WRONG = 1e-3


CASES = {
    "perceptron, 64 to 512": Case(
        lambda: nn.Sequential(
            nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 512)
        ),
        (1, 64),
    ),
    "convolutions, 256 to 1,024": Case(
        lambda: nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 4, 3, padding=1),
        ),
        (1, 1, 16, 16),
    ),
    "transformer block, 64 to 128": Case(
        lambda: nn.Sequential(
            nn.Linear(8, WIDTH), Attention(causal=False), Perceptron("tanh"), nn.Linear(WIDTH, 16)
        ),
        (1, 8, 8),
    ),
    "forces of 16 atoms, 48 to 48": Case(lambda: Forces(64), (16, 3)),
}
Function = Callable[[Tensor], Tensor]
WAYS: dict[str, Callable[[Function], Function]] = {
    OURS: lambda f: fwdcompile.jacfwd(f, compile=True),
    "fwdcompile.jacfwd, eager": fwdcompile.jacfwd,
    "torch.func.jacfwd, compiled": lambda f: torch.compile(torch.func.jacfwd(f)),
    "torch.func.jacfwd, eager": torch.func.jacfwd,
    "torch.func.jacrev, compiled": lambda f: torch.compile(torch.func.jacrev(f)),
}


def start(way: str, model: nn.Module, x: Tensor) -> tuple[Run, float]:
    """One turn of a way, and the seconds of the first, whose result is checked."""
    if way == JAX:
        peers = importlib.import_module("jacobians_jax")
        run = peers.run_of(model, x)
        return run, timed(run, 1, CPU)
    function = WAYS[way](model)

    @torch.no_grad()
    def run() -> Any:
        return function(x)

    first, expected = timed(run, 1, CPU), by_autograd(model, x)
    error = float((run() - expected).abs().max() / expected.abs().max())
    if error > WRONG:
        raise ArithmeticError(f"the Jacobian is wrong by {error:.0%}")
    return run, first


@functools.lru_cache(maxsize=1)
def by_autograd(model: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian by reverse mode, row by row in float64."""
    model.double()
    found: Tensor = jacobian(model, x.double())
    model.float()
    return found


CONTEST = Contest("Jacobian", "jacobians-cpu", "make bench-jacobians", CASES, [*WAYS], JAX, start)
page = CONTEST.page

if __name__ == "__main__":
    CONTEST.main(__doc__, pairs=24)
