"""Operations of a step of each method, and how near its measured time is to the machine's limit.

    python benchmarks/counts.py [--out docs/results]

Counts the multiplications and additions of matrix products and convolutions (torch's own counter)
and measures how many a second the machine does in a large product. Their quotient is the least time
a step can take; the times beside it are read from step-cpu.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import RESULTS, THREADS, load
from steps import fgd
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from works import WORKS, Problem

from fwdcompile import Rademacher

COUNTED = ("logistic-regression", "mlp", "cnn", "mlp-depth-100", "resnet18")
SIDES, ROUNDS = (512, 1024, 2048), 100
METHODS = {
    "base": "base",
    "backprop": "backprop-compiled",
    "fgd dense": "fgd rademacher",
    "fgd rank-one": "fgd rank-one",
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=RESULTS)
    out = options.parse_args().out
    torch.set_num_threads(THREADS)
    peak = operations_a_second()
    times = load(out / "step-cpu.json")["works"]
    rows = {name: counted(name) for name in COUNTED}
    found = {"operations a second": peak, "works": rows}
    (out / "counts-cpu.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table(rows, peak, times)
    (out / "counts-cpu.md").write_text(text)
    print(text)


def operations_a_second() -> float:
    """Of the fastest of a few large matrix products."""
    rates = []
    for side in SIDES:
        a, b = torch.randn(side, side), torch.randn(side, side)
        for _ in range(ROUNDS):
            began = time.perf_counter()
            torch.mm(a, b)
            rates.append(2 * side**3 / (time.perf_counter() - began))
    return max(rates)


def counted(name: str) -> dict[str, float]:
    """Operations of one step of each method."""
    work = WORKS[name]

    def count(make: Callable[[Problem], Callable[[], Any]]) -> float:
        step = make(work.problem(work.batch, torch.device("cpu"), torch.float32))
        step()
        with FlopCounterMode(display=False) as counter:
            step()
        return float(counter.get_total_flops())

    rank_one = functools.partial(Rademacher, rank_one=True)
    return {
        "base": count(base),
        "backprop": count(backprop),
        "fgd dense": count(functools.partial(fgd, Rademacher, compile=False)),
        "fgd rank-one": count(functools.partial(fgd, rank_one, compile=False)),
    }


def base(problem: Problem) -> Callable[[], Any]:
    return lambda: torch.no_grad()(problem.model)(problem.x)


def backprop(problem: Problem) -> Callable[[], Any]:
    return lambda: cross_entropy(problem.model(problem.x), problem.y).backward()


def table(rows: dict[str, dict[str, float]], peak: float, times: dict[str, Any]) -> str:
    lines = ["| million operations; least ms; measured ms | " + " | ".join(METHODS) + " |"]
    lines.append("|---" * (1 + len(METHODS)) + "|")
    for name, counts in rows.items():
        cells = []
        for method, timed in METHODS.items():
            measured = times.get(name, {}).get("methods", {}).get(timed, {}).get("ms")
            told = f"{measured:.2f}" if measured is not None else "-"
            cells.append(f"{counts[method] / 1e6:.0f}; {1e3 * counts[method] / peak:.2f}; {told}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    rate = f"{peak / 1e9:.0f} thousand million operations a second"
    lines.append(f"The least ms are at {rate}, those of the fastest product of square matrices.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
