"""Weights, activations or one layer at a time perturbed: the paper's MLP without a backward pass.

    python examples/activity.py --data-root DIR          # MNIST
    python examples/activity.py --data synthetic-grey --runs 5
    python examples/activity.py --data-root DIR --times  # times of a step anew, on a quiet machine

Each method trains for 20 epochs by Adam in batches of 128 on centred images, at the rate that the
same search finds for it on held-out training images; the rate decays to a hundredth. Directions are
signs; those of weights are rank-one. Layer by layer, the first layer has one direction, the second
16 and the logits 10: later layers cost little. Ren et al. (2023) report test errors on MNIST of
2.66 % for backpropagation, 9.25 % for weights and 3.24 % for activations perturbed.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import figures
import torch
from figures import Line, machine
from mnist import arguments, time_again
from torch import Tensor, nn
from tuning import bare, tuned

from fwdcompile.cli import compare
from fwdcompile.config import Config
from fwdcompile.data import Dataset, batches, load
from fwdcompile.methods import METHODS, estimator, losses
from fwdcompile.models import mlp
from fwdcompile.report import Report

ACTIVATIONS = "fgd:perturb=activations"
LABELS = {
    "backprop-compiled": "backpropagation",
    "fgd": "weights",
    ACTIVATIONS: "activations",
    f"{ACTIVATIONS}:samples=16": "activations, K = 16",
    f"{ACTIVATIONS}:samples=1/16/10": "layer by layer",
}
RATES = (3e-4, 1e-3, 3e-3)
BATCH, DRAWS, SEARCH = 128, 10, 200


def config_for(data: Dataset, epochs: int, runs: int, compile: bool) -> Config:
    """Of all methods; the rates are to be found."""
    epoch = math.ceil(len(data.train[1]) / BATCH)
    return Config(
        methods=("backprop",),
        iterations=epochs * epoch,
        batch=BATCH,
        decay=math.log(100) / (epochs * epoch),
        runs=runs,
        directions="rademacher",
        rank_one=True,
        optimizer="adam",
        every=epoch,
        compile=compile,
    )


def noise(model: nn.Module, method: str, config: Config, x: Tensor, y: Tensor) -> float:
    """E |g - grad f|^2 / |grad f|^2 of an estimate g, the mean of a few draws."""
    parameters = list(model.parameters())
    true = torch.cat([g.flatten() for g in torch.autograd.grad(losses(model(x), y), parameters)])
    _, own = config.of(method)
    gradient = estimator(model, replace(own, compile=False), config.seed)
    total = 0.0
    for _ in range(DRAWS):
        model.zero_grad()
        gradient(x, y)
        mine = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        total += float((mine - true).square().sum())
    model.zero_grad()
    return total / DRAWS / float(true.square().sum())


def noises(build: Callable[[], nn.Module], data: Dataset, config: Config) -> list[Line]:
    """The noise of all estimates, at the start and after an epoch of backpropagation."""
    torch.manual_seed(config.seed)
    model = build()
    step = METHODS["backprop"](model, replace(config, lr=1e-3), config.seed)
    stream = batches(data.train, config.batch, config.seed)
    found = []
    for epochs in (0, 1):
        for _ in range(epochs * config.every):
            step(*next(stream))
        x, y = next(stream)
        for method in LABELS:
            if method.startswith("fgd"):
                names: Line = {"kind": "noise", "method": method, "epochs": epochs}
                found.append(names | {"noise": figures.short(noise(model, method, config, x, y))})
    return found


def main(
    data: Dataset, name: str, out: Path, work: Path, epochs: int, runs: int, compile: bool = True
) -> None:
    """Searches, trains, measures, and writes `out/activity-<name>.jsonl`."""
    data = data.centred()
    work = work / f"activity-{name}"

    def build() -> nn.Module:
        return mlp(data.shape, data.classes)

    config = config_for(data, epochs, runs, compile)
    short = replace(config, iterations=SEARCH, decay=0.0, runs=1, compile=False)
    methods = tuned(build, data, short, list(LABELS), RATES, work)
    compare(build, data, replace(config, methods=methods), work, resume=True)
    path = out / f"activity-{name}.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / "log.jsonl", path)
    figures.append(path, noises(build, data, config))


def draw(path: Path) -> None:
    """Test error by epoch and by time, and the table, from the lines alone."""
    report, (header, _) = Report.read(path), figures.read(path)
    with figures.picture(path, 10, 4) as figure:
        by_epoch, by_time = figure.subplots(1, 2, sharey=True)
        for number, method in enumerate(report.config.methods):
            for trace in report.of(method):
                errors = [100 * (1 - a) for a in trace.accuracy]
                style = {
                    "color": f"C{number}",
                    "label": None if trace.run else LABELS[bare(method)],
                }
                epochs = [i / report.config.every for i in trace.iterations]
                by_epoch.plot(epochs[1:], errors[1:], **style)
                by_time.plot(report.seconds(trace)[1:], errors[1:], **style)
        by_epoch.set(xlabel="epoch", ylabel="test error, %", yscale="log")
        by_time.set(xlabel="seconds of training")
        by_epoch.legend(fontsize=7)
        figure.supxlabel(machine(header), fontsize=8)
    path.with_suffix(".md").write_text(page(path))


def page(path: Path) -> str:
    """The table as Markdown, from the lines alone."""
    report = Report.read(path)
    header, lines = figures.read(path)
    rows = [
        "| perturbed | learning rate | test error, % | noise at the start | after an epoch | "
        "ms a step | of backpropagation's |",
        "|" + "---|" * 7,
    ]
    for row in report.rows():
        ends = [100 * (1 - trace.accuracy[-1]) for trace in report.of(row.method)]
        error = f"{statistics.fmean(ends):.2f}"
        if len(ends) > 1:
            error += f" ± {statistics.stdev(ends):.2f}"
        found = [line["noise"] for line in figures.of(lines, kind="noise", method=bare(row.method))]
        noisy = " | ".join(f"{x:,.4g}" for x in found) or "0 | 0"
        _, own = report.config.of(row.method)
        rate = "-" if row.r_ratio is None else f"{row.r_ratio:.2f}"
        label = LABELS[bare(row.method)]
        rows.append(f"| {label} | {own.lr:g} | {error} | {noisy} | {row.ms:.1f} | {rate} |")
    config = report.config
    runs = f"{config.runs} runs, seeds 0 and up" if config.runs > 1 else "One run, seed 0"
    return "\n".join([*rows, "", f"{runs}; {config.iterations} steps of {config.batch}. Noise is "
                      f"E|g - grad f|^2 / |grad f|^2 of a batch. {machine(header)}. Written by "
                      "`python examples/activity.py`.\n"])  # fmt: skip


if __name__ == "__main__":
    parser: argparse.ArgumentParser = figures.options(__doc__)
    arguments(parser)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--times", action="store_true", help="measures steps again, trains nothing")
    asked = parser.parse_args()
    lines = asked.out / f"activity-{asked.data}.jsonl"
    if not asked.draw:
        images = load(asked.data, asked.data_root, download=False)
        if asked.times:
            time_again(lines, mlp, images.centred())
        else:
            main(images, asked.data, asked.out, asked.work, asked.epochs, asked.runs)
    draw(lines)
