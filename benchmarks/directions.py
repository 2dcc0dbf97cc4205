"""How fast directions are drawn: compiled normals and signs against eager torch.randn.

    python benchmarks/directions.py [--device cuda] [--out docs/results]

All three write into the same tensor, so that the allocator is in none of the times. Each round
times them one after another; a ratio is the median of the rounds' own ratios. Batches of rounds
are run until the ratios of two batches agree. Agreement does not make up for a busy machine: read
the result only where the load average before the run, which it records, is well under one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fwdcompile.compiling import compiled_step
from fwdcompile.costs import device_name
from fwdcompile.directions import Directions, Normal, Rademacher
from fwdcompile.measure import timed
from fwdcompile.words import stream_keys

COUNT = 1_860_000
THREADS = 2
AGREEMENT = 0.1


def compiled_draw(directions: Directions, out: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """One graph from (seed, step) to `out`, the key included, compiled as a step is."""

    def fill(seed: Tensor, step: Tensor) -> Tensor:
        key = stream_keys(seed, step)[0, 0]
        return out.copy_(directions.draw(out.shape, key=key, dtype=out.dtype))

    return compiled_step(fill, "default", False, torch.device("cpu"))


def batch(
    actions: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Median milliseconds and median paired speed-up over the first action, by name."""
    # a GPU works behind the clock: many draws, and one wait for it
    draws = 1 if device.type == "cpu" else 100
    times = [
        {name: timed(run, draws, device) for name, run in actions.items()} for _ in range(rounds)
    ]
    base = next(iter(actions))
    return {
        name: {
            "ms": 1e3 * statistics.median(row[name] for row in times),
            "speedup": statistics.median(row[base] / row[name] for row in times),
        }
        for name in actions
    }


def agree(a: dict[str, dict[str, float]], b: dict[str, dict[str, float]]) -> bool:
    return all(abs(a[k]["speedup"] / b[k]["speedup"] - 1) <= AGREEMENT for k in a)


def measure(rounds: int, batches: int, device: torch.device) -> dict[str, object]:
    """The last batch's medians, whether it agreed with the one before, and every batch's ratios."""
    load = os.getloadavg()[0]
    torch.set_num_threads(THREADS)
    out = torch.empty(COUNT, device=device)
    seed, step = torch.tensor(0, device=device), torch.tensor(0, device=device)
    normal, signs = compiled_draw(Normal(), out), compiled_draw(Rademacher(), out)
    actions: dict[str, Callable[[], object]] = {
        "torch.randn eager": lambda: torch.randn(COUNT, out=out, device=device),
        "Normal compiled": lambda: normal(seed, step),
        "Rademacher compiled": lambda: signs(seed, step),
    }
    batch(actions, 5, device)
    done = [batch(actions, rounds, device)]
    stable = False
    while len(done) < batches and not stable:
        done.append(batch(actions, rounds, device))
        stable = agree(done[-2], done[-1])
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": THREADS,
        "load average before": load,
        "numbers": COUNT,
        "dtype": str(out.dtype),
        "rounds": rounds,
        "stable": stable,
        "median": done[-1],
        "speedups of all batches": [{k: v["speedup"] for k, v in each.items()} for each in done],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="paired rounds a batch")
    parser.add_argument("--batches", type=int, default=12, help="the most batches to run")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    result = measure(args.rounds, args.batches, torch.device(args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2)
    (args.out / f"directions-{args.device}.json").write_text(text + "\n")
    print(text)
    return 0 if result["stable"] else 1


if __name__ == "__main__":
    sys.exit(main())
