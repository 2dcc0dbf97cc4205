"""A generated program with what it was made of, and its module."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
from torch import fx

from .emit import emit, execute
from .errors import FwdcompileError
from .graph import program_graph
from .program import Program

Function = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True, repr=False)
class Lowered:
    """One generated program: its text, the graph of each stage, and the function to run.

    Attributes:
        program: the program that was printed, with the meaning of its inputs and outputs.
        nestable: the same before tangents were cut off autograd; a further transform starts here.
        stages: the graph after `capture`, `transform` and `simplify`.
        code: the source text.
        function: `forward` of the generated module, compiled if that was asked for.
    """

    program: Program
    nestable: Program
    stages: dict[str, fx.Graph]
    code: str
    function: Function

    def __repr__(self) -> str:
        inputs = ", ".join(f"{slot.kind} {slot.name}" for slot in self.program.inputs)
        return f"<Lowered {self.program.title}({inputs}), {len(self.program.graph.nodes)} nodes>"

    def graph(self) -> nx.DiGraph[str]:
        """The program as a networkx graph; see `fwdcompile.graph.program_graph`."""
        return program_graph(self.program)


class Shown:
    """What generates programs, and shows the one that it generated last."""

    _last: Lowered | None

    @property
    def program(self) -> Program:
        """The program generated last."""
        return self._latest().program

    @property
    def code(self) -> str:
        """Source text of the program generated last."""
        return self._latest().code

    @property
    def stages(self) -> dict[str, fx.Graph]:
        """The graphs after `capture`, `transform` and `simplify` of the program generated last."""
        return self._latest().stages

    def graph(self) -> nx.DiGraph[str]:
        """The program generated last as a networkx graph."""
        return self._latest().graph()

    def save(self, path: str | Path) -> None:
        """Writes the program generated last to a Python file that needs torch alone."""
        Path(path).write_text(self.code)

    def _latest(self) -> Lowered:
        if self._last is None:
            raise FwdcompileError("nothing is captured yet: call it, or use .lower(*inputs)")
        return self._last


_numbers = itertools.count()


def generate(
    program: Program,
    nestable: Program,
    stages: dict[str, fx.Graph],
    passes: Sequence[str],
    compiled: Callable[[Function], Function],
) -> Lowered:
    """Prints a program and loads it as a module, which lives as long as what is returned.

    Args:
        program: as `Lowered` has it, like `nestable` and `stages`.
        nestable: before tangents were cut off autograd.
        stages: the graphs on the way.
        passes: that were taken; the text names them.
        compiled: from the module's `forward` to the function to run.
    """
    code = emit(program, passes)
    constants = ((n.name, s) for n, s in program.placeholders() if s.kind == "constant")
    live = {name: program.constants[slot.name] for name, slot in constants}
    name = f"fwdcompile_generated_{next(_numbers)}"
    function = compiled(execute(code, name, live).forward)
    lowered = Lowered(program, nestable, stages, code, function)
    weakref.finalize(lowered, sys.modules.pop, name, None)
    return lowered
