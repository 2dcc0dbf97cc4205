"""Time of one jvp along a model's input, from call to result.

    python benchmarks/jvps.py [--pairs 100] [--out docs/results]

Everything runs in one process; ways take turns, and a ratio is the median over paired turns. A way
whose tangent is not that of central differences in float64 is not timed.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contest import CPU, Run, contest, milliseconds, run_under, seconds
from jacobians import Case
from results import RESULTS, header, prepare, publish, refusals, table
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
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


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    works = result["works"]
    columns = {name: entry["methods"] for name, entry in works.items()}
    ways = [*WAYS, JAX]
    return "\n".join(
        (
            table("One jvp, ms", columns, milliseconds, ways, "-"),
            table("One jvp, seconds of the first", columns, seconds, ways, "-"),
            refusals(works),
            f"In brackets the ratio to `{OURS}`. "
            + run_under(next(iter(works.values())), "make bench-jvps"),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100, help="turns that each way takes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    prepare("float32")
    works: dict[str, Any] = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = case.make().requires_grad_(False)
        pair = torch.randn(case.shape), torch.randn(case.shape)
        entry = header(name, case.shape[0], "float32", "cpu") | {"pairs": options.pairs}
        starts = {
            way: lambda way=way, model=model, pair=pair: start(way, model, *pair)
            for way in (*WAYS, JAX)
        }
        with fresh_cache():  # so that the first turn finds nothing compiled
            works[name] = entry | {"methods": contest(starts, OURS, (JAX,), options.pairs)}
    result = {"works": works}
    publish(options.out, "jvps-cpu", result, page(result))


if __name__ == "__main__":
    main()
