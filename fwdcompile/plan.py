"""Plan: a compiled step, and where the tensors are kept that it reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from .binding import refuse_shared
from .lowered import Lowered
from .program import Slot


@dataclass(frozen=True, eq=False)
class Plan:
    """A compiled step for one kind of input, and the tensors it reads and writes."""

    run: Callable[..., Any]
    lowered: Lowered
    state: dict[str, tuple[Any, str]]
    leaves: dict[str, int]

    @cached_property
    def slots(self) -> list[Slot]:
        """What `tensors` stand for."""
        return plain_slots(self.lowered)

    def tensors(self, inputs: Sequence[Any]) -> list[Tensor]:
        """What the program reads, in its order; state is looked up anew, it may be replaced.

        Raises:
            TangentError: one that the program writes to shares memory with another.
        """
        found = []
        for slot in self.slots:
            if slot.kind == "input":
                found.append(inputs[self.leaves[slot.name]])
            else:
                home, key = self.state[slot.name]
                found.append(home[key])
        program = self.lowered.program
        refuse_shared(self.slots, program.changed, found, program.constants)
        return found

    def written(self, inputs: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """The buffers and the inputs that the program changes."""
        slots = self.lowered.program.outputs
        homes = (self.state[slot.name] for slot in slots if slot.kind == "buffer")
        changed = [inputs[self.leaves[slot.name]] for slot in slots if slot.kind == "input"]
        return [home[key] for home, key in homes], changed

    def trained(self) -> list[Tensor]:
        """The parameters that have tangents, in the order of their keys, then all others."""
        program = self.lowered.program
        names = [slot.name for slot in program.inputs if slot.kind == "tangent"]
        names += [slot.name for slot in program.outputs if slot.kind == "gradient"]
        homes = (self.state[name] for name in dict.fromkeys(names) if name in self.state)
        return [home[key] for home, key in homes]


def plain_slots(lowered: Lowered) -> list[Slot]:
    """What the tensors of a step stand for: all that a program reads but tangents and constants."""
    return [s for s in lowered.program.inputs if s.kind not in ("tangent", "constant")]


def moving(lowered: Lowered) -> tuple[list[int], list[int]]:
    """The places of inputs among the tensors of a step, and of those that the program changes."""
    inputs = {s.name: i for i, s in enumerate(plain_slots(lowered)) if s.kind == "input"}
    return [*inputs.values()], [i for name, i in inputs.items() if name in lowered.program.changed]
