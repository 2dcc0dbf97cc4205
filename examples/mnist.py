"""What the scripts of figures 3 to 5 share: an experiment of section 5, its run and its picture.

An experiment trains one architecture on MNIST by backpropagation and by forward gradients of three
kinds of directions: five runs of each, batches of 64, a decay of 1e-4, equal iterations, validation
loss on the whole test set. It can be killed and run again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from figures import BACKPROP, FORWARD, machine, options, picture, write
from matplotlib.axes import Axes
from torch import nn
from tuning import bare, tuned

from fwdcompile.cli import compare
from fwdcompile.config import Config
from fwdcompile.data import Dataset, load
from fwdcompile.log import read
from fwdcompile.report import BASES, Report
from fwdcompile.runner import Runner, environment

NORMAL, SIGNS = "fgd", "fgd:directions=rademacher"
RANK_ONE = f"{SIGNS}:rank_one=true"
METHODS = ("backprop-compiled", NORMAL, SIGNS, RANK_ONE)
RATES = (1e-4, 1e-3, 1e-2, 1e-1)
LABELS = {
    "backprop-compiled": "backpropagation",
    "backprop": "backpropagation, eager",
    NORMAL: "forward gradient",
    SIGNS: "forward gradient, signs",
    RANK_ONE: "forward gradient, rank-one",
}
SHADES = (BACKPROP, "tab:red", FORWARD, "tab:green", "tab:purple")
COLORS = dict(zip(LABELS, SHADES, strict=True))

Build = Callable[[Sequence[int], int], nn.Module]


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    Attributes:
        name: of its files.
        build: makes the model from the shape of an image and the number of classes.
        lr: the learning rate, for all methods; None lets a search find one for each.
        iterations: of each method.
        every: steps between two looks at the test set.
        runs: with seeds 0, 1, ...
        methods: of the runner; the first is backpropagation.
        compile: forward gradients, too.
    """

    name: str
    build: Build
    lr: float | None
    iterations: int
    every: int
    runs: int = 5
    methods: tuple[str, ...] = METHODS
    compile: bool = True

    @property
    def config(self) -> Config:
        return Config(
            methods=self.methods,
            lr=self.lr or 1.0,
            iterations=self.iterations,
            every=self.every,
            runs=self.runs,
            compile=self.compile,
        )


def run(experiment: Experiment, data_root: Path, data: str, work: Path, out: Path) -> Report:
    """Trains what is not trained yet, and leaves the log as `out/<name>.jsonl`."""
    images = load(data, data_root, download=False)
    folder = work / experiment.name

    def build() -> nn.Module:
        return experiment.build(images.shape, images.classes)

    out.mkdir(parents=True, exist_ok=True)
    config = experiment.config
    if experiment.lr is None:
        # as long as the runs: a rate may do well at first, and lose later
        one = replace(config, runs=1)  # so that the runs may grow later
        methods = tuned(build, images, one, config.methods, RATES, folder, halvings=1)
        config = replace(config, methods=methods)
        shutil.copyfile(folder / "tuning.jsonl", out / f"{experiment.name}-search.jsonl")
    report = compare(build, images, config, folder, resume=True)
    shutil.copyfile(folder / "log.jsonl", out / f"{experiment.name}.jsonl")
    return report


def time_again(path: Path, build: Build, data: Dataset) -> None:
    """Measures the times of a comparison anew, on a quiet machine, and replaces their lines.

    The header then has this machine and these versions: those of the times.
    """
    config = Report.read(path).config
    turns = Runner(lambda: build(data.shape, data.classes), data, config).times()
    times = [{"kind": "time", "method": name, "seconds": s} for name, s in turns.items()]
    # results follow from the other lines, and hold the old times
    header, *rest = (line for line in read(path) if line["kind"] not in ("time", "result"))
    write(path, [header | environment(data.train[0].device), *times, *rest])


def finished(path: Path) -> Report:
    """The report of the runs that all methods have finished; an experiment may be under way."""
    report = Report.read(path)
    last = report.config.iterations
    whole = [t for t in report.traces if t.stopped or t.iterations[-1] == last]
    counts = [sum(t.method == method for t in whole) for method in report.config.methods]
    return replace(report, traces=[t for t in whole if t.run < min(counts)])


def draw(out: Path, name: str, experiments: Sequence[Experiment]) -> None:
    """Draws the experiments that have lines, one to a row, as `out/<name>.png` and `.svg`."""
    found = [e for e in experiments if (out / f"{e.name}.jsonl").exists()]
    if not found:
        return
    with picture(out / name, 16, 3.6 * len(found)) as figure:
        rows = figure.subplots(len(found), 4, squeeze=False)
        for axes, experiment in zip(rows, found, strict=True):
            path = out / f"{experiment.name}.jsonl"
            panels(finished(path), list(axes))
            rate = "rates tuned" if experiment.lr is None else f"learning rate {experiment.lr:g}"
            axes[0].set_title(f"{experiment.name}, {rate}", loc="left")
        figure.supxlabel(machine(read(path)[0]), fontsize=8)


def panels(report: Report, axes: list[Axes]) -> None:
    """Validation loss by iteration and by time, training loss, and the cost of a step."""
    by_iteration, by_time, training, cost = axes
    for method in report.config.methods:
        for trace in report.of(method):
            thin = {"color": COLORS[bare(method)], "alpha": 0.35, "lw": 0.8}
            by_iteration.plot(trace.iterations, trace.validation_loss, **thin)
            training.plot(trace.iterations, trace.train_loss, **thin)
        seconds, losses = report.mean_curve(method)
        iterations = [round(s / report.step_seconds(method)) for s in seconds]
        bold = {"color": COLORS[bare(method)], "lw": 1.6, "label": LABELS[bare(method)]}
        by_iteration.plot(iterations, losses, **bold)
        by_time.plot(seconds, losses, **bold)
    start = max(trace.validation_loss[0] for trace in report.traces)
    for ax in (by_iteration, training):  # a run that diverges leaves the picture
        ax.set_ylim(top=min(ax.get_ylim()[1], 2 * start))
    mark_times(report, by_time)
    by_iteration.set(xlabel="iteration", ylabel="validation loss")
    by_time.set(xlabel="seconds of training", ylabel="validation loss")
    training.set(xlabel="iteration", ylabel="training loss")
    for ax in (by_iteration, by_time, training):
        ax.locator_params(axis="x", nbins=5)
    by_iteration.legend(fontsize=7)
    runtimes(report, cost)


def mark_times(report: Report, ax: Axes) -> None:
    """Tb and Tf of section 5.2, where lines of their colours end."""
    rival, *others = report.config.methods
    seconds, losses = report.mean_curve(rival)
    lowest = min(losses)
    times = {rival: seconds[losses.index(lowest)]}
    for row in report.rows():
        if row.method in others and row.t_ratio is not None:
            times[row.method] = row.t_ratio * times[rival]
    ax.axhline(lowest, color="0.6", lw=0.7, ls=":")
    for method, time in times.items():
        ax.plot([time], [lowest], "v", color=COLORS[bare(method)], ms=6)


def runtimes(report: Report, ax: Axes) -> None:
    """Seconds of a step over the base runtime: the median over turns, and the middle half."""
    for place, method in enumerate(report.config.methods):
        base = report.turns[BASES[report.config.compiles(method)]]
        ratios = [t / b for t, b in zip(report.turns[method], base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ax.bar(place, middle, color=COLORS[bare(method)])
        ax.errorbar(place, middle, [[middle - low], [high - middle]], color="black", capsize=3)
        ax.text(place, high, f" {middle:.2f}", ha="center", va="bottom", fontsize=7)
    labels = (LABELS[bare(method)] for method in report.config.methods)
    names = [label.replace("forward gradient", "Rf") for label in labels]
    ax.set_xticks(range(len(names)), [name.replace("backpropagation", "Rb") for name in names],
                  fontsize=7)  # fmt: skip
    ax.set(ylabel="step / base runtime")
    ax.margins(y=0.15)


def script(doc: str, name: str, *experiments: Experiment) -> None:
    """The command line of a script: runs its experiments, then draws them."""
    parser = options(doc)
    arguments(parser)
    chosen = parser.parse_args()
    for experiment in () if chosen.draw else experiments:
        run(experiment, chosen.data_root, chosen.data, chosen.work, chosen.out)
    draw(chosen.out, name, experiments)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Where the data is, and where checkpoints go."""
    parser.add_argument("--data", default="mnist", help="mnist, or another data set of the runner")
    parser.add_argument("--data-root", type=Path, help="the directory that holds MNIST/raw")
    parser.add_argument("--work", type=Path, default=Path("runs/paper"), help="for checkpoints")
