"""Peak memory of the jvp of attention by its queries, keys and values, against the length.

    python benchmarks/attention.py [--lengths 1024,4096,8192] [--out docs/results]

Ours is the emitted program, whose tangent works over blocks of queries; the rival is what one
writes without it: softmax(Q K') V by hand under torch.func.jvp, which keeps all scores. Each runs
eagerly in a process of its own; `fwdcompile.measure` counts the peak.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import RESULTS, THREADS, publish
from torch import Tensor

import fwdcompile
from fwdcompile.measure import MIB, in_fresh_process, resident_peak
from fwdcompile.runner import environment

HEADS, WIDTH = 8, 64
METHODS = ("fused", "fwdcompile", "by hand")


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = q @ k.mT / math.sqrt(WIDTH)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ v


def action(method: str, length: int, causal: bool) -> Callable[[], Any]:
    """One evaluation by a method; `fused` is torch's kernel for the primal alone."""
    qkv = tuple(torch.randn(1, HEADS, length, WIDTH) for _ in range(3))
    dots = tuple(torch.randn(1, HEADS, length, WIDTH) for _ in range(3))
    fused = torch.nn.functional.scaled_dot_product_attention
    if method == "fused":
        return lambda: fused(*qkv, is_causal=causal)
    if method == "by hand":
        return lambda: torch.func.jvp(lambda q, k, v: plain(q, k, v, causal), qkv, dots)
    fwd = fwdcompile.transform(lambda q, k, v: fused(q, k, v, is_causal=causal))
    tangents = dict(zip("qkv", dots, strict=True))
    return lambda: fwd(*qkv, tangents=tangents)


def measure(method: str, length: str, causal: str) -> float:
    """MiB beyond inputs and tangents."""
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    run = action(method, int(length), causal == "causal")
    run()
    return resident_peak(run) / MIB


def fresh(*case: str) -> float:
    """`measure` in a new process."""
    return float(in_fresh_process(__file__, "--one", *case))


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"MiB above inputs and tangents, 1 x {HEADS} heads of width {WIDTH}, float32, eager. "
        "`fused` is the primal alone by torch's own kernel.\n",
        f"| length | mask | {' | '.join(METHODS)} |",
        "|---|---|" + "---|" * len(METHODS),
    ]
    for row in result["rows"]:
        cells = " | ".join(f"{row[m]:.0f}" for m in METHODS)
        lines.append(f"| {row['length']} | {row['mask']} | {cells} |")
    machine = result["environment"]
    lines.append(f"\n{machine['device']}, torch {machine['torch']}, {THREADS} threads.")
    return "\n".join(lines) + " Written by `make bench-attention`.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,4096,8192")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, help="for the fresh process: measures here, one method")
    options = parser.parse_args()
    if options.one:
        print(measure(*options.one))
        return
    rows = [
        {"length": int(length), "mask": mask} | {m: fresh(m, length, mask) for m in METHODS}
        for length in options.lengths.split(",")
        for mask in ("none", "causal")
    ]
    result = {"environment": environment(torch.device("cpu")), "rows": rows}
    publish(options.out, "attention-cpu", result, page(result))


if __name__ == "__main__":
    main()
