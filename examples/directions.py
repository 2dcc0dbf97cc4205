"""Other directions, K directions a step, momentum and Adam, beside backpropagation.

What Baydin et al. (2022) leave for future work, on their MLP: forward gradients along normal
directions, signs, outer products of signs (rank-one) and the sphere; means over K = 4, 16 and 64
rank-one directions, and over 16 orthogonal ones; momentum and Adam behind one rank-one direction
and behind backpropagation. All methods take equally many steps on equal batches, each at a learning
rate of its own, found by one and the same search (`tuning.py`). Every run has weights, batches and
directions of its own seed, 0 and on.

    python examples/directions.py [--data mnist --data-root DIR] [--iterations 100] [--runs 3]
        [--compile] [--out DIR] [--draw]

Writes the log of the runs with the lines of the search behind it, a table and a figure. A run that
was stopped goes on from its checkpoint in `runs/directions`. Time is iterations times the median
time of a step; all methods take turns for it in one process.

Steps are eager, those of backpropagation too: every direction of every parameter has a hash of its
own, and compiling a step of 16 directions takes longer than its runs on digits. `--compile`
compiles all steps; those that draw dense directions gain the most.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import figures
import torch
from torch import nn
from tuning import LINES, bare, tuned

from fwdcompile.config import Config
from fwdcompile.data import NAMES, Dataset, load
from fwdcompile.models import mlp
from fwdcompile.report import Report
from fwdcompile.runner import Runner

FOLDER = Path("runs/directions")
SIGNS = "fgd:directions=rademacher:rank_one=true"
# by what the table calls them; `-compiled` is put behind backprop where steps are compiled
METHODS = {
    "backprop": "backprop",
    "backprop, momentum": "backprop:optimizer=momentum",
    "backprop, Adam": "backprop:optimizer=adam",
    "normal": "fgd:directions=normal",
    "signs": "fgd:directions=rademacher",
    "sphere": "fgd:directions=sphere",
    "rank-one signs": SIGNS,
    "rank-one signs, momentum": f"{SIGNS}:optimizer=momentum",
    "rank-one signs, Adam": f"{SIGNS}:optimizer=adam",
    "rank-one signs, K = 4": f"{SIGNS}:samples=4",
    "rank-one signs, K = 16": f"{SIGNS}:samples=16",
    "rank-one signs, K = 64": f"{SIGNS}:samples=64",
    "orthogonal, K = 16": "fgd:directions=orthogonal:samples=16",
}
RATES = (1e-3, 3.16e-3, 1e-2)
CONFIG = Config(iterations=100, batch=32, runs=3, decay=0, every=10, compile=False)


def name_of(method: str) -> str:
    """What the table calls a method of a log."""
    key = bare(method.replace("-compiled", ""))
    return next(name for name, known in METHODS.items() if known == key)


def rows(path: Path) -> Iterator[list[str]]:
    """The cells of the table, from the lines alone."""
    report = Report.read(path)
    for method in report.config.methods:
        traces = report.of(method)
        ends = [trace for trace in traces if not trace.stopped]
        lost = len(traces) - len(ends)
        yield [
            name_of(method) + (f" ({lost} of {len(traces)} runs stopped)" if lost else ""),
            f"{report.config.of(method)[1].lr:.2g}",
            f"{1e3 * report.step_seconds(method):.1f}",
            average([trace.validation_loss[-1] for trace in ends]),
            average([100 * trace.accuracy[-1] for trace in ends], "%"),
        ]


def average(values: list[float], unit: str = "") -> str:
    """Mean and standard deviation, which one value has none of."""
    if not values:
        return ""
    digits = 1 if unit else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread} {unit}".rstrip()


def table(path: Path) -> str:
    """The table with its caption, from the lines alone."""
    header, lines = figures.read(path)
    config = Report.read(path).config
    titles = ["method", "learning rate", "ms a step", "final validation loss", "accuracy"]
    cells = [titles, ["---"] * len(titles), *rows(path)]
    (search,) = figures.of(lines, kind="search")
    caption = (
        f"The paper's MLP on {search['data']}, {config.iterations} steps of batch {config.batch}; "
        f"losses and accuracies are means over the runs of seeds {config.seed} to "
        f"{config.seed + config.runs - 1} that did not stop, ± the standard deviation. "
        f"{mode(config)}; {figures.machine(header)}, a machine shared with other work. Learning "
        f"rates by runs of {search['iterations']} steps, judged on a held-out fifth of the "
        "training set. Written by `examples/directions.py`."
    )
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + f"\n\n{caption}\n"


def mode(config: Config) -> str:
    """How steps were run, for the column of times."""
    return "Steps are compiled" if config.compile else "Steps are eager, not compiled"


def draw(path: Path) -> None:
    """The table and the figure from the lines; the lower row is a close-up of forward gradients."""
    path.with_suffix(".md").write_text(table(path))
    report, (header, _) = Report.read(path), figures.read(path)
    with figures.picture(path, 10, 6.4) as figure:
        axes = figure.subplots(2, 2, sharex="col", sharey="row")
        for number, method in enumerate(report.config.methods):
            curves(axes, report, method, style(number, method))
        low, start = span(report)
        # losses of runs that diverge are beyond the upper ends
        axes[0, 0].set(ylabel="validation loss", yscale="log")
        axes[0, 0].set_ylim(top=1.5 * start)
        axes[1, 0].set(ylabel="validation loss, close-up", xlabel="iteration")
        axes[1, 0].set_ylim(low - 0.1 * (start - low), start + 0.5 * (start - low))
        axes[1, 1].set(xlabel="seconds of training", xscale="log")
        entries = axes[0, 0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside right upper", fontsize=8)
        words = f"means over {report.config.runs} runs; {mode(report.config).lower()}"
        figure.supxlabel(f"{words}; {figures.machine(header)}", fontsize=7)


def span(report: Report) -> tuple[float, float]:
    """The lowest mean loss of any forward gradient, and the loss before the first step."""
    forward = [method for method in report.config.methods if method.startswith("fgd")]
    losses = [loss for method in forward for loss in report.mean_curve(method)[1]]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return min(finite), losses[0]


def style(number: int, method: str) -> dict[str, Any]:
    """Backpropagation dashed and dark, forward gradients in colours."""
    if method.startswith("backprop"):
        return {"color": str(0.25 * number), "ls": "--", "lw": 1.4}
    return {"color": f"C{(number - 3) % 10}", "lw": 1.2}


def curves(axes: Any, report: Report, method: str, style: dict[str, Any]) -> None:
    """Mean validation loss over the runs, against iteration and against time."""
    seconds, losses = report.mean_curve(method)
    iterations = [round(second / report.step_seconds(method)) for second in seconds]
    for by_iteration, by_time in axes:
        by_iteration.plot(iterations, losses, label=name_of(method), **style)
        # the start is at no time, which a logarithm has no place for
        by_time.plot(seconds[1:], losses[1:], **style)


def main(
    data: Dataset,
    name: str,
    out: Path = figures.RESULTS,
    folder: Path = FOLDER,
    config: Config = CONFIG,
    methods: Sequence[str] = tuple(METHODS.values()),
) -> None:
    torch.set_num_threads(1)

    def build() -> nn.Module:
        return mlp(data.shape, data.classes)

    # eager and compiled steps have equal losses, and each rate would compile anew
    short = replace(config, runs=1, compile=False)
    chosen = tuned(build, data, short, methods, RATES, folder)
    if config.compile:
        chosen = tuple(m.replace("backprop:", "backprop-compiled:") for m in chosen)
    config = replace(config, methods=chosen)
    Runner(build, data, config, log=folder, resume=True).run()
    path = out / "directions.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    path.write_text((folder / "log.jsonl").read_text())
    asked = {"kind": "search", "data": name, "iterations": short.iterations, "rates": list(RATES)}
    figures.append(path, [asked, *figures.read(folder / LINES)[1]])
    draw(path)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    parser = figures.options(__doc__)
    parser.add_argument("--data", choices=NAMES, default="digits")
    parser.add_argument("--data-root", type=Path, help="where torchvision's sets lie")
    parser.add_argument("--iterations", type=int, default=CONFIG.iterations)
    parser.add_argument("--runs", type=int, default=CONFIG.runs, help="seeds 0 and on")
    parser.add_argument("--compile", action="store_true", help="compiles steps, for minutes each")
    asked = parser.parse_args()
    if asked.draw:
        draw(asked.out / "directions.jsonl")
    else:
        changes = {"iterations": asked.iterations, "runs": asked.runs, "compile": asked.compile}
        data = load(asked.data, asked.data_root)
        main(data, asked.data, asked.out, FOLDER / asked.data, replace(CONFIG, **changes))
