"""Figure 1 of the paper: five forward gradients of Beale's function at (1.5, -0.1) and their mean.

A forward gradient is (grad f . v) v: a direction v (orange), stretched or turned around by the
directional derivative along it (blue), so that it never points against the true gradient (red). The
mean of many (green) approaches that: in n dimensions the root mean square of its relative error is
sqrt((n + 1) / K) for K normal directions, which is printed beside what K = 5, 100 and 10,000 give
over ten seeds. The figure has the five of seed 0, gradients at a tenth of their length; the star
marks the global minimum.

    python examples/forward_gradient_beale.py [--runs 10] [--out DIR] [--draw]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import figures
import torch
from figures import FORWARD, Line
from matplotlib.axes import Axes
from test_functions import DESCENTS, beale
from torch import Tensor

import fwdcompile
from fwdcompile.words import stream_keys

POINT = (1.5, -0.1)
SHOWN = 5
# the gradients are some ten times as long as the directions
SCALE = 0.1
COUNTS = (SHOWN, 100, 10_000)
ARROWS = {
    "direction": ("tab:orange", "directions $v_k$"),
    "gradient": (FORWARD, r"forward gradients $(\nabla f \cdot v_k)\,v_k$"),
    "mean": ("tab:green", "forward gradient (empirical mean)"),
    "true": ("tab:red", r"true gradient $\nabla f$"),
}


def forward_gradients(point: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normal directions, the derivatives of Beale's function along them, the forward gradients.

    One run of the generated program serves all directions: a row of the batch for each.
    """
    key = stream_keys(torch.tensor(seed), torch.tensor(0))[0, 0]
    v = fwdcompile.Normal().draw((count, len(point)), key=key, dtype=point.dtype)
    _, slopes = fwdcompile.jvp(beale, (point.expand_as(v),), (v,))
    return v, slopes, slopes[:, None] * v


def true_gradient(point: Tensor) -> Tensor:
    """By backpropagation, as the check."""
    point = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(beale(point), point)
    return gradient


def samples(point: Tensor, count: int, seed: int) -> list[Line]:
    """A line for each direction: v, the derivative along it, and the forward gradient."""
    rows = zip(*(t.tolist() for t in forward_gradients(point, count, seed)), strict=True)
    return [
        {"kind": "sample", "seed": seed, "k": k, "direction": v, "slope": slope, "gradient": g}
        for k, (v, slope, g) in enumerate(rows, 1)
    ]


def mean(point: Tensor, count: int, seed: int, true: Tensor) -> Line:
    """The mean of many forward gradients, and how far from the true gradient it is."""
    average = forward_gradients(point, count, seed)[2].mean(0)
    error = float((average - true).norm() / true.norm())
    return {"kind": "mean", "count": count, "seed": seed, "mean": average.tolist(), "error": error}


def draw(path: Path) -> None:
    """The figure from its lines."""
    _, lines = figures.read(path)
    (point,) = figures.of(lines, kind="point")
    shown = figures.of(lines, kind="sample")
    (average,) = figures.of(lines, kind="mean", count=len(shown), seed=0)
    arrows = [("direction", line["direction"]) for line in shown]
    gradients = [("gradient", line["gradient"]) for line in shown]
    gradients += [("mean", average["mean"]), ("true", point["gradient"])]
    arrows += [(key, [SCALE * g for g in gradient]) for key, gradient in gradients]
    with figures.picture(path, 6.4, 4.3) as figure:
        ax = figure.subplots()
        ends = [point["point"], point["minimum"]]
        ends += [[p + a for p, a in zip(point["point"], arrow, strict=True)] for _, arrow in arrows]
        xs, ys = (limits(coordinates) for coordinates in zip(*ends, strict=True))
        figures.contours(ax, beale, xs, ys, point["minimum"])
        for key, arrow in arrows:
            draw_arrow(ax, point["point"], arrow, *ARROWS[key])
        ax.set_aspect("equal")
        handles, labels = ax.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        title = f"gradients drawn at {SCALE:g} of their length"
        figure.legend(unique.values(), unique, loc="outside lower center", ncols=2, title=title)


def limits(coordinates: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis with some room beyond the outermost points."""
    room = 0.08 * (max(coordinates) - min(coordinates))
    return min(coordinates) - room, max(coordinates) + room


def draw_arrow(
    ax: Axes, foot: Sequence[float], arrow: Sequence[float], color: str, label: str
) -> None:
    ax.quiver(
        *foot,
        *arrow,
        angles="xy",
        scale_units="xy",
        scale=1,
        color=color,
        width=0.004,
        label=label,
        zorder=4,
    )


def table(lines: list[Line]) -> str:
    """The root mean square over the seeds of the relative error, and what theory says."""
    rows = ["| K | relative error of the mean | sqrt(3 / K) |", "|---|---|---|"]
    for count in dict.fromkeys(line["count"] for line in figures.of(lines, kind="mean")):
        errors = [line["error"] for line in figures.of(lines, kind="mean", count=count)]
        found = math.sqrt(sum(e * e for e in errors) / len(errors))
        rows.append(f"| {count:,} | {found:.3f} | {math.sqrt(3 / count):.3f} |")
    return "\n".join(rows)


def main(out: Path = figures.RESULTS, runs: int = 10, counts: Sequence[int] = COUNTS) -> list[Line]:
    point = torch.tensor(POINT, dtype=torch.float64)
    true = true_gradient(point)
    header = figures.header(point.device, figure=1, seeds=list(range(runs)), counts=list(counts))
    lines = [
        {
            "kind": "point",
            "point": POINT,
            "value": float(beale(point)),
            "gradient": true.tolist(),
            "minimum": DESCENTS["Beale"].minimum,
        },
        *samples(point, SHOWN, seed=0),
        *(mean(point, count, seed, true) for count in counts for seed in range(runs)),
    ]
    figures.write(out / "forward_gradient_beale.jsonl", [header, *lines])
    draw(out / "forward_gradient_beale.jsonl")
    print(table(lines))
    return lines


if __name__ == "__main__":
    parser = figures.options(__doc__)
    parser.add_argument("--runs", type=int, default=10, help="seeds that means are taken for")
    asked = parser.parse_args()
    if asked.draw:
        draw(asked.out / "forward_gradient_beale.jsonl")
    else:
        main(asked.out, asked.runs)
