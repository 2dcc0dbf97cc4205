"""Dual: a higher-order op becomes one that computes tangents as well.

`transform` applies to the programs that the op calls as to any program. The op then takes the
tangents of its operands behind them, and returns the tangents of its results behind those, so that
nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from torch import fx

from .program import Program, Slot, programs_of, value
from .subgraph import CONVENTIONS, operands_of, plain, set_outputs
from .trace import Recorder

T = TypeVar("T")
Transform = Callable[[Program, Collection[str], int], Program]


@dataclass(frozen=True)
class Dual:
    """A higher-order op with tangents.

    Attributes:
        programs: of the op, with tangents; they take the place of the primal ones.
        active: which of the operands, counted through all lists, need a tangent.
        reached: which of the results have one.
        operands: lengths of the lists of operands.
        results: lengths of the lists of results, those that are carried apart.
        directions: how many tangents each has.
    """

    programs: tuple[Program, ...]
    active: tuple[int, ...]
    reached: tuple[int, ...]
    operands: tuple[int, ...]
    results: tuple[int, ...]
    directions: int

    def install(
        self, node: fx.Node, dots: Mapping[int, Sequence[fx.Node]], recorder: Recorder
    ) -> tuple[list[int], list[tuple[fx.Node | None, ...]]]:
        """Makes a primal op the dual one.

        Args:
            node: the op, whose results nobody uses yet.
            dots: tangents of the active operands, by place.
            recorder: of the graph that the node is in.

        Returns:
            Where each primal result now stands, and for each direction the tangents of all results.
        """
        primals = [arg for group in operands_of(node) for arg in group]
        lists = iter(woven(primals, dots, self.operands))
        programs = iter(self.programs)
        places = CONVENTIONS[node.target].operands
        node.args = tuple(
            next(programs)
            if isinstance(arg, Program)
            else tuple(next(lists))
            if i in places
            else arg
            for i, arg in enumerate(node.args)
        )
        outs, ways = value(node), range(self.directions)
        with recorder.fakes:
            out_dots = {i: [torch.empty_like(outs[i]) for _ in ways] for i in self.reached}
        node.meta["val"] = tuple(chain(*woven(outs, out_dots, self.results)))
        keys = {i: [(i, k) for k in ways] for i in self.reached}
        order = chain(*woven([(i, -1) for i in range(len(outs))], keys, self.results))
        place = {key: at for at, key in enumerate(order)}
        made = [
            tuple(
                recorder.item(node, place[i, k]) if i in self.reached else None
                for i in range(len(outs))
            )
            for k in ways
        ]
        return [place[i, -1] for i in range(len(outs))], made


def dual(node: fx.Node, active: Collection[int], directions: int, transform: Transform) -> Dual:
    """Differentiates the programs that a higher-order op calls.

    A result has a tangent if it has one in either branch; the other branch returns zeros. What is
    carried has a tangent if it starts with one, or the body gives it one: the body is transformed
    again until nothing is added. The programs of conditions see primal values alone.

    Args:
        node: an op of `CONVENTIONS`.
        active: which of its operands have tangents, counted through all lists.
        directions: how many tangents each of them has.
        transform: of the module of this name.
    """
    convention = CONVENTIONS[node.target]
    operands = tuple(map(len, operands_of(node)))
    programs = programs_of(node)
    conditions, bodies = programs[: convention.conditions], programs[convention.conditions :]
    carried = range(operands[0] if convention.carried else 0)
    while True:
        names = [[p.inputs[i].name for i in sorted(active)] for p in bodies]
        made = [transform(p, n, directions) for p, n in zip(bodies, names, strict=True)]
        reached = {i for program in made for i in _reached(program)}
        if reached.intersection(carried) <= set(active):
            break
        active = {*active, *reached.intersection(carried)}
    reached |= set(carried).intersection(active)
    count = len(bodies[0].outputs)
    results = (len(carried), count - len(carried))
    duals = [_arranged(p, operands, results, reached) for p in made]
    widened = [_widened(p, sorted(active), directions, operands) for p in conditions]
    return Dual(
        (*widened, *duals),
        tuple(sorted(active)),
        tuple(sorted(reached)),
        operands,
        results,
        directions,
    )


def woven(
    primals: Sequence[T], dots: Mapping[int, Sequence[T]], lengths: Sequence[int]
) -> list[list[T]]:
    """Cuts a flat list into lists, each with its tangents, given by place, behind its primals."""
    lists, start = [], 0
    for length in lengths:
        places = range(start, start + length)
        lists.append([primals[i] for i in places] + [d for i in places for d in dots.get(i, ())])
        start += length
    return lists


def _reached(program: Program) -> set[int]:
    """Places of the primal outputs that have a tangent other than zeros made up for them."""
    places = {slot.name: i for i, slot in enumerate(program.outputs) if slot.kind == "output"}
    return {
        places[slot.name]
        for node, slot in program.results()
        if slot.kind == "tangent" and not node.meta.get("absent")
    }


def _arranged(
    program: Program, operands: Sequence[int], results: Sequence[int], reached: Collection[int]
) -> Program:
    """A transformed program with its inputs and outputs in the order of the dual op."""
    primals, dots = _parted([(node, slot) for node, slot in program.placeholders()])
    _order_inputs(program.graph, woven(primals, dots, operands))
    outs, out_dots = _parted(list(program.results()))
    kept = {i: d for i, d in out_dots.items() if i in reached}
    set_outputs(program.graph, list(chain(*woven(outs, kept, results))))
    return plain(program.graph)


def _parted(pairs: list[tuple[fx.Node, Slot]]) -> tuple[list[fx.Node], dict[int, list[fx.Node]]]:
    """Nodes of primals, and nodes of tangents by the place of their primal."""
    primals = [(node, slot.name) for node, slot in pairs if slot.kind != "tangent"]
    places = {name: i for i, (_, name) in enumerate(primals)}
    dots: dict[int, list[fx.Node]] = {}
    for node, slot in pairs:
        if slot.kind == "tangent":
            dots.setdefault(places[slot.name], []).append(node)
    return [node for node, _ in primals], dots


def _widened(
    program: Program, active: Sequence[int], directions: int, operands: Sequence[int]
) -> Program:
    """A condition that takes tangents as well, and reads none."""
    program = program.copy()
    primals = [node for node, _ in program.placeholders()]
    dots: dict[int, list[fx.Node]] = {}
    for i in active:
        for _ in range(directions):
            with program.graph.inserting_after(primals[-1]):
                dot = program.graph.placeholder(f"{primals[i].name}_dot")
            dot.meta = dict(primals[i].meta)
            dots.setdefault(i, []).append(dot)
    _order_inputs(program.graph, woven(primals, dots, operands))
    return plain(program.graph)


def _order_inputs(graph: fx.Graph, lists: list[list[fx.Node]]) -> None:
    for node in reversed(list(chain(*lists))):
        graph._root.append(node)
