"""How noisy a forward gradient is: its second moment against the number of directions and of d.

E|g|^2 / |grad f|^2, where g is the mean of K forward gradients (grad f . v) v along directions v
of d numbers, measured on a linear classifier in float64. Points are means over all draws of all
seeds with two standard errors; lines are theory. As g is unbiased, its variance relative to
|grad f|^2 is the second moment less 1. For one direction, with n = grad f / |grad f|:

- normal: n.v and the rest of v are independent, so E (n.v)^2 |v|^2 = 3 + (d - 1) = d + 2;
- signs, their outer products, the sphere: |v|^2 = d always, so E (n.v)^2 |v|^2 = d.

For the mean of K directions:

- independent: a share 1 / K of all pairs are equal, the others give |grad f|^2 by Theorem 1, so
  (m + K - 1) / K of the m above: (d + K + 1) / K for normal ones, 1 + (d - 1) / K for the rest;
- orthogonal: g = (d / K) P grad f, P a projection on K random orthogonal directions, for which
  E|P n|^2 = K / d, so (d / K)^2 K / d = d / K.

A rank-one direction of a weight of d_W numbers has |u v'|^2 = d_W, whatever else moves: each
weight matrix alone has E|g_W|^2 = d_W |grad f|^2, as with signs. Measured on a network of two
layers, whose biases have signs in either case, and printed below the table. The numbers of one
network are not independent, |g_W|^2 / d_W is (grad f . v)^2 for all; nor are those of normal,
sphere and orthogonal directions, which are made of the same normals.

    python examples/variance.py [--runs 5] [--draws 600] [--out DIR] [--draw]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import figures
import torch
from figures import Line
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fwdcompile
from fwdcompile.directions import Directions, Normal, Rademacher, Sphere

KINDS: dict[str, Directions] = {
    "normal": Normal(),
    "rademacher": Rademacher(),
    "rank-one signs": Rademacher(rank_one=True),
    "sphere": Sphere(),
    "orthogonal": Sphere(orthogonal=True),
}
# rows and columns of the weight, that is classes and inputs
SHAPES = ((2, 5), (10, 10), (25, 40), (100, 100))
FIXED = (10, 10)
COUNTS = (1, 4, 16, 64)
EXAMPLES = 8
Problem = tuple[nn.Module, Tensor, Tensor]


def theory(kind: str, d: int, count: int) -> float:
    """The second moment over the squared norm of the gradient, for `count` directions of d."""
    if kind == "normal":
        return (d + count + 1) / count
    return d / count if kind == "orthogonal" else 1 + (d - 1) / count


def linear(shape: tuple[int, int]) -> Problem:
    """A linear classifier without a bias, some inputs and labels; d is the size of its weight."""
    classes, inputs = shape
    model = nn.Linear(inputs, classes, bias=False, dtype=torch.float64)
    return model, *examples(classes, inputs)


def network() -> Problem:
    """Two layers with biases."""
    layers = nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)
    return nn.Sequential(*layers).double(), *examples(4, 8)


def examples(classes: int, inputs: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(EXAMPLES, inputs, dtype=torch.float64)
    return x, torch.arange(EXAMPLES) % classes


def gradient_square(problem: Problem) -> float:
    """|grad f|^2 by backpropagation."""
    model, x, y = problem
    gradients = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    return float(sum((g * g).sum() for g in gradients))


def squares(
    problem: Problem, directions: Directions, count: int, seeds: Iterable[int], draws: int
) -> dict[int, Tensor]:
    """For each seed |g|^2 of each parameter in each draw, `[draws, parameters]`."""
    estimate = fwdcompile.ForwardGradient(
        problem[0], cross_entropy, directions=directions, samples=count, compile=False
    )
    found = {}
    for seed in seeds:
        estimate.load_state_dict({"iteration": 0, "seed": seed})
        found[seed] = torch.stack([_one(estimate, problem) for _ in range(draws)])
    return found


def _one(estimate: fwdcompile.ForwardGradient, problem: Problem) -> Tensor:
    model, x, y = problem
    model.zero_grad()
    estimate(x, y)
    return torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None])


def moment(values: Tensor) -> Line:
    """A mean over draws, its standard error, and how many draws they were."""
    error = float(values.std()) / math.sqrt(len(values))
    return {"moment": float(values.mean()), "error": error, "draws": len(values)}


def measured(
    shape: tuple[int, int], kind: str, count: int, seeds: Sequence[int], draws: int
) -> list[Line]:
    """A line for each seed: the moment on the linear classifier."""
    torch.manual_seed(0)
    problem = linear(shape)
    square = gradient_square(problem)
    found = squares(problem, KINDS[kind], count, seeds, draws)
    line = {"kind": "moment", "directions": kind, "d": math.prod(shape), "count": count}
    return [line | {"seed": seed} | moment(each[:, 0] / square) for seed, each in found.items()]


def by_parameter(kind: str, seeds: Sequence[int], draws: int) -> list[Line]:
    """A line for each parameter of the network and each seed, for one direction."""
    torch.manual_seed(0)
    problem = network()
    square = gradient_square(problem)
    lines = []
    for seed, each in squares(problem, KINDS[kind], 1, seeds, draws).items():
        for (name, p), values in zip(problem[0].named_parameters(), each.T, strict=True):
            line = {"kind": "parameter", "directions": kind, "parameter": name, "d": p.numel()}
            lines.append(line | {"seed": seed} | moment(values / square))
    return lines


def pooled(lines: Sequence[Line]) -> tuple[float, float]:
    """Mean and standard error over all seeds, which have equally many draws."""
    mean = sum(line["moment"] for line in lines) / len(lines)
    return mean, math.sqrt(sum(line["error"] ** 2 for line in lines)) / len(lines)


def draw(path: Path) -> None:
    """The figure from its lines: moments above, below them their quotients to theory."""
    header, lines = figures.read(path)
    moments = figures.of(lines, kind="moment")
    with figures.picture(path, 9, 5.6) as figure:
        axes = figure.subplots(2, 2, height_ratios=(2, 1), sharex="col", sharey="row")
        fixed = header["fixed"]
        panel(axes[:, 0], figures.of(moments, d=fixed), "count")
        panel(axes[:, 1], figures.of(moments, count=1), "d")
        axes[0, 0].set_title(f"d = {fixed}", loc="left")
        axes[0, 1].set_title("K = 1", loc="left")
        axes[0, 0].set_ylabel(r"E$|g|^2$ / $|\nabla f|^2$")
        axes[1, 0].set(xlabel="K, directions a step", ylabel="measured / theory")
        axes[1, 1].set_xlabel("d, numbers in a direction")
        axes[0, 1].legend(title="points: measured; lines: theory", fontsize=8)
        seeds = f"seeds {header['seeds'][0]} to {header['seeds'][-1]}"
        bars = "error bars: two standard errors"
        figure.supxlabel(f"{seeds}, {bars}; {figures.machine(header)}", fontsize=7)


def panel(axes: Any, lines: list[Line], over: str) -> None:
    """Moments and their quotients to theory against `over`, "count" or "d"."""
    above, below = axes
    kinds = list(dict.fromkeys(line["directions"] for line in lines))
    for number, kind in enumerate(kinds):
        own = figures.of(lines, directions=kind)
        places = sorted({line[over] for line in own})
        found = [pooled(figures.of(own, **{over: x})) for x in places]
        firsts = [figures.of(own, **{over: x})[0] for x in places]
        expected = [theory(kind, line["d"], line["count"]) for line in firsts]
        means, errors = ([pair[i] for pair in found] for i in (0, 1))
        # kinds that nearly agree: rings around each other above, bars side by side below
        ring = {"fmt": "o", "ms": 4 + 2 * number, "mfc": "none", "label": kind}
        above.plot(places, expected, color=f"C{number}", lw=0.9)
        above.errorbar(places, means, [2 * e for e in errors], color=f"C{number}", **ring)
        shifted = [x * 1.07 ** (number - (len(kinds) - 1) / 2) for x in places]
        heights = [m / t for m, t in zip(means, expected, strict=True)]
        bars = [2 * e / t for e, t in zip(errors, expected, strict=True)]
        below.errorbar(shifted, heights, bars, color=f"C{number}", fmt="o", ms=3.5, capsize=2)
    below.axhline(1, color="0.6", lw=0.8, zorder=0)
    above.set(xscale="log", yscale="log")
    ticks = sorted({line[over] for line in lines})
    below.set_xticks(ticks, [f"{x:,}" for x in ticks])
    below.minorticks_off()


def table(lines: list[Line]) -> str:
    """All means beside theory, and by how many standard errors they differ."""
    rows = ["| directions | d | K | measured | theory | standard errors apart |"]
    rows.append("|---|---|---|---|---|---|")
    for kind, d, count in dict.fromkeys(
        (line["directions"], line["d"], line["count"]) for line in figures.of(lines, kind="moment")
    ):
        found = figures.of(lines, kind="moment", directions=kind, d=d, count=count)
        rows.append(f"| {kind} | {d:,} | {count} | {row(found, theory(kind, d, count))} |")
    rows += ["", "| directions | parameter | measured | d_W | standard errors apart |"]
    rows.append("|---|---|---|---|---|")
    for kind, name in dict.fromkeys(
        (line["directions"], line["parameter"]) for line in figures.of(lines, kind="parameter")
    ):
        found = figures.of(lines, kind="parameter", directions=kind, parameter=name)
        rows.append(f"| {kind} | {name} | {row(found, found[0]['d'])} |")
    return "\n".join(rows)


def row(lines: list[Line], expected: float) -> str:
    mean, error = pooled(lines)
    apart = f"{(mean - expected) / error:+.1f}"
    return f"{short(mean)} ± {error:.{0 if error >= 10 else 2}f} | {short(expected)} | {apart}"


def short(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"


def main(
    out: Path = figures.RESULTS,
    runs: int = 5,
    draws: int = 600,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    fixed: tuple[int, int] = FIXED,
    counts: Sequence[int] = COUNTS,
) -> list[Line]:
    torch.set_num_threads(1)
    seeds = list(range(runs))
    # the mean of many directions spreads less: fewer draws give as small an error
    tasks = [(fixed, kind, k, draws // math.isqrt(k)) for k in counts for kind in KINDS]
    # one orthogonal direction is one on the sphere
    wide = [kind for kind in KINDS if kind != "orthogonal"]
    tasks += [(shape, kind, 1, draws) for shape in shapes if shape != fixed for kind in wide]
    header = figures.header(
        torch.device("cpu"), seeds=seeds, draws=draws, fixed=math.prod(fixed), shapes=list(shapes)
    )
    lines = [line for shape, kind, k, n in tasks for line in measured(shape, kind, k, seeds, n)]
    for kind in ("rademacher", "rank-one signs"):
        lines += by_parameter(kind, seeds, draws)
    figures.write(out / "variance.jsonl", [header, *lines])
    draw(out / "variance.jsonl")
    print(table(lines))
    return lines


if __name__ == "__main__":
    parser = figures.options(__doc__)
    parser.add_argument("--runs", type=int, default=5, help="seeds, each with all draws")
    parser.add_argument("--draws", type=int, default=600, help="of one direction, for each seed")
    asked = parser.parse_args()
    if asked.draw:
        draw(asked.out / "variance.jsonl")
    else:
        main(asked.out, asked.runs, asked.draws)
