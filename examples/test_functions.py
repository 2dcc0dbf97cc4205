"""Figure 2 of the paper: forward gradients and backpropagation descend two test functions.

Top row Beale's function, learning rate 0.01; bottom row Rosenbrock's, learning rate 5e-4; no decay.
Columns: loss against iteration, loss against time, and the way of the point over contours of the
function, with a star at the global minimum. Ten independent runs of forward gradient descent along
normal directions, seeds 0 to 9, against gradient descent by backpropagation.

The paper does not say where runs start. Here all runs start at (1.5, -0.1) on Beale's function,
the point of the paper's figure 1, and at (-1.2, 1) on Rosenbrock's, its usual start. From one start
backpropagation is deterministic: its ten runs are one curve. The numbers of iterations, equal for
both methods, are not in the paper either.

Time is iterations times the time of a step, the median of turns that the methods take in one
process. Both methods are compiled: forward gradient descent as one graph with the update in it,
backpropagation as a forward and a backward graph behind which torch's fused SGD runs. `--eager`
compiles neither. On functions so small a step costs what its calls cost, not what it computes: the
printed table has the time of eager steps, too, where drawing a direction op by op is the most.

    python examples/test_functions.py [--runs 10] [--turns 200] [--eager] [--out DIR] [--draw]
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import torch
from figures import BACKPROP, FORWARD, Line
from matplotlib.axes import Axes
from torch import Tensor, nn

import fwdcompile
from fwdcompile.measure import ratio, take_turns

POINTS = 100
# steps a turn: one is too short for the clock, and long turns are interrupted by what else runs,
# those of the slower method the more
INNER = 10
COLORS = {"fgd": FORWARD, "backprop": BACKPROP}
LABELS = {"fgd": "forward gradient", "backprop": "backpropagation"}
Step = Callable[[], Tensor]


def beale(point: Tensor) -> Tensor:
    """Beale's function of points `[..., 2]`."""
    x, y = point.unbind(-1)
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def rosenbrock(point: Tensor, a: float = 1.0, b: float = 100.0) -> Tensor:
    """Rosenbrock's function of points `[..., 2]`."""
    x, y = point.unbind(-1)
    return (a - x) ** 2 + b * (y - x**2) ** 2


@dataclass(frozen=True)
class Descent:
    """A function to descend: from where, how fast, how long, and what part of the plane to show."""

    function: Callable[[Tensor], Tensor]
    minimum: tuple[float, float]
    start: tuple[float, float]
    lr: float
    iterations: int
    xs: tuple[float, float]
    ys: tuple[float, float]


DESCENTS = {
    "Beale": Descent(beale, (3, 0.5), (1.5, -0.1), 0.01, 1000, (1, 4), (-1, 1)),
    "Rosenbrock": Descent(rosenbrock, (1, 1), (-1.2, 1), 5e-4, 25_000, (-2, 2), (-1, 3)),
}


class Point(nn.Module):
    """A point of the plane as the parameter of a model, which returns a function's value there."""

    def __init__(self, function: Callable[[Tensor], Tensor], start: tuple[float, float]) -> None:
        super().__init__()
        self.function = function
        self.place = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.function(self.place)


def fgd(model: Point, lr: float, compile: bool, seed: int = 0) -> Step:
    return fwdcompile.FGD(model, lr=lr, seed=seed, compile=compile).step


def backprop(model: Point, lr: float, compile: bool) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, fused=True)
    value = torch.compile(model, fullgraph=True, dynamic=False) if compile else model

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = value()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


METHODS: dict[str, Callable[..., Step]] = {"fgd": fgd, "backprop": backprop}


def descend(model: Point, step: Step, iterations: int) -> tuple[list[Any], str | None]:
    """Loss and place before each step and after the last; and why the run ended early, if so."""
    path, stopped = [], None
    for _ in range(iterations):
        place = model.place.tolist()
        try:
            loss = float(step())
        except fwdcompile.NonFiniteError as error:
            stopped = str(error)
        else:
            stopped = None if math.isfinite(loss) else f"the loss is {loss}"
        if stopped:
            break
        path.append((loss, *place))
    if not stopped and math.isfinite(loss := float(model().detach())):
        path.append((loss, *model.place.tolist()))
    return path, stopped


def curve(name: str, method: str, seed: int | None, path: list[Any], stopped: str | None) -> Line:
    """A run as a line: its end in full, its way at some iterations."""
    places = figures.kept(len(path), POINTS)
    loss, x, y = ([figures.short(path[i][k]) for i in places] for k in range(3))
    return {"kind": "run", "function": name, "method": method, "seed": seed, "stopped": stopped} | {
        "final": path[-1][0],
        "iteration": places,
        "loss": loss,
        "x": x,
        "y": y,
    }


def step_time(name: str, descent: Descent, turns: int, compile: bool) -> Line:
    """Medians of the time of a step, and of the quotient of both over paired turns."""
    build = functools.partial(Point, descent.function, descent.start)
    # a rate at which neither point moves far: what is timed is the same place for both
    steps = {method: make(build(), 1e-9, compile) for method, make in METHODS.items()}
    seconds = take_turns(steps, INNER, torch.device("cpu"), turns)
    return {
        "kind": "time",
        "function": name,
        "compiled": compile,
        "seconds": {method: statistics.median(times) for method, times in seconds.items()},
        "fgd / backprop": ratio(seconds, "fgd", "backprop"),
    }


def run(name: str, descent: Descent, seeds: range, turns: int, compile: bool) -> list[Line]:
    """The lines of one row of the figure."""
    modes = (True, False) if compile else (False,)
    lines = [step_time(name, descent, turns, compiled) for compiled in modes]
    model = Point(descent.function, descent.start)
    step = backprop(model, descent.lr, compile)
    lines.append(curve(name, "backprop", None, *descend(model, step, descent.iterations)))
    for seed in seeds:
        model = Point(descent.function, descent.start)
        step = fgd(model, descent.lr, compile, seed)
        lines.append(curve(name, "fgd", seed, *descend(model, step, descent.iterations)))
    return lines


def draw(path: Path) -> None:
    """The figure from its lines."""
    header, lines = figures.read(path)
    names, compiled = list(header["functions"]), header["compiled"]
    with figures.picture(path, 10, 2.9 * len(names)) as figure:
        for name, axes in zip(names, figure.subplots(len(names), 3, squeeze=False), strict=True):
            found = figures.of(lines, function=name)
            (time,) = figures.of(found, kind="time", compiled=compiled)
            draw_row(axes, name, header["functions"][name], time["seconds"], found)
        mode = "compiled" if compiled else "eager"
        figure.supxlabel(f"{figures.machine(header)}, both methods {mode}", fontsize=7)


def draw_row(
    axes: Any, name: str, settings: Line, seconds: dict[str, float], lines: list[Line]
) -> None:
    """Loss by iteration, loss by time, ways over contours."""
    by_iteration, by_time, plane = axes
    descent = DESCENTS[name]
    figures.contours(plane, descent.function, descent.xs, descent.ys, descent.minimum)
    for line in figures.of(lines, kind="run"):
        ms = [1e3 * seconds[line["method"]] * i for i in line["iteration"]]
        for ax, x, y in (
            (by_iteration, line["iteration"], line["loss"]),
            (by_time, ms, line["loss"]),
            (plane, line["x"], line["y"]),
        ):
            trace(ax, line["method"], x, y, bool(line["stopped"]))
    plane.plot(*settings["start"], "o", color="black", markersize=4, zorder=5)
    by_iteration.set_title(f"{name}, learning rate {settings['lr']:g}", loc="left")
    by_iteration.set(yscale="log", xlabel="iteration", ylabel="f(x, y)")
    by_time.set(yscale="log", xlabel="time, ms", ylabel="f(x, y)")
    by_iteration.legend(*legend(by_iteration))


def trace(ax: Axes, method: str, x: list[float], y: list[float], stopped: bool) -> None:
    """One run; a cross where it left the finite numbers."""
    # ten curves shall not hide the one, nor it them
    style = {"lw": 0.8, "alpha": 0.6} if method == "fgd" else {"lw": 1.3, "zorder": 3}
    ax.plot(x, y, color=COLORS[method], label=LABELS[method], **style)
    if stopped:
        ax.plot(x[-1], y[-1], "x", color=COLORS[method])


def legend(ax: Axes) -> tuple[list[Any], list[str]]:
    """One entry for each method, in place of one for each run."""
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    return list(unique.values()), list(unique)


def table(lines: list[Line]) -> str:
    """Final losses of the runs that did not stop, and the time of a step."""
    times = figures.of(lines, kind="time")
    modes = ["compiled" if c else "eager" for c in dict.fromkeys(t["compiled"] for t in times)]
    titles = ["function", "method", "runs", "stopped", "final loss, mean", "median"]
    rows = [[*titles, *(f"us a step, {mode}" for mode in modes)]]
    rows.append(["---"] * len(rows[0]))
    for name, method in itertools.product(dict.fromkeys(t["function"] for t in times), METHODS):
        found = figures.of(lines, kind="run", function=name, method=method)
        ends = [line["final"] for line in found if not line["stopped"]] or [math.nan]
        stopped = len([line for line in found if line["stopped"]])
        cells = [name, method, str(len(found)), str(stopped)]
        cells += [f"{average(ends):.3g}" for average in (statistics.fmean, statistics.median)]
        cells += [f"{1e6 * t['seconds'][method]:.0f}" for t in times if t["function"] == name]
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(
    out: Path = figures.RESULTS,
    runs: int = 10,
    turns: int = 200,
    compile: bool = True,
    descents: dict[str, Descent] = DESCENTS,
) -> list[Line]:
    torch.set_num_threads(1)
    seeds = range(runs)
    settings = {
        name: {"start": d.start, "lr": d.lr, "iterations": d.iterations}
        for name, d in descents.items()
    }
    header = figures.header(
        torch.device("cpu"),
        figure=2,
        functions=settings,
        seeds=list(seeds),
        turns=turns,
        compiled=compile,
    )
    lines = [line for n, d in descents.items() for line in run(n, d, seeds, turns, compile)]
    figures.write(out / "test_functions.jsonl", [header, *lines])
    draw(out / "test_functions.jsonl")
    print(table(lines))
    return lines


if __name__ == "__main__":
    parser = figures.options(__doc__)
    parser.add_argument("--runs", type=int, default=10, help="of forward gradient descent")
    parser.add_argument("--turns", type=int, default=200, help="of each method, for its time")
    parser.add_argument("--eager", action="store_true", help="compiles nothing")
    asked = parser.parse_args()
    if asked.draw:
        draw(asked.out / "test_functions.jsonl")
    else:
        main(asked.out, asked.runs, asked.turns, not asked.eager)
