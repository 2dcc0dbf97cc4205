"""The demonstration: transform the paper's MLP, train it without backpropagation, compare.

python examples/demo.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.syntax import Syntax
from tqdm import tqdm

import fwdcompile
from fwdcompile.cli import table
from fwdcompile.data import load
from fwdcompile.models import mlp
from fwdcompile.objective import Objective
from fwdcompile.runner import Config, Runner, plot

OUT = Path("runs/demo")


def main() -> None:
    console = Console()
    data = load("digits")
    images, labels = data.train

    console.rule("the generated forward-mode program of the paper's MLP")
    model = mlp(images.shape[1:], data.classes)
    forward = fwdcompile.transform(Objective(model, torch.nn.functional.cross_entropy))
    forward.lower(images[:64], labels[:64])
    body = forward.code.split("):\n", 1)[1].split("# What the arguments")[0].rstrip()
    console.print(Syntax(body, "python", background_color="default"))

    console.rule("training: forward gradients against backpropagation")
    config = Config(
        methods=("fgd", "backprop", "backprop-compiled"),
        iterations=1500,
        lr=2e-3,
        directions="rademacher",
        every=50,
    )
    OUT.mkdir(parents=True, exist_ok=True)
    with tqdm(total=config.iterations * len(config.methods), unit="step") as bar:

        def progress(method: str) -> None:
            bar.set_description(method, refresh=False)
            bar.update()

        build = lambda: mlp(images.shape[1:], data.classes)  # noqa: E731
        report = Runner(build, data, config, log=OUT, progress=progress).run()
    console.print(table(report))
    plot(report, OUT / "demo.png", "digits, the paper's MLP, no backward pass in fgd")
    console.print(f"picture: {OUT / 'demo.png'}   log: {OUT / 'log.jsonl'}")


if __name__ == "__main__":
    main()
