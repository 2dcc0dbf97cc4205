"""Random programs of plain torch, for hypothesis: each step is run as soon as it is drawn."""

from __future__ import annotations

import math
import string
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from program_code import Program, Step
from program_moves import FAMILIES
from program_ops import SMOOTH, Op
from torch import Tensor

LEAST_STEPS, MOST_STEPS = 5, 30
MOST_NUMBERS = 256  # in one tensor
LARGEST = 8.0  # value that is passed on without being scaled down


class UnfitError(Exception):
    """An op has no operands of the shapes it needs, or torch refuses those it was given."""


Draw = Callable[[st.SearchStrategy[Any]], Any]
Static = Callable[[Draw, Tensor, dict[str, str]], Any]


def _one_of(draw: Draw, *choices: Any) -> Any:
    return draw(st.sampled_from(choices))


def _dim(draw: Draw, x: Tensor, seen: dict[str, str]) -> int:
    return draw(st.integers(0, 2 * x.ndim - 1)) - x.ndim if x.ndim else _one_of(draw, 0, -1)


def _dims(draw: Draw, x: Tensor, seen: dict[str, str]) -> tuple[int, ...]:
    order = draw(st.permutations(range(x.ndim)))
    return tuple(order[: draw(st.integers(min(1, x.ndim), x.ndim))])


def _shape(draw: Draw, x: Tensor, seen: dict[str, str]) -> tuple[int, ...]:
    """Merges neighbouring sizes, or splits a factor or a one off."""
    shape = list(x.shape)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, max(len(shape) - 1, 0)))
        factor = _one_of(draw, 1, 2, 3)
        if len(shape) > place + 1 and draw(st.booleans()):
            shape[place : place + 2] = [shape[place] * shape[place + 1]]
        elif not shape or shape[place] % factor:
            shape.insert(place, 1)
        else:
            shape[place : place + 1] = [factor, shape[place] // factor]
    return tuple(shape)


def _cut(draw: Draw, x: Tensor, seen: dict[str, str]) -> str:
    """Subscripts: slices, places, new dimensions."""
    items = [_one_of(draw, ":", "1:", ":-1", "::2", "1:3", "0", "-1") for _ in range(x.ndim)]
    items = items[: draw(st.integers(0, x.ndim))]
    return ", ".join([*items, "..."] if draw(st.booleans()) else ["...", *items])


def _place(draw: Draw, x: Tensor, seen: dict[str, str]) -> int:
    dim = int(seen["dim"])
    if not x.ndim or not x.shape[dim]:
        raise UnfitError
    return draw(st.integers(0, x.shape[dim] - 1))


def _index(dim: int | None) -> Static:
    def draw_index(draw: Draw, x: Tensor, seen: dict[str, str]) -> str:
        along = int(seen["dim"]) if dim is None else dim
        if not x.ndim or not x.shape[along]:
            raise UnfitError
        places = st.lists(st.integers(0, x.shape[along] - 1), min_size=1, max_size=3)
        return f"torch.tensor({draw(places)})"

    return draw_index


def _pads(draw: Draw, x: Tensor, seen: dict[str, str]) -> tuple[int, ...]:
    count = draw(st.integers(1, max(x.ndim, 1)))
    return tuple(draw(st.integers(-1, 2)) for _ in range(2 * count))


STATICS: dict[str, Static] = {
    "c": lambda draw, x, seen: _one_of(draw, 0.5, -0.75, 1.25),
    "k": lambda draw, x, seen: _one_of(draw, 1, 2, 3),
    "k2": lambda draw, x, seen: _one_of(draw, 1, 2),
    "p": lambda draw, x, seen: _one_of(draw, 2, 1, 3, "math.inf"),
    "keep": lambda draw, x, seen: draw(st.booleans()),
    "shift": lambda draw, x, seen: _one_of(draw, 0, 1, -1, 2),
    "dim": _dim,
    "dim2": _dim,
    "new": lambda draw, x, seen: draw(st.integers(-x.ndim - 1, x.ndim)),
    "dims": _dims,
    "perm": lambda draw, x, seen: tuple(draw(st.permutations(range(x.ndim)))),
    "shape": _shape,
    "cut": _cut,
    "place": _place,
    "index": _index(None),
    "first": _index(0),
    "last": _index(-1),
    "pads": _pads,
}


def _fields(text: str) -> list[str]:
    found = (name for _, name, _, _ in string.Formatter().parse(text) if name)
    return list(dict.fromkeys(found))


class _Builder:
    """Draws steps and runs each at once, so that the next is drawn for real shapes and values."""

    def __init__(self, draw: Draw, inputs: Sequence[Tensor], writes_inputs: bool) -> None:
        self.draw = draw
        self.values = {f"x{i}": x for i, x in enumerate(inputs)}
        self.read_only = set() if writes_inputs else {_memory(x) for x in inputs}
        self.steps: list[Step] = []

    def add(self, family: Sequence[Op]) -> None:
        """Adds a step of a family; one that smooths its operand where three ops do not fit."""
        for ops in (family, family, family, SMOOTH):
            try:
                return self._run(self._step(self.draw(st.sampled_from(ops))))
            except (UnfitError, RuntimeError, IndexError, ValueError, Warning):
                continue
        raise AssertionError("no smooth op fits")

    def _step(self, op: Op) -> Step:
        operands: dict[str, str] = {}
        statics: dict[str, str] = {}
        fields = [field for field in _fields(op.text) if field != "out"]
        for field in (field for field in fields if field not in STATICS):
            operands[field] = self._operand(op, field, operands)
        first = self.values[next(iter(operands.values()))]
        for field in (field for field in fields if field in STATICS):
            statics[field] = str(STATICS[field](self.draw, first, statics))
        out = f"v{len(self.steps)}"
        return Step(op, tuple(operands.items()), tuple(statics.items()), out)

    def _operand(self, op: Op, field: str, operands: dict[str, str]) -> str:
        names = [name for name, x in self.values.items() if self._fits(op, field, operands, x)]
        if not names:
            raise UnfitError
        # half of all operands are the newest value, so that programs grow deep
        return names[-1] if self.draw(st.booleans()) else self.draw(st.sampled_from(names))

    def _fits(self, op: Op, field: str, operands: dict[str, str], x: Tensor) -> bool:
        if field == "i":
            return not x.is_floating_point()
        if not x.is_floating_point():
            return False
        least, most = op.ndim
        if field == "w":
            return _memory(x) not in self.read_only and not torch._debug_has_internal_overlap(x)
        if field == "x":
            return least <= x.ndim <= most
        return op.fits(self.values[operands["x"]], x)

    def _run(self, step: Step) -> None:
        out = self._value(step)
        if out.numel() > MOST_NUMBERS or not bool(out.isfinite().all()):
            raise UnfitError
        size = float(out.abs().max()) if out.is_floating_point() and out.numel() else 0.0
        if size > LARGEST:
            scale = 2 ** math.ceil(math.log2(size))
            step, out = replace(step, scale=scale), out / scale
        if ".detach()" in step.op.text:
            self.read_only.add(_memory(out))
        self.values[step.out] = out
        self.steps.append(step)

    def _value(self, step: Step) -> Tensor:
        scope = {"math": math, "torch": torch, "F": F} | self.values
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(step.code, scope)
        return scope[step.out]


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@st.composite
def shapes(draw: Draw) -> list[tuple[int, ...]]:
    """Shapes of one to four inputs, most of which broadcast with the first."""
    size = st.sampled_from([2, 1, 3, 4] if draw(st.integers(0, 15)) < 15 else [0, 1, 2])
    first = [draw(size) for _ in range(draw(st.integers(0, 4)))]
    found = [tuple(first)]
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["same", "broadcast", "other"]))
        if kind == "broadcast":
            kept = [1 if draw(st.booleans()) else n for n in first]
            found.append(tuple(kept[draw(st.integers(0, len(kept))) :]))
        else:
            found.append(tuple(first if kind == "same" else draw(st.lists(size, max_size=3))))
    return found


@st.composite
def _further(draw: Draw, builder: _Builder, table: Sequence[Sequence[Op]]) -> bool:
    """Adds a step; a strategy of its own, so that hypothesis can take the step out again."""
    builder.draw = draw
    builder.add(draw(st.sampled_from(table)))
    return len(builder.steps) < LEAST_STEPS or draw(st.integers(0, 29)) > 0


@st.composite
def programs(draw: Draw, second_order: bool = False) -> Program:
    """Programs of 5 to 30 steps.

    Args:
        second_order: leaves out the ops whose second derivative torch has wrong, or not at all.
    """
    table = [[op for op in ops if op.second_order or not second_order] for ops in FAMILIES.values()]
    sizes = tuple(draw(shapes()))
    numbers = range(len(sizes))
    active = tuple(i for i in numbers if draw(st.integers(0, 3)) > 0) or (0,)
    start = Program(sizes, active, draw(st.integers(0, 999)))
    builder = _Builder(draw, start.inputs, draw(st.integers(0, 7)) == 7)
    while len(builder.steps) < MOST_STEPS and draw(_further(builder, table)):
        pass
    outputs = _outputs(draw, builder)
    # steps that nothing needs stay most of the time, but a failing program shrinks to the others
    steps = builder.steps if draw(st.integers(0, 15)) > 0 else _needed(builder.steps, outputs)
    return replace(start, steps=tuple(steps), outputs=outputs)


def _needed(steps: Sequence[Step], outputs: Sequence[str]) -> list[Step]:
    """The steps that the outputs are made of, and all that write to earlier values."""
    names, kept = set(outputs), []
    for step in reversed(steps):
        if step.out in names or "w" in dict(step.operands):
            names |= {name for _, name in step.operands}
            kept.append(step)
    return kept[::-1]


def _outputs(draw: Draw, builder: _Builder) -> tuple[str, ...]:
    """The last value, most of those that no step uses, and now and then an input as it is."""
    used = {name for step in builder.steps for _, name in step.operands}
    idle = [name for name in builder.values if name.startswith("v") and name not in used]
    kept = [name for name in idle[:-1] if draw(st.integers(0, 3)) > 0]
    given = ["x0"] if draw(st.integers(0, 7)) == 7 or not idle else []
    return (*kept, *idle[-1:], *given)
