"""Second: a program becomes one that also computes a sum of second derivatives.

The walk of `transform.py` with one tangent more, that of second order. Of y = f(x) it is

    y_ddot = df(x)[x_ddot] + sum_k d2f(x)[x_dot_k, x_dot_k]

The first term is the op's row once more. The second comes from what the row has just written for
y_dot_k: those few nodes are differentiated along x_dot_k, by their own rows, with x_dot_k held
fixed. So K directions cost K + 1 tangents and the curvature of each op, and no term is made that
is linear in a second derivative of one direction alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from operator import getitem
from typing import Any

from torch import fx

from .apply import Site
from .batch import over_directions
from .labels import Dot
from .program import Program, Slot, can_move, origin, value
from .trace import behind
from .transform import Walk


def second_order(
    program: Program,
    active: Mapping[str, Collection[int]],
    directions: int,
    curved: Collection[int] | None = None,
    batched: bool = False,
) -> Program:
    """Rewrites a program so that it returns first derivatives, and a sum of second ones.

    Args:
        program: a captured program.
        active: names of the inputs and parameters that have tangents, with the directions in which
            each has one.
        directions: how many there are.
        curved: those whose second derivatives are in the sum; by default all.
        batched: marks where `batch` has to sum over the directions that one stands for.

    Returns:
        A program with the inputs and outputs of `transform`, and behind each differentiable output
        and its tangents one of kind `second`: the sum over `curved` of v' H v, H the Hessian of
        each of the output's elements.

    Raises:
        MissingRuleError: as `transform`, for rows of first and of second order.

    The sum over directions is carried as one number an element, as in Li et al. (2023), "Forward
    Laplacian", and Dangel et al. (2025), "Collapsing Taylor Mode Automatic Differentiation".
    """
    walk = _Second(program, directions, range(directions) if curved is None else curved, batched)
    made = walk.run(active, ())
    slots = (
        replace(slot, kind="second", direction=0) if slot.direction == directions else slot
        for slot in made.outputs
    )
    return replace(made, outputs=tuple(slots))


class _Second(Walk):
    """The last of the directions is that of the sum."""

    def __init__(
        self, program: Program, directions: int, curved: Collection[int], batched: bool
    ) -> None:
        super().__init__(program, directions + 1)
        self.curved, self.batched = curved, batched

    def _again(self, program: Program, active: Collection[str], directions: int) -> Program:
        everywhere = {name: range(directions) for name in active}
        walk = _Second(program, directions - 1, self.curved, self.batched)
        return walk.run(everywhere, ())

    def _inputs(
        self, active: Mapping[str, Collection[int]], rank_one: Collection[str]
    ) -> list[Slot]:
        slots = super()._inputs(active, rank_one)
        self.dots |= {self.primals[node]: dots for node, dots in self.dots.items()}
        return slots

    def _item(self, node: fx.Node) -> None:
        super()._item(node)
        if node in self.dots and node in self.primals:
            self.dots[self.primals[node]] = self.dots[node]

    def _dots(self, site: Site) -> list[Dot]:
        with self.recorder.active():
            first = [self._written(site, k) for k in self.directions[:-1]]
            dots = [dot for dot, _ in first]
            self.dots[self.primals[site.node]] = [*dots, None]
            total = self._dot(site, self.directions[-1])
            for k in self.curved:
                total = self._sum(total, self._marked(self._curvature(*first[k], k), k))
        return [*dots, total]

    def _written(self, site: Site, direction: int) -> tuple[Dot, list[fx.Node]]:
        """A tangent, and the nodes that the row has written for it."""
        last = self.graph._root.prev
        dot = self._dot(site, direction)
        nodes = behind(last)
        for node in nodes:
            node.meta |= origin(site.node)
        return dot, nodes

    def _curvature(self, dot: Dot, nodes: list[fx.Node], direction: int) -> Dot:
        """The derivative of a tangent along its own direction, tangents of operands held fixed."""
        for node in nodes:
            self._along(node, direction)
        parts = dot if isinstance(dot, tuple) else (dot,)
        found = tuple(None if d is None else self._of(d, direction) for d in parts)
        for node in nodes:
            self.dots.pop(node, None)
        return found if isinstance(dot, tuple) else found[0]

    def _along(self, node: fx.Node, direction: int) -> None:
        for arg in node.all_input_nodes:
            if arg.target is getitem and arg not in self.dots:
                self._item(arg)
        if node.target is getitem:
            self._item(node)
        elif any(self._of(arg, direction) is not None for arg in node.all_input_nodes):
            if can_move(node):
                dot = self._dot(self._site(node, node), direction)
                self.dots[node] = [dot if k == direction else None for k in self.directions]

    def _marked(self, curvature: Any, direction: int) -> Any:
        """The same number, to be summed over directions by `batch`."""
        if isinstance(curvature, tuple):
            return tuple(self._marked(part, direction) for part in curvature)
        if curvature is None or not self.batched:
            return curvature
        marked = self.graph.call_function(over_directions, (curvature, direction))
        marked.meta["val"] = value(curvature)
        self.recorder.fake(marked)
        return marked

    def _of(self, node: fx.Node, direction: int) -> Any:
        return self.dots[node][direction] if node in self.dots else None

    def _sum(self, a: Any, b: Any) -> Any:
        if a is None or b is None:
            return b if a is None else a
        if isinstance(a, tuple):
            return tuple(map(self._sum, a, b))
        return self.recorder.node(self.recorder.fake(a) + self.recorder.fake(b))

    def _ending(self, direction: int) -> str:
        last = self.directions[-1]
        if direction == last:
            return "_ddot"
        return f"_dot{direction}" if last > 1 else "_dot"
