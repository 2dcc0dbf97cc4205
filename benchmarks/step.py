"""Time of a training step: forward gradients against backpropagation and torch.func.jvp.

    python benchmarks/step.py [--models mlp,cnn] [--out docs/results]

Everything runs in one process; methods take turns, and a ratio is the median over paired turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fwdcompile
from fwdcompile.data import import_torchvision
from fwdcompile.methods import METHODS, Config
from fwdcompile.models import MODELS
from fwdcompile.objective import Objective
from fwdcompile.runner import environment

BATCH, PAIRS, INNER = 64, 24, {"logistic-regression": 30, "mlp": 1, "cnn": 1}
RIVAL = "backprop-compiled"
STEPS: dict[str, tuple[str, Config]] = {
    "backprop": ("backprop", Config()),
    "backprop-compiled": ("backprop-compiled", Config()),
    "fgd rademacher": ("fgd", Config(directions="rademacher")),
    "fgd normal": ("fgd", Config(directions="normal")),
    "torch-jvp": ("torch-jvp", Config(directions="normal")),
    "torch-jvp-compiled": ("torch-jvp-compiled", Config(directions="normal")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    torch.set_num_threads(2)
    results = environment(torch.device("cpu")) | {
        "batch": BATCH,
        "load": os.getloadavg()[0],
        "allocator": {name: os.environ[name] for name in sorted(os.environ) if "MALLOC" in name},
        "models": {name: measure(name) for name in options.models.split(",")},
        "capture and transform, seconds": {n: lower(n) for n in ("resnet18", "densenet121")},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "step-cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (options.out / "step-cpu.md").write_text(text)
    print(text)


def measure(name: str) -> dict[str, Any]:
    """Median milliseconds of a step, ratios to compiled backpropagation, seconds to compile."""
    torch._dynamo.reset()
    # channels last: torch does not move a one-channel image there by itself, oneDNN is faster so
    x, y = torch.randn(BATCH, 28, 28, 1).permute(0, 3, 1, 2), torch.randint(10, (BATCH,))
    runs: dict[str, Callable[[], Any]] = {"base": base(name, x, y)}
    for label, (method, config) in STEPS.items():
        torch.manual_seed(0)
        step = METHODS[method](MODELS[name]((1, 28, 28), 10), config, 0)
        runs[label] = lambda step=step: step(x, y)
    compile_seconds = {label: timed(run, 1) for label, run in runs.items()}
    for run in runs.values():
        timed(run, 3)
    turns = {label: [] for label in runs}
    for _ in range(PAIRS):
        for label, run in runs.items():
            turns[label].append(timed(run, INNER[name]))
    return {
        label: {
            "ms": statistics.median(times) * 1e3,
            "ratio": statistics.median(a / b for a, b in zip(times, turns[RIVAL], strict=True)),
            "first step, seconds": compile_seconds[label],
        }
        for label, times in turns.items()
    }


def base(name: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Any]:
    """The base runtime of the paper's section 5.2: forward and loss, no derivative."""
    model: nn.Module = MODELS[name]((1, 28, 28), 10)
    run = torch.compile(lambda x, y: cross_entropy(model(x), y), fullgraph=True)
    return lambda: torch.no_grad()(run)(x, y)


def timed(run: Callable[[], Any], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


def lower(name: str) -> float:
    """Seconds of capture, transform and emission of a torchvision model, without compilation."""
    model = getattr(import_torchvision().models, name)()
    fwd = fwdcompile.transform(Objective(model, cross_entropy))
    inputs = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    return timed(lambda: fwd.lower(*inputs), 1)


def table(results: dict[str, Any]) -> str:
    rows = ["| ms a step (ratio to compiled backprop) | " + " | ".join(results["models"]) + " |"]
    rows.append("|---" * (1 + len(results["models"])) + "|")
    for label in ("base", *STEPS):
        cells = [results["models"][m][label] for m in results["models"]]
        texts = [f"{cell['ms']:.2f} ({cell['ratio']:.2f})" for cell in cells]
        rows.append(f"| {label} | " + " | ".join(texts) + " |")
    lowered = results["capture and transform, seconds"]
    rows += [
        "",
        "Capture and transform: " + ", ".join(f"{m} {s:.1f} s" for m, s in lowered.items()),
    ]
    rows += [
        "",
        f"{results['device']}, {results['threads']} threads, torch {results['torch']}, batch "
        f"{results['batch']}, float32, load average {results['load']:.1f} at the start; glibc "
        f"{'keeps' if results['allocator'] else 'returns'} freed memory, for all methods alike. "
        "Written by `make bench`.",
    ]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
