"""Checks the rows that a captured function reaches, for ops whose inputs must be prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from check import run
from torch import Tensor

from fwdcompile.capture import capture
from fwdcompile.nesting import as_primal
from fwdcompile.program import Program
from fwdcompile.transform import transform

Function = Callable[..., Any]


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers that depend on nothing but the arguments."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def check_function(
    function: Function,
    *xs: Tensor,
    same: Function | None = None,
    oracle: str = "jvp",
    second: bool = True,
) -> set[Any]:
    """Checks the first derivative of a function, and the second by differences of the first.

    Args:
        function: returns a tensor or a tuple of tensors.
        xs: its arguments; all of them get a tangent.
        same: what torch differentiates, where its forward mode refuses `function` itself.
        oracle: "jvp" is torch.func.jvp, "difference" central differences.
        second: whether the second derivative is checked.

    Returns:
        The ops of the captured program.
    """
    program = capture(function, xs, {})
    names = [slot.name for slot in program.inputs if slot.kind == "input"]
    constants = [program.constants[slot.name] for slot in program.inputs if slot.kind == "constant"]
    dots = tuple(normal(*x.shape, seed=9 + i, dtype=x.dtype) for i, x in enumerate(xs))
    first = as_primal(transform(program, names))

    def along(step: float) -> tuple[Tensor, ...]:
        return tuple(x + step * dot for x, dot in zip(xs, dots, strict=True))

    def tangents(of: Program, *inputs: Tensor) -> list[Tensor]:
        outs = run(of, *constants, *inputs)
        kind = "output" if of is first else "tangent"
        named = zip(of.outputs, outs, strict=True)
        return [out for slot, out in named if slot.kind == kind and slot.name.endswith("_dot")]

    mine = tangents(first, *xs, *dots)
    if oracle == "jvp":
        _, expected = torch.func.jvp(same or function, xs, dots)
        torch.testing.assert_close(mine, _listed(expected), rtol=1e-8, atol=1e-8)
    else:
        pairs = zip(_listed(function(*along(1e-6))), _listed(function(*along(-1e-6))), strict=True)
        torch.testing.assert_close(mine, [(a - b) / 2e-6 for a, b in pairs], rtol=1e-5, atol=1e-6)
    if second:
        pairs = zip(
            tangents(first, *along(1e-5), *dots), tangents(first, *along(-1e-5), *dots), strict=True
        )
        slopes = [(a - b) / 2e-5 for a, b in pairs]
        twice = tangents(transform(first, names), *xs, *dots, *dots)
        torch.testing.assert_close(twice, slopes, rtol=1e-4, atol=1e-5)
    return {node.target for node in program.graph.nodes}


def _listed(outs: Any) -> list[Tensor]:
    return list(outs) if isinstance(outs, tuple | list) else [outs]
