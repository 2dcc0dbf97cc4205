"""Time of a Laplacian, and of training on one: one program against the other ways there are.

    python benchmarks/laplacian.py [--fields "3 inputs"] [--pairs 24] [--out docs/results]

Everything runs in one process; ways take turns, and a ratio is the median over paired turns. A way
whose Laplacian is not that of autograd in float64, or whose gradient is not that of differences, is
not timed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from contest import CPU, Run, contest, milliseconds, run_under, seconds
from fields import FIELDS, OURS, WAYS, backward_twice, loss
from results import RESULTS, Cells, header, load, prepare, publish, table
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from fwdcompile.measure import timed

JAX = ("jax.hessian, jitted", "jax jet, jitted")
TASKS = {"evaluated": "u, its slopes and its Laplacian", "trained": "the gradient of their loss"}
WRONG = 1e-2


def start(way: str, model: nn.Module, x: Tensor, task: str) -> tuple[Run, float]:
    """One turn of a way, and the seconds of the first; the numbers of the first are checked."""
    if way in JAX:
        run = importlib.import_module("fields_jax").run_of(way, model, x, task == "trained")
        return run, timed(run, 1, CPU)
    derivatives, parameters = WAYS[way](model, x), list(model.parameters())

    @torch.no_grad()
    def evaluate() -> Any:
        return derivatives(x)

    def train() -> Any:
        return torch.autograd.grad(loss(derivatives(x)), parameters)

    run = train if task == "trained" else evaluate
    seconds = timed(run, 1, CPU)
    error = _slope_error(train(), model, x) if run is train else _error(evaluate()[2], model, x)
    if error > WRONG:
        what = "the gradient" if run is train else "the Laplacian"
        raise ArithmeticError(f"{what} is wrong by {error:.0%}")
    return run, seconds


def _error(found: Tensor, model: nn.Module, x: Tensor) -> float:
    """Of the Laplacian, relative to the largest."""
    with _in_float64(model):
        expected = backward_twice(model, x)(x.double())[2].detach()
    return float((found.detach() - expected).abs().max() / expected.abs().max())


def _slope_error(gradient: tuple[Tensor, ...], model: nn.Module, x: Tensor) -> float:
    """Of the slopes along the gradient's signs, one parameter after another, by differences.

    Autograd's Laplacian is right, its gradient is not over layer norm: no way is the oracle here.
    """

    def value(p: Tensor, move: Tensor) -> float:
        p += move
        return float(loss(backward_twice(model, x)(x.double())).detach())

    errors = []
    with _in_float64(model) as parameters, torch.no_grad():
        for p, g in zip(parameters, gradient, strict=True):
            step, slope = 1e-6 * g.sign(), float(g.double().abs().sum())
            difference = (value(p, step) - value(p, -2 * step)) / 2e-6
            p += step
            errors.append(abs(slope - difference) / slope)
    return max(errors)


@contextmanager
def _in_float64(model: nn.Module) -> Iterator[list[Tensor]]:
    model.double()
    yield list(model.parameters())
    model.float()


def measure(field: str, task: str, pairs: int, ways: list[str]) -> Cells:
    """Milliseconds, seconds of the first turn and the ratio to ours; or why there are none."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    gc.collect()
    model, x = FIELDS[field].make(), torch.randn(FIELDS[field].batch, FIELDS[field].inputs)
    starts = {way: lambda way=way: start(way, model, x, task) for way in ways}
    return contest(starts, OURS, JAX, pairs)


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    fields = result["works"]
    columns = {task: {name: entry[task] for name, entry in fields.items()} for task in TASKS}
    ways = [*WAYS, *JAX]
    cells = (("ms", milliseconds), ("seconds of the first", seconds))
    parts = [
        table(f"{what}, {unit}", columns[task], text, ways, "-")
        for unit, text in cells
        for task, what in TASKS.items()
    ]
    parts += [
        f"- {field}, {way}, {task}: `{cell['refused']}`"
        for field, entry in fields.items()
        for task in TASKS
        for way, cell in entry[task].items()
        if "refused" in cell
    ]
    sizes = ", ".join(f"{name} {entry['batch']}" for name, entry in fields.items())
    entry = next(iter(fields.values()))
    parts.append(
        f"\nIn brackets the ratio to `{OURS}`. Points: {sizes}. "
        + run_under(entry, "make bench-laplacian")
    )
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fields", default=",".join(FIELDS))
    parser.add_argument("--pairs", type=int, default=24, help="turns that each way takes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    prepare("float32")
    found = load(options.out / "laplacian-cpu.json")["works"]
    for field in options.fields.split(","):
        entry = header(field, FIELDS[field].batch, "float32", "cpu")
        with fresh_cache():  # so that the first turn finds nothing compiled
            tasks = {task: measure(field, task, options.pairs, [*WAYS, *JAX]) for task in TASKS}
        found[field] = entry | {"pairs": options.pairs} | tasks
        result = {"works": {name: found[name] for name in FIELDS if name in found}}
        publish(options.out, "laplacian-cpu", result, page(result))


if __name__ == "__main__":
    main()
