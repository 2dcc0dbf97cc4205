"""Figure 6 of the paper: time and memory of a training step of MLPs of 1 to 100 layers.

Layers of width 1024 without bias, images of 28 by 28, batch 64. Left the time of a step relative to
the base runtime, which is that of forward and loss without derivative or update: Rf of forward
gradient descent, Rb of backpropagation. Middle Rf / Rb. Right the peak memory above parameters and
data. `normal` are the paper's directions, `rademacher` signs, `rank-one` outer products of signs.
All methods are compiled.

The paper shows ten independent runs, which here would compile a hundred layers ten times. Instead
ten measurements are made of the steps of one process for each depth, each the median over 20 turns
that the methods take; points are their means, bars their standard deviations. A method's memory is
counted once, in a process of its own. With `--resume`, depths that the lines have stay as they are.

    python examples/depth.py [--depths 1,3,10,30,100] [--resume] [--out DIR] [--draw]
"""

from __future__ import annotations

import functools
import gc
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import figures
import torch
from figures import Line
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fwdcompile
from fwdcompile.measure import (
    ALLOCATOR,
    KEEPING,
    MIB,
    WARM_UP,
    cuda_peak,
    in_fresh_process,
    ratio,
    resident_peak,
    take_turns,
)
from fwdcompile.methods import METHODS, Config, Step
from fwdcompile.models import deep_mlp

SHAPE, CLASSES = (1, 28, 28), 10
DEPTHS = (1, 3, 10, 30, 100)
# time does not depend on it, and the deepest models leave float32 at the paper's
LR = 1e-9
BASE, BACKPROP = "base", "backprop"


@dataclass(frozen=True)
class Setup:
    """How all depths are measured; `compile` holds for all methods alike."""

    batch: int = 64
    measurements: int = 10
    pairs: int = 20
    threads: int = 2
    device: str = "cpu"
    compile: bool = True

    def problem(self, depth: int) -> tuple[nn.Module, Tensor, Tensor]:
        """A model and its batch, equal at every call."""
        torch.manual_seed(0)
        model = deep_mlp(depth, SHAPE, CLASSES).to(self.device)
        x, y = torch.randn(self.batch, *SHAPE), torch.randint(CLASSES, (self.batch,))
        return model, x.to(self.device), y.to(self.device)


def base(model: nn.Module, x: Tensor, y: Tensor, compile: bool) -> Step:
    """The base runtime of the paper's section 5.2: forward and loss."""

    @torch.no_grad()
    def objective(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y)

    return torch.compile(objective, fullgraph=True, dynamic=False) if compile else objective


def backprop(model: nn.Module, x: Tensor, y: Tensor, compile: bool) -> Step:
    return METHODS["backprop-compiled" if compile else "backprop"](model, Config(lr=LR), 0)


def fgd(
    directions: fwdcompile.Directions, model: nn.Module, x: Tensor, y: Tensor, compile: bool
) -> Step:
    trainer = fwdcompile.FGD(model, cross_entropy, lr=LR, directions=directions, compile=compile)
    trainer.calibrate(x, y)
    return trainer.step


STEPS: dict[str, Callable[..., Step]] = {
    BASE: base,
    BACKPROP: backprop,
    "normal": functools.partial(fgd, fwdcompile.Normal()),
    "rademacher": functools.partial(fgd, fwdcompile.Rademacher()),
    "rank-one": functools.partial(fgd, fwdcompile.Rademacher(rank_one=True)),
}
FORWARD = [method for method in STEPS if method not in (BASE, BACKPROP)]
COLORS = {BASE: "0.6", BACKPROP: figures.BACKPROP, "normal": figures.FORWARD}
COLORS |= {"rademacher": "tab:green", "rank-one": "tab:purple"}


def start(method: str, depth: int, setup: Setup) -> tuple[Callable[[], Any], nn.Module, int]:
    """A step of no arguments, its model, and the bytes of its data."""
    model, x, y = setup.problem(depth)
    step = STEPS[method](model, x, y, setup.compile)
    return lambda: step(x, y), model, x.nbytes + y.nbytes


def times(depth: int, setup: Setup) -> list[Line]:
    """A line for each measurement: medians, and their quotients to the base runtime."""
    runs = {method: start(method, depth, setup)[0] for method in STEPS}
    lines = []
    for number in range(setup.measurements):
        turns = take_turns(runs, 1, torch.device(setup.device), setup.pairs)
        lines.append(
            {
                "kind": "time",
                "depth": depth,
                "measurement": number,
                "milliseconds": {m: 1e3 * statistics.median(turns[m]) for m in turns},
                "relative": {m: ratio(turns, m, BASE) for m in turns},
            }
        )
    return lines


def memory(method: str, depth: int, setup: Setup) -> Line:
    """A line with the bytes of a step's peak, of the parameters and of the data."""
    run, model, data = start(method, depth, setup)
    for _ in range(WARM_UP):
        run()

    def forget() -> None:
        """Gradients that an earlier step left do not count as there before."""
        model.zero_grad(set_to_none=True)
        gc.collect()

    peak = (resident_peak if setup.device == "cpu" else cuda_peak)(run, forget)
    parameters = sum(p.nbytes for p in model.parameters())
    line = {"kind": "memory", "depth": depth, "method": method}
    return line | {"peak": peak, "parameters": parameters, "data": data}


def one(task: str, depth: str, settings: str) -> Any:
    """What a fresh process does: times, or the memory of the method that the task names."""
    setup = Setup(**json.loads(settings))
    torch.set_num_threads(setup.threads)
    return times(int(depth), setup) if task == "times" else memory(task, int(depth), setup)


def measured(depth: int, setup: Setup) -> list[Line]:
    """All lines of a depth, the times from one process, each method's memory from another."""

    def answer(task: str, allocator: dict[str, str]) -> Any:
        arguments = "--one", task, str(depth), json.dumps(asdict(setup))
        return in_fresh_process(__file__, *arguments, environment=allocator)

    return [*answer("times", KEEPING), *(answer(method, ALLOCATOR) for method in STEPS)]


def quotients(lines: list[Line], above: str, below: str) -> dict[int, list[float]]:
    """For each depth the quotients of two methods' times relative to the base runtime."""
    found: dict[int, list[float]] = {}
    for line in figures.of(lines, kind="time"):
        relative = line["relative"]
        found.setdefault(line["depth"], []).append(relative[above] / relative[below])
    return dict(sorted(found.items()))


def draw(path: Path) -> None:
    """The figure from its lines."""
    header, lines = figures.read(path)
    with figures.picture(path, 10.5, 3.6) as figure:
        relative, factor, peak = figure.subplots(1, 3)
        for method in (BACKPROP, *FORWARD):
            bars(relative, quotients(lines, method, BASE), COLORS[method])
        for method in FORWARD:
            bars(factor, quotients(lines, method, BACKPROP), COLORS[method])
        factor.axhline(1, color="0.6", lw=0.8)
        for method in STEPS:
            found = sorted(
                figures.of(lines, kind="memory", method=method), key=lambda m: m["depth"]
            )
            mib = [line["peak"] / MIB for line in found]
            depths = [line["depth"] for line in found]
            peak.plot(depths, mib, "o-", ms=3, color=COLORS[method], label=label(method))
        relative.set(ylabel="$R_f$ and $R_b$, time of a step / base runtime", ylim=(0, None))
        factor.set(ylabel="$R_f / R_b$", ylim=(0, None))
        peak.set(ylabel="MiB above parameters and data", yscale="log")
        for ax in (relative, factor, peak):
            along_depth(ax, sorted({line["depth"] for line in lines}))
        figure.legend(
            *peak.get_legend_handles_labels(), loc="outside upper center", ncols=len(STEPS)
        )
        figure.supxlabel(f"{figures.machine(header)}, batch {header['setup']['batch']}", fontsize=7)


def bars(ax: Axes, values: dict[int, list[float]], color: str) -> None:
    """Means by depth, with standard deviations."""
    means = [statistics.fmean(v) for v in values.values()]
    spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values.values()]
    ax.errorbar(list(values), means, spread, fmt="o-", ms=3, capsize=3, color=color)


def along_depth(ax: Axes, depths: list[int]) -> None:
    ax.set(xscale="log", xlabel="layers")
    ax.set_xticks(depths, [str(depth) for depth in depths])
    ax.minorticks_off()


def label(method: str) -> str:
    if method == BASE:
        return "base"
    return "backpropagation" if method == BACKPROP else f"forward gradient, {method}"


def table(lines: list[Line]) -> str:
    """Means and standard deviations of Rf, Rb and Rf / Rb, and the memory."""
    rows = ["| layers | method | R | R / Rb | MiB |", "|---|---|---|---|---|"]
    for depth in sorted({line["depth"] for line in lines}):
        here = figures.of(lines, depth=depth)
        for method in STEPS:
            cells = [spread(quotients(here, method, other)[depth]) for other in (BASE, BACKPROP)]
            (found,) = figures.of(here, kind="memory", method=method)
            rows.append(f"| {depth} | {method} | {' | '.join(cells)} | {found['peak'] / MIB:.1f} |")
    return "\n".join(rows)


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.2f} ± {deviation:.2f}"


def begin(path: Path, resume: bool, setup: Setup) -> set[int]:
    """The depths that a file has already; without it, or if it shall not go on, a header."""
    if resume and path.exists():
        header, lines = figures.read(path)
        if header["setup"] != asdict(setup):
            raise ValueError(f"{path} was measured otherwise: {header['setup']}")
        return {line["depth"] for line in lines}
    device = torch.device(setup.device)
    figures.write(path, [figures.header(device, figure=6, seed=0, setup=asdict(setup))])
    return set()


def main(
    out: Path = figures.RESULTS,
    depths: Sequence[int] = DEPTHS,
    resume: bool = False,
    **settings: Any,
) -> list[Line]:
    """Settings are those of `Setup`."""
    path, setup = out / "depth.jsonl", Setup(**settings)
    torch.set_num_threads(setup.threads)
    done = begin(path, resume, setup)
    for depth in depths:
        if depth not in done:
            figures.append(path, measured(depth, setup))
            print(f"{depth} layers are measured", flush=True)
    draw(path)
    lines = figures.read(path)[1]
    print(table(lines))
    return lines


if __name__ == "__main__":
    parser = figures.options(__doc__)
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)), help="numbers of layers")
    parser.add_argument("--resume", action="store_true", help="keeps the depths that are there")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--measurements", type=int, default=10, help="for each depth")
    parser.add_argument("--pairs", type=int, default=20, help="turns of a measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--one", nargs=3, help="for the fresh process: task, depth, settings")
    asked = vars(parser.parse_args())
    out, draw_only, task = (asked.pop(name) for name in ("out", "draw", "one"))
    if task:
        print(json.dumps(one(*task)))
    elif draw_only:
        draw(out / "depth.jsonl")
    else:
        main(out, list(map(int, asked.pop("depths").split(","))), asked.pop("resume"), **asked)
