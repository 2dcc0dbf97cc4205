"""Writes docs/beyond_torch.md: where torch.func.jvp raises or is wrong, and what fwdcompile gives.

    python benchmarks/beyond_torch.py [--samples 4] [--entries abs,addmm]

The samples are those of torch's own operator database, in float64. Two answers that differ by more
than `SAME` of the largest number are judged by five-point differences: of the function for the
first derivative, of fwdcompile's first derivative for the second.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from results import RESULTS
from torch import Tensor

import fwdcompile
from fwdcompile.program import is_differentiable
from fwdcompile.runner import environment

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/rules"))
import opinfo  # noqa: E402

FILE, PAGE = RESULTS / "beyond-torch.json", ROOT / "docs/beyond_torch.md"
SAME, RIGHT = 1e-9, 1e-5
STEPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)

Tensors = Sequence[Tensor]
Function = Callable[..., Tensors]


def relative(mine: Tensors, theirs: Tensors) -> float:
    """The largest difference, in units of the largest number; NaNs must be at the same places."""
    worst = 0.0
    for pair in zip(mine, theirs, strict=True):
        a, b = (x.to(torch.complex128) for x in pair)
        if not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        if a.numel():
            a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
            scale = max(float(b.abs().max()), float(a.abs().max()), 1e-3)
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def five_points(function: Function, primals: Tensors, dots: Tensors, step: float) -> list[Tensor]:
    """The derivative along `dots`, with an error of the order of step ** 4."""

    def at(distance: float) -> Tensors:
        return function(*(x + distance * d for x, d in zip(primals, dots, strict=True)))

    points = zip(at(-2 * step), at(-step), at(step), at(2 * step), strict=True)
    return [((a - d) + 8 * (c - b)) / (12 * step) for a, b, c, d in points]


def judge(mine: Tensors, theirs: Any, function: Function, primals: Tensors, dots: Tensors) -> Any:
    """What torch's answer is worth: "right", an error that it raised, or how wrong it is.

    Returns:
        The verdict, and the error of `mine` where it was measured.
    """
    if not isinstance(theirs, str) and relative(mine, theirs) <= SAME:
        return "right", None
    points = [five_points(function, primals, dots, step) for step in STEPS]
    error = min(relative(mine, x) for x in points)
    if isinstance(theirs, str):
        return theirs, error
    torchs = min(relative(theirs, x) for x in points)
    if all(not x.any() for x in theirs) and torchs > RIGHT:
        return "wrong: zero", error
    return (f"wrong by {torchs:.0e}" if torchs > 10 * error else "another convention"), error


def attempt(function: Callable[[], Any]) -> Any:
    """The result, or the first line of the error that torch raises."""
    try:
        return opinfo.seeded(function)
    except (NotImplementedError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        return "raises: " + line.split(". Please")[0].split(" because")[0][:110]


def compare(case: opinfo.Case) -> dict[str, Any]:
    """Torch's verdicts at first and second order, and fwdcompile's errors."""
    dots = opinfo.directions(case)
    primals, v = tuple(case.tensors[i] for i in dots), tuple(dots.values())
    reference = opinfo.along(case, dots)
    fwd = fwdcompile.transform(case.function)
    twice = fwdcompile.transform(fwd)
    named = {f"xs.{i}": dot for i, dot in dots.items()}

    def first(*xs: Tensor) -> Tensors:
        full = opinfo.filled(case, dots, xs)
        outs, out_dots = opinfo.seeded(lambda: fwd(*full, tangents=named))
        return [d for x, d in zip(outs, out_dots, strict=True) if is_differentiable(x)]

    (outs, _), (_, ddots) = opinfo.seeded(lambda: twice(*case.tensors, tangents=named))
    mine = [d for x, d in zip(outs, ddots, strict=True) if is_differentiable(x)]
    theirs = attempt(lambda: list(torch.func.jvp(reference, primals, v)[1]))
    one, error = judge(first(*primals), theirs, reference, primals, v)
    inner = lambda *xs: tuple(torch.func.jvp(reference, xs, v)[1])  # noqa: E731
    theirs = attempt(lambda: list(torch.func.jvp(inner, primals, v)[1]))
    two, error2 = judge(mine, theirs, first, primals, v)
    return {"first": one, "second": two, "error": error, "error2": error2}


def examine(name: str, samples: int) -> dict[str, Any] | None:
    """The first sample of an entry on which torch is not right, or what the last one gave."""
    found: dict[str, Any] | None = None
    for case in opinfo.cases(opinfo.entries()[name], limit=samples):
        if not sum(case.tensors[i].numel() for i in case.active):
            continue
        try:
            found = compare(case)
        except fwdcompile.FwdcompileError as error:
            found = found or {"refused": str(error).strip().splitlines()[-1].strip()}
            continue
        if {found["first"], found["second"]} != {"right"}:
            break
    return found


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    entries: dict[str, dict[str, Any]] = result["entries"]
    compared = {name: e for name, e in entries.items() if "first" in e}
    counts = {
        (order, word): sum(e[order].startswith(word) for e in compared.values())
        for order in ("first", "second")
        for word in ("right", "raises", "wrong")
    }
    lines = [
        "# Beyond torch's forward mode",
        "",
        f"torch.func.jvp and fwdcompile on {len(compared)} entries of torch's operator database,",
        f"{result['samples']} samples each, in float64. Written by `make beyond-torch`.",
        "",
        "| derivative | torch is right | torch raises | torch is wrong without an error |",
        "|---|---|---|---|",
    ]
    for order in ("first", "second"):
        cells = (str(counts[order, word]) for word in ("right", "raises", "wrong"))
        lines.append(f"| {order} | {' | '.join(cells)} |")
    lines += [
        "",
        "Where torch is not right, fwdcompile's error is measured against five-point differences,",
        "in units of the largest number. `-`: torch is right there, and both agree to 1e-9.",
        "",
        "| entry | torch, first derivative | fwdcompile | torch, second derivative | fwdcompile |",
        "|---|---|---|---|---|",
    ]
    for name, e in sorted(compared.items()):
        if {e["first"], e["second"]} != {"right"}:
            cells = [e["first"], _number(e["error"]), e["second"], _number(e["error2"])]
            lines.append(f"| {name} | {' | '.join(c.replace('|', '/') for c in cells)} |")
    machine = result["environment"]
    left = ", ".join(f"{name} ({why})" for name, why in opinfo.REVERSE.items())
    lines += [
        "",
        f"Left out: {left}; what fwdcompile refuses is in [coverage.md](coverage.md).",
        f"torch {machine['torch']}, {machine['device']}.",
        "",
    ]
    return "\n".join(lines)


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--entries", type=lambda text: text.split(","))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kept = options.entries and FILE.exists()
    known = json.loads(FILE.read_text())["entries"] if kept else {}
    for name in options.entries or sorted(opinfo.entries().keys() - opinfo.REVERSE.keys()):
        found = examine(name, options.samples)
        if found:
            known[name] = found
            if set(found.values()) != {"right", None}:
                print(name, found, flush=True)
    result = {
        "environment": environment(torch.device("cpu")),
        "samples": options.samples,
        "entries": {n: e for n, e in sorted(known.items()) if n not in opinfo.REVERSE},
    }
    FILE.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page(result))


if __name__ == "__main__":
    main()
