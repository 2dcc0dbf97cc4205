"""Peak memory of a training step above parameters and data, each method in a process of its own.

    python benchmarks/memory.py [--works cnn,mlp-depth-10] [--methods ...] [--out docs/results]

`fwdcompile.measure` says how the peak is counted. Gradients that an earlier step left do not count
as resident before. A run of some methods leaves what is known of the others.
"""

from __future__ import annotations

import gc
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from results import (
    DTYPES,
    conditions,
    entry_name,
    header,
    load,
    parser,
    prepare,
    refusal,
    refusals,
    replace,
    tables,
    with_ratio,
)
from steps import PEERS, RIVAL, STEPS
from works import DEPTHS, WORKS, Problem

from fwdcompile.measure import (
    ALLOCATOR,
    MIB,
    STEPS_EACH,
    cuda_peak,
    in_fresh_process,
    resident_peak,
)

# at batch 64 the parameters of an MLP are the most of its memory, at 1024 its activations weigh
RUNS: tuple[tuple[str, int], ...] = (
    *((f"mlp-depth-{depth}", batch) for batch in (64, 1024) for depth in DEPTHS),
    ("cnn", 64),
    ("resnet18", 32),
)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--at-once", type=int, default=1, help="processes beside each other")
    options.add_argument("--one", nargs=6, help="for the fresh process: measures here, one method")
    options = options.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    prepare(options.dtype)
    os.environ.update(ALLOCATOR)
    path = options.out / f"memory-{options.device}.json"
    runs = [(w, options.batch or WORKS[w].batch) for w in options.works or ()] or RUNS
    how = options.device, options.dtype, options.mode
    pool = ThreadPoolExecutor(options.at_once)
    cells = pool.map(fresh, ((w, m, str(b), *how) for w, b in runs for m in options.methods))
    for work, batch in runs:
        name = entry_name(work, batch, options.dtype, options.mode)
        known = load(path)["works"].get(name, {}).get("methods", {})
        entry = header(work, batch, options.dtype, options.device) | {"methods": known}
        for method in options.methods:
            entry["methods"][method] = cell = next(cells)
            print(work, batch, method, cell, flush=True)
        for cell in entry["methods"].values():
            rival = entry["methods"].get(RIVAL)
            if rival and "peak" in cell:
                cell["ratio"] = cell["peak"] / max(rival["peak"], 1)
        results = replace(path, name, entry)
        path.with_suffix(".md").write_text(page(results))


def fresh(of: tuple[str, ...]) -> dict[str, Any]:
    """`measure` in a new process."""
    found: dict[str, Any] = in_fresh_process(__file__, "--one", *of)
    return found


def measure(
    work: str, method: str, batch: str, device: str, dtype: str, mode: str
) -> dict[str, Any]:
    """Bytes of the peak, of the parameters and of the data; or the words of a peer's refusal."""
    if device == "cuda" and method == "jax-jvp":
        return {"refused": "torch's allocator does not count the memory of JAX"}
    prepare(dtype)
    problem = WORKS[work].problem(int(batch), torch.device(device), DTYPES[dtype], mode)
    parameters = sum(p.nbytes for p in problem.model.parameters())
    try:
        run = STEPS[method](problem)
        for _ in range(STEPS_EACH):
            run()
    except Exception as error:
        if method not in PEERS:
            raise
        return refusal(error)
    count = cuda_peak if device == "cuda" else resident_peak
    peak = count(run, lambda: forget(problem))
    return {"peak": peak, "parameters": parameters, "data": problem.x.nbytes + problem.y.nbytes}


def forget(problem: Problem) -> None:
    """Drops the gradients that backpropagation leaves behind a step."""
    problem.model.zero_grad(set_to_none=True)
    gc.collect()


def page(results: dict[str, Any]) -> str:
    """All of a results file as Markdown."""
    works = results["works"]
    sizes = ", ".join(
        f"{name} {max(c.get('parameters', 0) for c in entry['methods'].values()) / MIB:.1f}"
        for name, entry in works.items()
    )
    parts = tables("MiB above parameters and data (ratio to compiled backprop)", works, text)
    parts.append(f"Parameters, MiB: {sizes}\n")
    if lines := refusals(works):
        parts.append(f"Refused:\n\n{lines}")
    parts.append(f"{conditions(works)} Written by `make bench-memory`.\n")
    return "\n".join(parts)


def text(cell: dict[str, Any]) -> str:
    return with_ratio(f"{cell['peak'] / MIB:.1f}", cell)


if __name__ == "__main__":
    main()
