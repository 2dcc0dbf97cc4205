"""Plots of the result files, PNG and SVG beside each of them.

    python benchmarks/plots.py [--out docs/results]

`step-*.json` gives `step-*` (the paper's works), `depth-*` (its figure 6) and `blocks-*`; and
`memory-*.json` gives `memory-*`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import RESULTS, load
from steps import RIVAL, STEPS
from works import DEPTHS, PAPER

MIB = 2**20
# equal files for equal results, and text that stays text
STYLE = {"svg.hashsalt": "fwdcompile", "svg.fonttype": "none", "font.size": 9}
COLORS = {m: matplotlib.colormaps["tab20"](i % 20) for i, m in enumerate(STEPS)}
Value = Callable[[dict[str, Any]], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    folder = parser.parse_args().out
    for path in sorted(folder.glob("step-*.json")):
        draw_steps(folder, path.stem.removeprefix("step-"), load(path)["works"])
    for path in sorted(folder.glob("memory-*.json")):
        draw_memory(folder, path.stem, load(path)["works"])


def draw_steps(folder: Path, device: str, works: dict[str, Any]) -> None:
    def relative(cell: dict[str, Any]) -> float:
        return float(cell["ratio"])

    def milliseconds(cell: dict[str, Any]) -> float:
        return float(cell["ms"])

    label = f"time of a step / {RIVAL}"
    paper = [name for name in works if name in PAPER]
    deep = [name for name in works if name.startswith("mlp-depth-")]
    others = [name for name in works if name not in (*paper, *deep)]
    for name, chosen in (("step", paper), ("blocks", others)):
        if chosen:
            axes = [(lambda ax, n=n: bars(ax, n, works[n], relative, label)) for n in chosen]
            save(folder / f"{name}-{device}", axes, machine(works))
    if groups := by_depth(deep, works):
        axes = [(lambda ax, g=g: lines(ax, *g, milliseconds, "ms a step")) for g in groups]
        save(folder / f"depth-{device}", axes, machine(works))


def draw_memory(folder: Path, name: str, works: dict[str, Any]) -> None:
    def mebibytes(cell: dict[str, Any]) -> float:
        return float(cell["peak"]) / MIB

    label = "MiB above parameters and data"
    axes = [
        (lambda ax, g=g: lines(ax, *g, mebibytes, label))
        for g in by_depth([n for n in works if n.startswith("mlp-depth-")], works)
    ]
    axes += [
        (lambda ax, n=n: bars(ax, n, works[n], mebibytes, label))
        for n in works
        if not n.startswith("mlp-depth-")
    ]
    if axes:
        save(folder / name, axes, machine(works))


def by_depth(names: list[str], works: dict[str, Any]) -> list[tuple[str, dict[int, Any]]]:
    """A title and the entries by depth, for each batch and dtype."""
    groups: dict[str, dict[int, Any]] = {}
    for name in names:
        entry = works[name]
        title = f"MLPs of width 1024, batch {entry['batch']}, {entry['dtype']}"
        groups.setdefault(title, {})[int(entry["work"].removeprefix("mlp-depth-"))] = entry
    return list(groups.items())


def bars(ax: Axes, title: str, entry: dict[str, Any], value: Value, label: str) -> None:
    """One bar for each method that ran, the first on top; those that refused are named."""
    cells = entry["methods"]
    shown = [method for method in STEPS if method in cells]
    widths = [0.0 if "refused" in cells[m] else value(cells[m]) for m in shown]
    ax.barh(shown, widths, color=[COLORS[m] for m in shown])
    texts = [
        "refused" if "refused" in cells[m] else f"{w:.3g}"
        for m, w in zip(shown, widths, strict=True)
    ]
    for row, (width, text) in enumerate(zip(widths, texts, strict=True)):
        ax.text(width, row, f" {text}", va="center", fontsize=7)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set_title(title)
    ax.set_xlabel(label)


def lines(ax: Axes, title: str, entries: dict[int, Any], value: Value, label: str) -> None:
    """A line for each method along the depth, both axes logarithmic."""
    for method in STEPS:
        cells = {d: entries[d]["methods"].get(method) for d in DEPTHS if d in entries}
        points = {d: value(c) for d, c in cells.items() if c and "refused" not in c}
        if points:
            ax.plot(*zip(*points.items(), strict=True), "o-", color=COLORS[method], label=method)
    ax.set(xscale="log", yscale="log", xlabel="layers", ylabel=label, title=title)
    ax.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    ax.minorticks_off()
    ax.legend(fontsize=7)


def save(path: Path, axes: list[Callable[[Axes], None]], caption: str) -> None:
    """A picture of one row of axes, with the hardware below."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.5 * len(axes), 4.6), layout="constrained")
        for draw, ax in zip(axes, figure.subplots(1, len(axes), squeeze=False)[0], strict=True):
            draw(ax)
        figure.supxlabel(caption, fontsize=8)
        figure.savefig(path.with_suffix(".png"), dpi=120)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def machine(works: dict[str, Any]) -> str:
    found = {
        f"{e['environment']['device']}, {e['environment']['threads']} threads, "
        f"torch {e['environment']['torch']}"
        for e in works.values()
    }
    return "; ".join(sorted(found))


if __name__ == "__main__":
    main()
