"""A model on paper of the time of a step of many workers, and how near it is to what was measured.

    python benchmarks/scaling.py [--out docs/results]

Reads `distributed-cpu.json`, which `distributed.py` writes. docs/scaling.md has the formulas.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import RESULTS, publish

WORKERS = (8, 64, 1024)
LINKS = {"1 Gbit/s": 1e9 / 8, "100 Gbit/s": 100e9 / 8}
PARAMETERS = {"1 M": 1e6, "100 M": 1e8, "1 B": 1e9, "10 B": 1e10}
NUMBERS = 48  # bytes that a worker tells: six float64
METHODS = ("DistributedDataParallel", "fgd normal", "fgd rank-one")


@dataclass(frozen=True)
class Machine:
    """What a worker is: operations and bytes of memory a second, examples, seconds of a message."""

    operations: float = 100e12
    memory: float = 2e12
    examples: int = 4096
    latency: float = 20e-6


def sent(method: str, parameters: float, workers: int) -> float:
    """Bytes that a worker sends a step: a ring's all-reduce of float32, a ring's all-gather."""
    if method == METHODS[0]:
        return 2 * (workers - 1) / workers * 4 * parameters
    return (workers - 1) * NUMBERS


def computing(method: str, parameters: float, machine: Machine) -> tuple[float, float]:
    """Seconds of the forward run, and of what follows it in the same worker.

    A layer is one product forward and two backward; forward mode has three along a dense direction
    and two along an outer product. The update reads and writes every parameter.
    """
    product = 2 * parameters * machine.examples / machine.operations
    update = 2 * 4 * parameters / machine.memory
    products = {METHODS[0]: 1, METHODS[1]: 3, METHODS[2]: 2}[method]
    return products * product, update + (2 * product if method == METHODS[0] else 0.0)


def seconds(
    method: str, parameters: float, workers: int, link: float, machine: Machine | None = None
) -> float:
    """Of a step. What DistributedDataParallel sends hides behind the backward run, all that can."""
    machine = machine or Machine()
    forward, behind = computing(method, parameters, machine)
    hops = math.ceil(math.log2(workers)) * machine.latency
    travel = sent(method, parameters, workers) / link
    if method == METHODS[0]:
        return forward + max(behind, travel) + 2 * hops
    return forward + hops + travel + behind


def predictions() -> list[dict[str, Any]]:
    """An entry for each size of model, link and number of workers."""
    return [
        {
            "parameters": name,
            "link": link,
            "workers": workers,
            "seconds": {m: seconds(m, count, workers, LINKS[link]) for m in METHODS},
            "bytes": {m: sent(m, count, workers) for m in METHODS},
        }
        for name, count in PARAMETERS.items()
        for link in LINKS
        for workers in WORKERS
    ]


def checks(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured against the same formulas: work alone, and an exchange that hides or does not."""
    found = []
    for entry in (e for e in entries if e["workers"] > 1):
        ms, size, workers = entry["milliseconds"], entry["parameters"], entry["workers"]
        for method in METHODS:
            short, alone, exchange = (
                ("ddp", "backprop alone", "all-reduce alone")
                if method == METHODS[0]
                else (method, f"{method} alone", "gather alone")
            )
            found.append(
                {
                    "work": entry["work"],
                    "workers": workers,
                    "method": method,
                    "bytes": entry["bytes"][short],
                    "bytes predicted": sent(method, size, workers) + buffers(entry),
                    "ms": ms[short],
                    "ms predicted": ms[alone] + ms[exchange],
                }
            )
    return found


def buffers(entry: dict[str, Any]) -> float:
    """Those of batch norm, which worker 0 sends down a tree at each step of either method."""
    return math.ceil(math.log2(entry["workers"])) * float(entry["buffers"])


def page(result: dict[str, Any]) -> str:
    """Both tables."""
    rows = [f"| parameters | link | workers | {' | '.join(f'{m}, s' for m in METHODS)} |"]
    rows.append("|---" * (3 + len(METHODS)) + "|")
    for entry in result["predicted"]:
        times = " | ".join(f"{entry['seconds'][m]:.3g}" for m in METHODS)
        rows.append(f"| {entry['parameters']} | {entry['link']} | {entry['workers']} | {times} |")
    tests = ["| work | workers | method | bytes | predicted | ms | predicted |", "|---" * 7 + "|"]
    for check in result["checked"]:
        cells = [f"{check['bytes']:,.0f}", f"{check['bytes predicted']:,.0f}"]
        cells += [f"{check['ms']:.1f}", f"{check['ms predicted']:.1f}"]
        name = [check["work"], str(check["workers"]), check["method"]]
        tests.append(f"| {' | '.join(name + cells)} |")
    return PAGE.format(predicted="\n".join(rows), checked="\n".join(tests))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=RESULTS)
    out = options.parse_args().out
    measured = json.loads((out / "distributed-cpu.json").read_text())
    result = {"predicted": predictions(), "checked": checks(measured["entries"])}
    publish(out, "scaling", result, page(result))


PAGE = """# A step of many workers, on paper

Seconds of a step by the formulas of docs/scaling.md: 4,096 examples a worker, 100 T operations and
2 TB of memory a second, 20 us a message.

{predicted}

The same formulas at a small scale, where work without an exchange and exchanges alone are measured
(docs/results/distributed-cpu.md): their sum beside the step. DistributedDataParallel can hide what
it sends behind the backward run, and then is faster than the sum. Bytes of gloo's own messages,
some 290 a message, are not in the prediction.

{checked}

Written by `python benchmarks/scaling.py`.
"""


if __name__ == "__main__":
    main()
