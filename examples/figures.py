"""What the scripts of the paper's figures share: JSON lines below a header, and pictures of them.

A figure is drawn from its lines alone, so that it can be drawn again without a new run; equal lines
give equal files.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fwdcompile import log
from fwdcompile.runner import environment

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "paper"
# equal files for equal results, and text that stays text
STYLE = {"svg.hashsalt": "fwdcompile", "svg.fonttype": "none", "font.size": 9}
FORWARD, BACKPROP = "tab:blue", "tab:orange"
Line = dict[str, Any]


def options(description: str) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figure goes")
    parser.add_argument("--draw", action="store_true", help="draws the lines there, runs nothing")
    return parser


def header(device: torch.device, **settings: Any) -> Line:
    """The first line: hardware, versions, load, and what the run was asked for."""
    return {"kind": "header", **environment(device), "load": os.getloadavg()[0], **settings}


def write(path: Path, lines: Iterable[Line]) -> None:
    """Writes lines, the header first, in place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    append(path, lines)


def append(path: Path, lines: Iterable[Line]) -> None:
    """Adds lines to those of a run that goes on, all at once."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    with path.open("a") as file:
        file.write(text)


def read(path: Path) -> tuple[Line, list[Line]]:
    """The header, and all lines below it."""
    first, *rest = log.read(path)
    if first["kind"] != "header":
        raise ValueError(f"{path} does not begin with a header")
    return first, rest


def of(lines: Iterable[Line], **wanted: Any) -> list[Line]:
    """The lines that have these entries, as `of(lines, kind="time", depth=3)`."""
    return [line for line in lines if all(line.get(k) == v for k, v in wanted.items())]


def short(x: float) -> float:
    """Six digits, which is more than a figure shows."""
    return float(f"{x:.6g}")


def kept(count: int, points: int) -> list[int]:
    """At most `points` of `count` places, the first and the last among them, dense at the start."""
    return sorted({round((count - 1) * (i / (points - 1)) ** 2) for i in range(points)})


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches to draw on, saved at the end as PNG and SVG beside its lines."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path.with_suffix(".png"), dpi=150)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def machine(header: Line) -> str:
    """The hardware in words, for a line below a figure."""
    threads = f"{header['threads']} thread{'s' * (header['threads'] != 1)}"
    return f"{header['device']}, {threads}, torch {header['torch']}"


def contours(
    ax: Axes,
    function: Callable[[Tensor], Tensor],
    xs: Sequence[float],
    ys: Sequence[float],
    minimum: Sequence[float],
) -> None:
    """Contours of a function of the plane, evenly spaced in its logarithm, a star at its minimum.

    Args:
        ax: what to draw on.
        function: from points `[..., 2]` to values `[...]`, positive but for the minimum.
        xs: ends of the axis of x.
        ys: ends of the axis of y.
        minimum: the place of the star.
    """
    x, y = (torch.linspace(*ends, 150, dtype=torch.float64) for ends in (xs, ys))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    values = function(grid).clamp_min(1e-12)
    low, high = np.quantile(np.log10(values.numpy()), (0.01, 0.995))
    levels = np.logspace(low, high, 24)
    ax.contour(x.numpy(), y.numpy(), values.numpy(), levels, colors="0.75", linewidths=0.6)
    ax.plot(*minimum, "*", color="black", markersize=11, zorder=5)
    ax.set(xlim=xs, ylim=ys, xlabel="x", ylabel="y")
