"""Time of a training step: forward gradients against backpropagation and forward-mode peers.

    python benchmarks/step.py [--works mlp,cnn] [--methods ...] [--pairs 24] [--out docs/results]

Everything runs in one process; methods take turns, and a ratio is the median over paired turns.
A run of some works replaces their entries in the results file and leaves the others.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import (
    DTYPES,
    Cells,
    conditions,
    entry_name,
    header,
    load,
    parser,
    prepare,
    refusal,
    refusals,
    replace,
    save,
    tables,
    with_ratio,
)
from steps import PEERS, RIVAL, STEPS, Run
from torch._inductor.utils import fresh_cache
from torch.nn.functional import cross_entropy
from works import WORKS, Work

import fwdcompile
from fwdcompile.data import import_torchvision
from fwdcompile.measure import ratio, take_turns, timed
from fwdcompile.objective import Objective

# threads of one framework spin a while after their last work, beside those of the next
PAUSE = 0.02
ON_GPU = 5
COMPILED = "all methods are compiled"
CAPTURED = "capture and transform, seconds"
COMPILED_PEERS, JAX = ("torch-jvp-compiled", "torch-jvp-randn-compiled"), "jax-jvp"
RATIOS = ("fgd normal", "fgd rank-one")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=24, help="turns that each method takes")
    options.add_argument("--capture", action="store_true", help="with --works, times that too")
    options.add_argument("--turns", type=Path, help="file that runs beside this one share")
    options = options.parse_args()
    prepare(options.dtype)
    path = options.out / f"step-{options.device}.json"
    # seconds of the first step shall find nothing that an earlier run compiled
    with fresh_cache():
        torch.compile(lambda x: x + 1)(torch.ones(2, device=options.device))
        run_works(options, path)
    if options.capture or options.works is None:
        results = load(path) | {CAPTURED: {n: lower(n) for n in ("resnet18", "densenet121")}}
        save(path, results)
        path.with_suffix(".md").write_text(page(results))


def run_works(options: argparse.Namespace, path: Path) -> None:
    """Measures one work after another and writes the files after each."""
    for work in options.works or WORKS:
        batch = options.batch or WORKS[work].batch
        entry = header(work, batch, options.dtype, options.device) | {"pairs": options.pairs}
        name = entry_name(work, batch, options.dtype, options.mode)
        with Turns(options.turns) as turns:
            entry["methods"] = measure(
                WORKS[work],
                options.methods,
                batch,
                torch.device(options.device),
                DTYPES[options.dtype],
                options.mode,
                options.pairs,
                turns.alone,
            )
            path.with_suffix(".md").write_text(page(replace(path, name, entry)))
        print(page({"works": {name: entry}}), flush=True)


class Turns:
    """Several runs on one machine: all compile beside each other, then one after another is timed.

    Compilation holds the file's lock together with others, timing and writing results alone: no
    clock starts before the last compilation has ended.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a") if path else None

    def __enter__(self) -> Turns:
        self._lock(fcntl.LOCK_SH)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def alone(self) -> None:
        """Waits until no other run compiles or is timed."""
        print(COMPILED, flush=True)
        self._lock(fcntl.LOCK_UN)
        self._lock(fcntl.LOCK_EX)

    def _lock(self, operation: int) -> None:
        if self._file:
            fcntl.flock(self._file, operation)


def measure(
    work: Work,
    methods: list[str],
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    mode: str,
    pairs: int,
    alone: Callable[[], object] = lambda: None,
) -> Cells:
    """Milliseconds of a step, ratios to rivals, seconds of the first step; or who refused.

    JAX takes turns with few, and comes last on the CPU: its threads there spin on and would disturb
    all others. `alone` is called when the others are compiled, before a clock starts.
    """
    # a GPU works behind the clock: several steps, and one wait for it
    inner = work.inner if device.type == "cpu" else max(work.inner, ON_GPU)
    runs: dict[str, Run] = {}
    first: dict[str, float] = {}
    refused: Cells = {}

    def start(method: str) -> None:
        try:
            runs[method] = STEPS[method](work.problem(batch, device, dtype, mode))
            first[method] = timed(runs[method], 1, device)
        except Exception as error:
            if method not in PEERS:
                raise
            runs.pop(method, None)
            refused[method] = refusal(error)

    spinning = JAX if device.type == "cpu" else None
    for method in methods:
        if method != spinning:
            start(method)
    alone()
    others = {m: run for m, run in runs.items() if m != JAX}
    turns = take_turns(others, inner, device, pairs)
    cells = {method: summary(turns, method, first[method]) for method in others}
    if spinning in methods:
        start(JAX)
    if JAX in runs:
        against = {m: runs[m] for m in (JAX, RIVAL, *RATIOS) if m in runs}
        turns = take_turns(against, inner, device, pairs, PAUSE)
        cells[JAX] = summary(turns, JAX, first[JAX])
        for method in set(RATIOS) & set(runs):
            cells[method][f"ratio to {JAX}"] = ratio(turns, method, JAX)
    runs.clear()
    torch._dynamo.reset()
    gc.collect()
    return {m: refused.get(m) or cells[m] for m in methods}


def summary(turns: dict[str, list[float]], method: str, first: float) -> dict[str, float]:
    """Medians of the turns of one method; ratios to whom else took part."""
    cell = {"ms": statistics.median(turns[method]) * 1e3, "first step, seconds": first}
    for other, key in ((RIVAL, "ratio"), *((peer, f"ratio to {peer}") for peer in COMPILED_PEERS)):
        if other in turns:
            cell[key] = ratio(turns, method, other)
    return cell


def lower(name: str) -> float:
    """Seconds of capture, transform and emission of a torchvision model, without compilation."""
    model = getattr(import_torchvision().models, name)()
    fwd = fwdcompile.transform(Objective(model, cross_entropy))
    inputs = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    return timed(lambda: fwd.lower(*inputs), 1, torch.device("cpu"))


def page(results: dict[str, Any]) -> str:
    """All of a results file as Markdown: times, the first steps, the other ratios, refusals."""
    works = results["works"]
    parts = tables("ms a step (ratio to compiled backprop)", works, time_text)
    for method, other in itertools.product(RATIOS, (*COMPILED_PEERS, JAX)):
        cells = {n: e["methods"].get(method, {}) for n, e in works.items()}
        ratios = {n: cell.get(f"ratio to {other}") for n, cell in cells.items()}
        texts = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio is not None]
        if texts:
            parts.append(f"Ratio of {method} to {other}: {', '.join(texts)}\n")
    parts += tables("seconds of the first step", works, lambda c: f"{c['first step, seconds']:.1f}")
    if CAPTURED in results:
        lowered = ", ".join(f"{name} {s:.1f} s" for name, s in results[CAPTURED].items())
        parts.append(f"Capture and transform: {lowered}\n")
    if lines := refusals(works):
        parts.append(f"Refused:\n\n{lines}")
    kept = all(entry["allocator"] for entry in works.values())
    parts.append(
        f"{conditions(works)} glibc {'keeps' if kept else 'returns'} freed memory, for all "
        "methods alike. Written by `make bench`.\n"
    )
    return "\n".join(parts)


def time_text(cell: dict[str, Any]) -> str:
    return with_ratio(f"{cell['ms']:.2f}", cell)


if __name__ == "__main__":
    main()
