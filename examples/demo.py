"""The demonstration: transform the paper's MLP, train it without backpropagation, compare.

python examples/demo.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from torch import nn
from torch.nn.functional import cross_entropy

import fwdcompile
from fwdcompile.cli import compare, table
from fwdcompile.config import Config
from fwdcompile.data import load
from fwdcompile.models import mlp
from fwdcompile.objective import Objective
from fwdcompile.report import plot

OUT = Path("runs/demo")
# One rate for all, as in the paper; swept on fgd alone, so it is not backprop's best.
CONFIG = Config(
    methods=("fgd", "backprop", "backprop-compiled"),
    iterations=2500,
    lr=1e-3,
    decay=5e-4,
    directions="rademacher",
    every=100,
)


def main() -> None:
    console = Console()
    data = load("digits")

    def build() -> nn.Module:
        return mlp(data.shape, data.classes)

    console.rule("the forward-mode program that fwdcompile writes for the paper's MLP")
    forward = fwdcompile.transform(Objective(build(), cross_entropy))
    images, labels = data.train
    forward.lower(images[: CONFIG.batch], labels[: CONFIG.batch])
    console.print(Syntax(layers(forward.code), "python", background_color="default"))

    console.rule("training: forward gradients against backpropagation")
    report = compare(build, data, CONFIG, OUT)
    console.print(table(report))
    plot(report, OUT / "demo.png", "the paper's MLP on digits: fgd has no backward pass")
    console.print("One learning rate, chosen on fgd alone: losses and Tf/Tb rank no method.")
    console.print(f"picture: {OUT / 'demo.png'}   log: {OUT / 'log.jsonl'}")


def layers(code: str, count: int = 26) -> str:
    """The first lines of the generated function's body."""
    body = code.split("):\n", 1)[1].split("# What the arguments")[0].rstrip()
    lines = textwrap.dedent(body).splitlines()
    return "\n".join([*lines[:count], f"# ... and {len(lines) - count} lines more"])


if __name__ == "__main__":
    main()
