"""What moves with which loss, as workers and histories have to agree on it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from torch import Tensor

from .drawing import kinds_of
from .lowered import Lowered
from .program import outputs_reached
from .stepper import sum_of


@dataclass(frozen=True)
class Layout:
    """What a program's parameters have to do with its losses.

    Attributes:
        losses: those with a slope, by name.
        sets: the sets of losses that some parameter can move.
        parameters: in the order of their keys, each with the number of its set, or None.
    """

    losses: tuple[str, ...]
    sets: tuple[tuple[str, ...], ...]
    parameters: tuple[tuple[str, int | None], ...]

    @staticmethod
    def of(lowered: Lowered) -> Layout:
        """The layout of a generated program."""
        program = lowered.program
        reached = outputs_reached(program)
        moved = {slot.name for slot in program.outputs if slot.kind == "tangent"}
        losses = [s.name for s in program.outputs if s.kind == "output" and s.name in moved]
        sets = tuple(dict.fromkeys(names for names in reached.values() if names))
        numbers = {names: number for number, names in enumerate(sets)}
        parameters = [(name, numbers.get(reached[name])) for name in kinds_of(lowered)]
        return Layout(tuple(losses), sets, tuple(parameters))

    @property
    def fingerprint(self) -> int:
        """Tells layouts apart."""
        return zlib.crc32(repr(self).encode())

    def moves(self, each: Tensor) -> list[Tensor]:
        """Numbers `[losses, G]`, one row for each loss, summed for each set of losses: `[G]`."""
        rows = dict(zip(self.losses, each, strict=True))
        return [sum_of(rows[name] for name in names) for names in self.sets]
