"""All figures of the paper and its table, resumable: what is done is not done again.

    python examples/paper.py --data-root DIR          # hours; kill it and run it again at will
    python examples/paper.py --data-root DIR --times  # times of a step anew, on a quiet machine
    python examples/paper.py --draw                   # figures and table from the lines that exist

Writes `docs/results/paper/`: a picture of each figure, the raw numbers as JSON lines, and
`paper.md`, the paper's measures beside ours.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import cnn
import depth
import forward_gradient_beale
import logistic_regression
import mlp
import test_functions
from figures import machine, options
from mnist import LABELS, Experiment, arguments, draw, finished, run, time_again
from tuning import bare

from fwdcompile import models
from fwdcompile.data import load
from fwdcompile.log import read
from fwdcompile.report import Report

# The same with a rate for each method that the same search found: the paper has none of these
TUNED = (
    Experiment("logistic-regression-tuned", models.logistic_regression, None, 2_000, 100),
    Experiment("mlp-tuned", models.mlp, None, 2_000, 100),
    Experiment("cnn-tuned", models.cnn, None, 400, 50),
)
FIGURES = {
    "figure-3": logistic_regression.EXPERIMENTS,
    "figure-4": mlp.EXPERIMENTS,
    "figure-5": cnn.EXPERIMENTS,
    "tuned": TUNED,
}
# Rf, Rb, Rf/Rb and Tf/Tb in sections 5.3 to 5.5; the text gives no Tf/Tb of the smaller rate
PAPER: dict[str, tuple[float | None, ...]] = {
    "logistic-regression": (2.435, 4.389, 0.555, 0.553),
    "mlp-2e-5": (2.468, 4.165, 0.592, None),
    "mlp-2e-4": (2.468, 4.165, 0.592, 0.211),
    "cnn": (1.434, 2.211, 0.649, 0.514),
}


def main() -> None:
    parser = options(__doc__)
    arguments(parser)
    parser.add_argument("--times", action="store_true", help="measures steps again, trains nothing")
    chosen = parser.parse_args()
    if chosen.times:
        images = load(chosen.data, chosen.data_root, download=False)
        for experiment in experiments():
            if (path := chosen.out / f"{experiment.name}.jsonl").exists():
                time_again(path, experiment.build, images)
    elif not chosen.draw:
        for script in (forward_gradient_beale, test_functions):
            if not (chosen.out / f"{script.__name__}.jsonl").exists():
                script.main(chosen.out)
        for experiment in experiments():
            run(experiment, chosen.data_root, chosen.data, chosen.work, chosen.out)
        depth.main(chosen.out, resume=True)
    write(chosen.out)


def experiments() -> list[Experiment]:
    """Those of figures 3 to 5, in their order, and those with tuned rates."""
    return [experiment for each in FIGURES.values() for experiment in each]


def write(out: Path) -> None:
    """Draws the figures of experiments and writes the tables, from the lines that are there."""
    for figure, each in FIGURES.items():
        draw(out, figure, each)
    (out / "paper.md").write_text(page(out))


def page(out: Path) -> str:
    """The measures and the losses of all experiments that have lines, as Markdown."""
    paths = {e: out / f"{e.name}.jsonl" for e in experiments()}
    found = {e: finished(path) for e, path in paths.items() if path.exists()}
    found = {e: report for e, report in found.items() if report.traces}
    measures = ["| experiment | by | Rf | Rb | Rf/Rb | Tf/Tb |", "|---|---|---|---|---|---|"]
    losses = [
        "| experiment | method | learning rate | iterations | runs | validation loss, lowest | "
        "at the end | standard deviation | accuracy | ms a step |",
        "|" + "---|" * 10,
    ]
    for experiment, report in found.items():
        measures += measures_of(experiment, report)
        losses += losses_of(experiment, report)
    told = dict.fromkeys(machine(read(paths[e])[0]) for e in found)
    return PAGE.format(
        measures="\n".join(measures), losses="\n".join(losses), machine="; ".join(told)
    )


def measures_of(experiment: Experiment, report: Report) -> list[str]:
    """The row of the paper, and one for each kind of directions."""
    rows = report.rows()
    (rb,) = (row.r for row in rows if row.r_ratio is None)
    known = PAPER.get(experiment.name)
    lines = [f"| {experiment.name} | the paper | {cells(*known)} |"] if known else []
    for row in rows:
        if row.r_ratio is not None:
            numbers = cells(row.r, rb, row.r_ratio, row.t_ratio)
            lines.append(f"| {experiment.name} | {LABELS[bare(row.method)]} | {numbers} |")
    return lines


def losses_of(experiment: Experiment, report: Report) -> list[str]:
    """Means over runs of what each method ends with, and the lowest point of its mean curve.

    Runs that left the finite numbers are counted; they have no end to take a mean over.
    """
    lines = []
    for row in report.rows():
        traces = report.of(row.method)
        whole = [trace for trace in traces if not trace.stopped]
        ends = [trace.validation_loss[-1] for trace in whole]
        spread = statistics.stdev(ends) if len(ends) > 1 else 0.0
        shares = [trace.accuracy[-1] for trace in whole]
        end, accuracy = (statistics.fmean(x) if x else math.nan for x in (ends, shares))
        lowest = min(report.mean_curve(row.method)[1])
        stopped = f", {len(traces) - len(whole)} not finite" if len(whole) < len(traces) else ""
        lines.append(
            f"| {experiment.name} | {LABELS[bare(row.method)]} | "
            f"{report.config.of(row.method)[1].lr:g} | {report.config.iterations} | "
            f"{len(traces)}{stopped} | {lowest:.4f} | {end:.4f} | {spread:.4f} | "
            f"{accuracy:.4f} | {row.ms:.2f} |"
        )
    return lines


def cells(*numbers: float | None) -> str:
    """Numbers as cells of a table; a dash where there is none."""
    return " | ".join("-" if x is None else f"{x:.3f}" for x in numbers)


PAGE = """# The paper's measures beside ours

R is the time of a step over that of the model and its loss alone, Tf/Tb the time that forward
gradients need to reach the lowest mean validation loss of backpropagation, over the time that
backpropagation needs (section 5.2). A dash: it was not reached within equal iterations.

{measures}

{losses}

{machine}. Batches of 64, learning rate lr exp(-i / 10,000), seeds 0 and up. The paper's rate is
the same for all methods; tuned ones were found by the same search for each, on held-out training
images. Losses are means over MNIST's whole test set, then over runs. Times of a step are medians of
turns, all methods compiled; times of training are iterations times those. Written by
`python examples/paper.py`.
"""


if __name__ == "__main__":
    main()
