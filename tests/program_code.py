"""A random program as a small immutable value: printed as code, called as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from program_ops import Op
from torch import Tensor

_MODULE = """\
import math

import torch
import torch.nn.functional as F


def f({arguments}):
    {body}


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=generator)


generator = torch.Generator().manual_seed({seed})
inputs = [{inputs}]
tangents = {{{tangents}}}
"""

_COMPARISON = """
import fwdcompile

y, y_dot = fwdcompile.transform(f)(*(x.clone() for x in inputs), tangents=tangents)
dots = tuple(tangents.get(f"x{i}", torch.zeros_like(x)) for i, x in enumerate(inputs))
expected, expected_dot = torch.func.jvp(f, tuple(inputs), dots)
for mine, theirs in zip((*y, *y_dot), (*expected, *expected_dot)):
    print(mine, theirs, sep="\\n")
"""


@dataclass(frozen=True)
class Step:
    """One line of a program: a row of the table, and what stands in its fields.

    `scale` divides a result that would be too large for the steps behind it.
    """

    op: Op
    operands: tuple[tuple[str, str], ...]
    statics: tuple[tuple[str, str], ...]
    out: str
    scale: int = 1

    @property
    def code(self) -> str:
        text = self.op.text if "{out}" in self.op.text else f"{{out}} = {self.op.text}"
        line = text.format(out=self.out, **dict(self.operands), **dict(self.statics))
        return line if self.scale == 1 else f"{line}; {self.out} = {self.out} / {self.scale}"


@dataclass(frozen=True)
class Program:
    """A function of tensors x0, x1, ...; its `repr` is a script that compares it with torch."""

    shapes: tuple[tuple[int, ...], ...]
    active: tuple[int, ...]
    seed: int
    steps: tuple[Step, ...] = ()
    outputs: tuple[str, ...] = ("x0",)

    @property
    def code(self) -> str:
        """A module that defines `f`, `inputs` and `tangents`."""
        lines = [step.code for step in self.steps] + [f"return ({', '.join(self.outputs)},)"]
        return _MODULE.format(
            arguments=", ".join(f"x{i}" for i in range(len(self.shapes))),
            body="\n    ".join(lines),
            seed=self.seed,
            inputs=", ".join(map(_drawn, self.shapes)),
            tangents=", ".join(f'"x{i}": {_drawn(self.shapes[i])}' for i in self.active),
        )

    @cached_property
    def module(self) -> dict[str, Any]:
        """The names that `code` defines."""
        module: dict[str, Any] = {}
        exec(compile(self.code, "program.py", "exec"), module)
        return module

    @property
    def f(self) -> Callable[..., tuple[Tensor, ...]]:
        function: Callable[..., tuple[Tensor, ...]] = self.module["f"]
        return function

    @property
    def inputs(self) -> list[Tensor]:
        """Fresh copies, because a program may write to them."""
        return [x.clone() for x in self.module["inputs"]]

    @property
    def tangents(self) -> dict[str, Tensor]:
        """A tangent for each active input, by name."""
        tangents: dict[str, Tensor] = self.module["tangents"]
        return tangents

    @cached_property
    def other_tangents(self) -> dict[str, Tensor]:
        """A second direction."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return {
            name: torch.randn(dot.shape, dtype=dot.dtype, generator=generator)
            for name, dot in self.tangents.items()
        }

    @property
    def tolerance(self) -> float:
        """How far derivatives may be apart: 1e-9, or what the coarsest op asks for."""
        return max([1e-9, *(step.op.tolerance for step in self.steps)])

    def __repr__(self) -> str:
        return self.code + _COMPARISON

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis calls to print a failing program."""
        printer.text(f"\n{self!r}")


def _drawn(shape: Sequence[int]) -> str:
    return f"draw({', '.join(map(str, shape))})"
