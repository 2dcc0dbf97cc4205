"""How long a program takes to make, against the number of layers.

    python benchmarks/capture.py [--layers 1,10,100] [--repeats 5] [--out docs/results]

Capture, transform, passes and printing of the forward gradient's program, without torch.compile;
medians after one run for warming up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import RESULTS, publish
from torch import Tensor, nn
from zoo_models import build

import fwdcompile
from fwdcompile.runner import environment

WIDTH = 16
LARGE = ("swin_v2_t", "maxvit_t")
Made = tuple[nn.Module, tuple[Tensor, ...]]


def mlp(layers: int) -> Made:
    """Linear layers with tanh between them."""
    parts = [part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*parts), (torch.randn(4, WIDTH),)


def convolutions(layers: int) -> Made:
    """3 x 3 convolutions, batch norm and relu."""
    parts = [
        part
        for _ in range(layers)
        for part in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    ]
    return nn.Sequential(*parts), (torch.randn(2, 4, 8, 8),)


def transformer(layers: int) -> Made:
    """Encoder layers of two heads."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return encoder, (torch.randn(2, 6, WIDTH),)


STACKS: dict[str, Callable[[int], Made]] = {
    "mlp": mlp,
    "convolutions": convolutions,
    "transformer": transformer,
}


def seconds(make: Callable[[], Made], repeats: int) -> dict[str, Any]:
    """The median time, and how many ops the generated program has."""
    times = []
    for _ in range(repeats + 1):
        model, inputs = make()
        names = [name for name, _ in model.named_parameters()]
        began = time.perf_counter()
        lowered = fwdcompile.transform(model).lower(*inputs, tangents=names)
        times.append(time.perf_counter() - began)
    ops = sum(n.op == "call_function" for n in list(lowered.stages.values())[-1].nodes)
    return {"seconds": statistics.median(times[1:]), "ops": ops}


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    stacks: dict[str, dict[str, Any]] = result["stacks"]
    heads = " | ".join(f"{name}, s | ops | ms an op" for name in stacks)
    lines = [f"| layers | {heads} |", "|---" * (3 * len(stacks) + 1) + "|"]
    for layers in next(iter(stacks.values())):
        cells = (_cells(stack[layers]) for stack in stacks.values())
        lines.append(f"| {layers} | {' | '.join(cells)} |")
    lines += ["", "| model | s | ops | ms an op |", "|---|---|---|---|"]
    lines += [f"| {name} | {_cells(entry)} |" for name, entry in result["models"].items()]
    machine = result["environment"]
    lines += [
        "",
        f"{machine['device']}, torch {machine['torch']}. Written by `make bench-capture`.",
    ]
    return "\n".join([*lines, ""])


def _cells(entry: dict[str, Any]) -> str:
    each = 1000 * entry["seconds"] / entry["ops"]
    return f"{entry['seconds']:.2f} | {entry['ops']:,} | {each:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="1,2,5,10,20,50,100,200")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", default=",".join(LARGE))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    counts = [int(n) for n in options.layers.split(",")]
    stacks = {
        name: {str(n): seconds(lambda s=stack, n=n: s(n), options.repeats) for n in counts}
        for name, stack in STACKS.items()
    }
    names = [name for name in options.models.split(",") if name]
    models = {name: seconds(lambda n=name: build(n), 1) for name in names}
    result = {
        "environment": environment(torch.device("cpu")),
        "stacks": stacks,
        "models": models,
    }
    publish(options.out, "capture-cpu", result, page(result))


if __name__ == "__main__":
    main()
