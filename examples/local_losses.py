"""Local losses: backpropagation and activity perturbation, with one loss and with one a block.

A perceptron of four blocks (a linear layer and ReLU) learns in four ways. With the global loss, one
head stands on the last block, and all blocks learn from it. With local losses each block has a
head and learns from that head's loss alone, because the gradient is stopped between blocks. In both
cases the gradient comes by backpropagation or by activity perturbation (Ren, Kornblith, Liao and
Hinton, "Scaling forward gradient with local losses", 2023): one direction of signs a step, in which
the outputs of all layers move. Blocks, last head and their first weights are equal; what is tested
is the last head.

Local losses minimise another objective: as an estimate of the gradient of the global loss they are
biased. What they bring is less noise: a block's loss moves with that block's directions alone.

All is done twice, from He's first weights and from torch's own, under which the signal shrinks from
layer to layer. That need not weigh on all ways alike.

Each way has the learning rate of Adam that was best on images held out from the training set, one
run a rate. Then it trains from three seeds on the whole training set. Images are less their mean.

    python examples/local_losses.py [--data NAME] [--data-root DIR] [--epochs 20] [--draw]
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import figures
import torch
from figures import BACKPROP, FORWARD, Line
from matplotlib.axes import Axes
from torch import nn

from fwdcompile import NonFiniteError
from fwdcompile.config import Config
from fwdcompile.data import Dataset, batches, load
from fwdcompile.measure import take_turns
from fwdcompile.methods import METHODS, Step
from fwdcompile.models import local_mlp

STEM = "local-losses"
DEPTH, BATCH = 4, 128
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
# the search begins from weights that no run begins from
SEEDS, SEARCH_SEED = (0, 1, 2), 3
HELD_OUT = 0.2


WEIGHTS = {"he": "He's first weights", "torch": "torch's first weights"}


@dataclass(frozen=True)
class Task:
    """What all ways are set to: the data, the first weights, how long, how wide."""

    data: Dataset
    weights: str
    epochs: int
    width: int


@dataclass(frozen=True)
class Way:
    """How a model learns: a method of `fwdcompile.methods`, and from which losses."""

    method: str
    local: bool
    color: str


WAYS = {
    "backpropagation, global loss": Way("backprop", False, BACKPROP),
    "backpropagation, local losses": Way("backprop", True, BACKPROP),
    "activity perturbation, global loss": Way("fgd", False, FORWARD),
    "activity perturbation, local losses": Way("fgd", True, FORWARD),
}


def build(way: Way, task: Task, seed: int) -> nn.Module:
    """The model; blocks and last head of a seed are the same with and without local losses."""
    torch.manual_seed(seed)
    model = local_mlp(task.data.shape, task.data.classes, DEPTH, task.width)
    if task.weights == "he":
        for layer in model.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
    return model if way.local else model.end_to_end()


def step_of(way: Way, model: nn.Module, lr: float, seed: int) -> Step:
    """One step of Adam."""
    config = Config(
        methods=(way.method,),
        lr=lr,
        decay=0,
        directions="rademacher",
        perturb="activations",
        optimizer="adam",
        compile=False,
    )
    return METHODS[way.method](model, config, seed)


@torch.no_grad()
def error(model: nn.Module, data: Dataset) -> float:
    """The part of the validation set that the last head gets wrong."""
    images, labels = data.validation
    model.eval()
    right = int((model(images).argmax(1) == labels).sum())
    model.train()
    return 1 - right / len(labels)


def train(name: str, task: Task, lr: float, seed: int) -> Line:
    """One run: the error before it and after each epoch, and why it ended early, if so."""
    data, model = task.data, build(WAYS[name], task, seed)
    step = step_of(WAYS[name], model, lr, seed)
    stream = batches(data.train, BATCH, seed)
    errors, stopped = [error(model, data)], None
    for _ in range(task.epochs):
        try:
            for _ in range(math.ceil(len(data.train[1]) / BATCH)):
                step(*next(stream))
        except NonFiniteError as reason:
            stopped = str(reason)
            break
        errors.append(figures.short(error(model, data)))
    found = {"way": name, "weights": task.weights, "lr": lr, "seed": seed}
    return {**found, "error": errors, "stopped": stopped}


def run(name: str, task: Task, rates: Sequence[float], seeds: Sequence[int]) -> list[Line]:
    """The search of a rate, on images held out from the training set, and the runs with it."""
    data = task.data
    inner = replace(task, data=data.held_out(round(HELD_OUT * len(data.train[1]))).centred())
    tried = [{"kind": "search", **train(name, inner, lr, SEARCH_SEED)} for lr in rates]
    lr, outer = best(tried, name), replace(task, data=data.centred())
    return tried + [{"kind": "run", **train(name, outer, lr, seed)} for seed in seeds]


def best(lines: list[Line], name: str) -> float:
    """The rate whose run of the search ended with the least error."""
    runs = figures.of(lines, kind="search", way=name, stopped=None)
    return float(min(runs, key=lambda run: run["error"][-1])["lr"])


def times(task: Task, turns: int) -> list[Line]:
    """Medians of the time of a step; all ways take turns."""
    x, y = next(batches(task.data.train, BATCH, 0))
    steps = {
        name: functools.partial(step_of(way, build(way, task, 0), 1e-6, 0), x, y)
        for name, way in WAYS.items()
    }
    found = take_turns(steps, 1, x.device, turns)
    return [{"kind": "time", "way": n, "seconds": statistics.median(t)} for n, t in found.items()]


def draw(path: Path) -> None:
    """Picture and page from the lines."""
    header, lines = figures.read(path)
    with figures.picture(path, 9, 6.4) as figure:
        for axes, weights in zip(figure.subplots(2, 2, sharey=True), WEIGHTS, strict=True):
            by_epoch, by_rate = axes
            for name in WAYS:
                draw_way(by_epoch, by_rate, name, figures.of(lines, weights=weights))
            by_epoch.set(xlabel="epoch, means and ranges of seeds", ylabel="error, %")
            by_epoch.set_title(f"{WEIGHTS[weights]}: test set")
            by_rate.set(xscale="log", xlabel="learning rate, one run each")
            by_rate.set_title(f"{WEIGHTS[weights]}: held-out images")
        figure.axes[0].legend(fontsize=7)
        note = f"{header['data']}, {DEPTH} blocks of {header['width']}, Adam, batch {BATCH}"
        figure.supxlabel(f"{note}; {figures.machine(header)}", fontsize=7)
    path.with_suffix(".md").write_text(page(header, lines))


def draw_way(by_epoch: Axes, by_rate: Axes, name: str, lines: list[Line]) -> None:
    """One colour a method, dashed with local losses."""
    way = WAYS[name]
    style: dict[str, Any] = {"color": way.color, "linestyle": "--" if way.local else "-"}
    runs = [run["error"] for run in figures.of(lines, kind="run", way=name)]
    epochs = [[100 * e for e in each] for each in zip(*runs, strict=False)]
    by_epoch.plot([statistics.fmean(e) for e in epochs], label=name, **style)
    ends = [min(e) for e in epochs], [max(e) for e in epochs]
    by_epoch.fill_between(range(len(epochs)), *ends, color=way.color, alpha=0.2, lw=0)
    found = figures.of(lines, kind="search", way=name, stopped=None)
    ends_by_rate = [100 * run["error"][-1] for run in found]
    by_rate.plot([run["lr"] for run in found], ends_by_rate, marker="o", ms=3, **style)


def finals(lines: list[Line], name: str) -> list[float]:
    """Test errors at the end of the runs, in percent."""
    return [100 * run["error"][-1] for run in figures.of(lines, kind="run", way=name)]


def table(lines: list[Line]) -> str:
    """Rates, test errors, milliseconds."""
    titles = ["weights", "way", "learning rate", "test error, %: mean (range)"]
    rows = [[*titles, "runs stopped", "ms a step"], ["---"] * 6]
    for weights, name in itertools.product(WEIGHTS, WAYS):
        found = figures.of(lines, weights=weights)
        runs, ends = figures.of(found, kind="run", way=name), finals(found, name)
        (time,) = figures.of(lines, kind="time", way=name)
        spread = f"{statistics.fmean(ends):.1f} ({min(ends):.1f} to {max(ends):.1f})"
        stopped = str(sum(run["stopped"] is not None for run in runs))
        cells = [weights, name, f"{runs[0]['lr']:g}", spread, stopped]
        rows.append([*cells, f"{1e3 * time['seconds']:.1f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def verdict(lines: list[Line], method: str) -> str:
    """What local losses do to the test error of a method, in a sentence."""
    plain, local = (finals(lines, f"{method}, {kind}") for kind in ("global loss", "local losses"))
    means = statistics.fmean(plain), statistics.fmean(local)
    apart = max(plain) < min(local) or max(local) < min(plain)
    verb = "raise" if means[1] > means[0] else "lower"
    tail = "" if apart else "; the runs overlap"
    return (
        f"With {method}, local losses {verb} the mean test error from {means[0]:.1f} % to "
        f"{means[1]:.1f} %{tail}."
    )


def page(header: Line, lines: list[Line]) -> str:
    """The results as a page."""
    count, rates = len(header["seeds"]), header["rates"]
    parts = [table(lines)]
    for weights in WEIGHTS:
        found = figures.of(lines, weights=weights)
        said = [verdict(found, m) for m in ("backpropagation", "activity perturbation")]
        edges = [n for n in WAYS if best(found, n) in (min(rates), max(rates))]
        said += [f"The best rate of {'; '.join(edges)} is an end of the grid."] if edges else []
        parts.append(f"From {WEIGHTS[weights]}. {' '.join(said)}")
    parts += [
        f"{header['data']}, centred; {DEPTH} blocks of {header['width']}, {header['epochs']} "
        f"epochs of {header['images']} images, batch {BATCH}, Adam, {count} seeds; eager. "
        f"Rates {', '.join(f'{rate:g}' for rate in rates)} were tried on held-out images.",
        f"{figures.machine(header)}, load average {header['load']:.1f} at the start. Written by "
        "`python examples/local_losses.py`.",
    ]
    return "\n\n".join(parts) + "\n"


def main(
    out: Path = figures.RESULTS,
    data: Dataset | None = None,
    name: str = "synthetic-colour",
    epochs: int = 20,
    width: int = 128,
    turns: int = 30,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
) -> list[Line]:
    torch.set_num_threads(1)
    data = load(name) if data is None else data
    settings = {"data": name, "images": len(data.train[1]), "epochs": epochs, "width": width}
    header = figures.header(data.train[0].device, **settings, rates=rates, seeds=seeds)
    path = out / f"{STEM}.jsonl"
    tasks = [Task(data, weights, epochs, width) for weights in WEIGHTS]
    figures.write(path, [header, *times(tasks[0], turns)])
    for task, way in itertools.product(tasks, WAYS):
        figures.append(path, run(way, task, rates, seeds))
    draw(path)
    lines = figures.read(path)[1]
    print(table(lines))
    return lines


if __name__ == "__main__":
    parser = figures.options(__doc__)
    parser.add_argument("--data", default="synthetic-colour", help="a name that load() knows")
    parser.add_argument("--data-root", type=Path, help="directory of torchvision's sets")
    parser.add_argument("--epochs", type=int, default=20, help="of each run")
    asked = parser.parse_args()
    if asked.draw:
        draw(asked.out / f"{STEM}.jsonl")
    else:
        chosen = load(asked.data, asked.data_root)
        main(asked.out, chosen, asked.data, asked.epochs)
