"""Bytes and time of a training step of many workers, against DistributedDataParallel.

    python benchmarks/distributed.py [--works mlp,resnet18] [--sizes 1,2,4] [--out docs/results]

Every worker has a batch of its own of the same size. Bytes are those that the process of a worker
writes, as the kernel counts them, gloo's own messages included. The same steps without an exchange,
run by all workers at once, and the exchanges alone tell how much of the time is sent; `scaling.py`
makes a model of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from results import RESULTS, publish
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from works import WORKS

from fwdcompile import FGD, Normal, Rademacher
from fwdcompile.distributed import DistributedFGD
from fwdcompile.measure import bytes_written, ratio, take_turns
from fwdcompile.runner import environment
from fwdcompile.workers import Workers, joined

LR = 1e-6
PAIRS = 20
COUNTED = 5
# The examples of a worker. Four processes compiling resnet18 would take the machine for an hour
BATCH = {"mlp": 32, "resnet18": 8}
COMPILED = {"mlp": True, "resnet18": False}
EXCHANGES = ("all-reduce alone", "gather alone")
SOURCES = {"fgd normal": Normal(), "fgd rank-one": Rademacher(rank_one=True)}
Run = Callable[[], Any]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--works", default="mlp,resnet18")
    options.add_argument("--sizes", default="1,2,4")
    options.add_argument("--out", type=Path, default=RESULTS)
    options.add_argument("--worker", nargs=2, help="for a worker: work, file of the result")
    chosen = options.parse_args()
    if chosen.worker:
        with joined("cpu"):
            worker(chosen.worker[0], Path(chosen.worker[1]))
        return
    entries = [
        started(work, int(size))
        for work in chosen.works.split(",")
        for size in chosen.sizes.split(",")
    ]
    result = {"environment": environment(torch.device("cpu")), "entries": entries}
    publish(chosen.out, "distributed-cpu", result, page(result))


def started(work: str, size: int) -> dict[str, Any]:
    """What worker 0 of some number of processes found."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        command += [__file__, "--worker", work, str(found)]
        subprocess.run([sys.executable, "-m", *command], check=True)
        return json.loads(found.read_text()) | {"load": load}


def worker(work: str, path: Path) -> None:
    """Measures all methods in turn, in step with the other workers."""
    torch.set_num_threads(1)
    made = runs(work)
    turns = take_turns(made, 1, torch.device("cpu"), PAIRS)
    sent = {method: bytes_written(run, COUNTED) for method, run in made.items()}
    if Workers().rank == 0:
        problem = WORKS[work].problem(BATCH[work], torch.device("cpu"), torch.float32)
        entry = {
            "work": work,
            "workers": Workers().size,
            "batch": BATCH[work],
            "compiled": COMPILED[work],
            "parameters": sum(p.numel() for p in problem.model.parameters()),
            "buffers": sum(b.nbytes for b in problem.model.buffers()),
            "milliseconds": {m: 1e3 * statistics.median(turns[m]) for m in turns},
            "ratio": {m: ratio(turns, m, "ddp") for m in turns},
            "bytes": sent,
        }
        path.write_text(json.dumps(entry))


def runs(work: str) -> dict[str, Run]:
    """One step of each method, those that exchange nothing, and the exchanges alone."""
    several, compiled = Workers().size > 1, COMPILED[work]

    def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
        made = WORKS[work].problem(BATCH[work], torch.device("cpu"), torch.float32)
        return made.model, made.x, made.y

    def backprop(shared: bool) -> Run:
        model, x, y = problem()
        net: nn.Module = DistributedDataParallel(model) if shared else model
        net = torch.compile(net, dynamic=False) if compiled else net
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()

        return step

    def fgd(source: Any, shared: bool) -> Run:
        model, x, y = problem()
        options: dict[str, Any] = {"lr": LR, "directions": source, "compile": compiled}
        if shared:
            step = DistributedFGD(model, cross_entropy, check_every=10**9, **options).step
        else:
            step = FGD(model, cross_entropy, store_directions=False, **options).step
        return lambda: step(x, y)

    made: dict[str, Run] = {"ddp": backprop(shared=several), "backprop alone": backprop(False)}
    for name, source in SOURCES.items():
        made[name] = fgd(source, shared=True)
        made[f"{name} alone"] = fgd(source, shared=False)
    count = sum(p.numel() for p in problem()[0].parameters())
    gradient, numbers = torch.zeros(count), torch.zeros(6, dtype=torch.float64)
    if several:
        made["all-reduce alone"] = lambda: dist.all_reduce(gradient)
        made["gather alone"] = lambda: Workers().gather(numbers)
    return made


def page(result: dict[str, Any]) -> str:
    """Bytes and times by work and number of workers."""
    rows = [
        "| work | workers | method | bytes a step | ms a step | without exchange | of DDP's |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in result["entries"]:
        for method in ("ddp", *SOURCES):
            base = "backprop alone" if method == "ddp" else f"{method} alone"
            cells = [
                f"{entry['work']}, {entry['parameters']:,} parameters",
                str(entry["workers"]),
                "DistributedDataParallel" if method == "ddp" else method,
                f"{entry['bytes'][method]:,.0f}",
                f"{entry['milliseconds'][method]:.2f}",
                f"{entry['milliseconds'][base]:.2f}",
                f"{entry['ratio'][method]:.2f}",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    machine = result["environment"]
    return PAGE.format(rows="\n".join(rows), notes=notes(result["entries"]), **machine)


def notes(entries: Sequence[dict[str, Any]]) -> str:
    batches = {e["work"]: f"{e['work']} {e['batch']}" for e in entries}
    eager = sorted({e["work"] for e in entries if not e["compiled"]})
    loads = [e["load"] for e in entries]
    return (
        f"examples of a worker: {', '.join(batches.values())}; not compiled: "
        f"{', '.join(eager) or 'none'}; load average {min(loads):.1f} to {max(loads):.1f}"
    )


PAGE = """# Many workers: bytes and time of a step

{rows}

{device}, torch {torch}, gloo on one machine, one thread a worker; {notes}. Bytes that worker 0's
process wrote, as the kernel counts them; DistributedFGD with batch norm sends the buffers, as
DistributedDataParallel does. "Without exchange" is the same step where every worker keeps to
itself, all at once. Medians of 20 turns. Written by `python benchmarks/distributed.py`.
"""


if __name__ == "__main__":
    main()
