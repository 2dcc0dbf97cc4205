"""Batch: a program for one direction becomes one for many, which stand along a first axis.

Each op that tangents reach is traced once more under torch's vmap, so that a program does not grow
with the number of directions, and the products of all of them are one product. What no tangent
reaches stays as it is, and is computed once. An op that torch cannot batch, of which there are few,
is called for one direction after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import getitem
from typing import Any

import torch
from torch import fx

from . import rule
from .errors import RuleError
from .mapped import broadcasts, one_by_one, scales, vmapped
from .products import as_einsum
from .program import Program, Slot, op_name, output_nodes, programs_of, rename, value
from .sizes import Sym, wider
from .subgraph import CONVENTIONS, operands_of, plain
from .trace import Recorder, behind, fake_mode

aten = torch.ops.aten


def over_directions(x: Any, direction: int) -> Any:
    """The sum over the directions that one stands for; in a program of one it is `x` itself."""
    return x


def batch(program: Program, sizes: Sequence[int]) -> Program:
    """Makes each direction of a program stand for several.

    Before: `x_dot: f32[64, 8]; y_dot = linear(x_dot, w)`. After: `x_dot: f32[K, 64, 8]`, and the
    same line.

    Args:
        program: made by `transform` or `second_order`, with values and roles on each node.
        sizes: for each direction, how many it shall stand for.

    Returns:
        A program whose tangents, taken and returned, have one axis more, in front. The sum of
        second derivatives has not; it is over each batch as well.
    """

    def sized(slot: Slot) -> Slot:
        return replace(slot, size=sizes[slot.direction]) if slot.kind == "tangent" else slot

    program = replace(
        program,
        inputs=tuple(map(sized, program.inputs)),
        outputs=tuple(map(sized, program.outputs)),
    )
    starts = {node: slot.size for node, slot in program.placeholders() if slot.size}
    walk = _Walk(program.graph, starts, sizes)
    walk.finish([slot.size for slot in program.outputs])
    return replace(program, graph=walk.graph)


class _Walk:
    """One walk over a graph. `axis` has the length of the new axis, for the nodes that have it."""

    def __init__(
        self, source: fx.Graph, starts: Mapping[fx.Node, int], sizes: Sequence[int]
    ) -> None:
        self.source, self.sizes = source, sizes
        self.graph = fx.Graph()
        self.recorder = Recorder(self.graph, fake_mode(source), keep=rule.table)
        self.axis = dict(starts)
        self.copies: dict[fx.Node, fx.Node] = {}
        self.several: dict[fx.Node, list[tuple[fx.Node, int]]] = {}  # results and their axes
        self.names: dict[fx.Node, str] = {}
        self.given_up: list[fx.Node] = []
        for node in source.nodes:
            before = self.graph._root.prev
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                self._visit(node)
            self._label(node, before)

    def finish(self, wanted: Sequence[int]) -> None:
        """Ends the graph; an output that is wanted with the axis gets it where it has none."""
        pairs = zip(output_nodes(self.source), wanted, strict=True)
        self.graph.output(tuple([self._widened(node, size) for node, size in pairs]))
        for node in reversed(self.given_up):
            self.graph.erase_node(node)
        left = (node for node in self.graph.nodes if node.meta.get("role") == "glue")
        rename(self.graph, self.names | {n: op_name(n) for n in left if n not in self.names})

    def reached(self) -> list[int]:
        """The length of each output's axis, 0 where it has none."""
        return [self.axis.get(node, 0) for node in output_nodes(self.source)]

    def _placeholder(self, node: fx.Node) -> None:
        copy = self._copy(node)
        if size := self.axis.get(node):
            with self.recorder.fakes:
                copy.meta["val"] = _with_axis(value(node), size, stacked=False)

    def _visit(self, node: fx.Node) -> None:
        sizes = [self.axis[arg] for arg in node.all_input_nodes if arg in self.axis]
        source: Any = node.args[0] if node.args else None
        if node.target is over_directions:
            self._sum(node)
        elif node.target is getitem and source in self.several:
            self.copies[node], size = self.several[source][node.args[1]]  # type: ignore[index]
            self.axis |= {node: size} if size else {}
        elif not sizes:
            self._copy(node)
        elif node.target in CONVENTIONS:
            self._call(node)
        elif isinstance(value(node), Sym):
            self._copy(node).update_arg(1, node.args[1] + 1)  # type: ignore[operator]
        else:
            self._map(node, sizes[0])

    def _copy(self, node: fx.Node) -> fx.Node:
        copy = self.graph.node_copy(node, self.copies.__getitem__)
        copy.meta = dict(node.meta)
        self.recorder.sizes.learn(copy)
        self.copies[node] = copy
        return copy

    def _label(self, node: fx.Node, before: fx.Node) -> None:
        """Gives what is new behind `before` the name, origin and role of `node`, or of its glue."""
        copy = self.copies.get(node)
        if copy is not None and (node.target, node.meta.get("role")) != (over_directions, "glue"):
            self.names.setdefault(copy, node.name)
        kept = {key: x for key, x in node.meta.items() if key != "val"}
        glue = {"role": "glue", "of": node.meta.get("of", node.name)}
        for added in behind(before):
            added.meta |= kept if added is copy else kept | glue

    def _sum(self, node: fx.Node) -> None:
        source, direction = node.args
        with self.recorder.active():
            total = self._total(source, self.sizes[direction])  # type: ignore[arg-type,index]
            self.copies[node] = self.recorder.node(total)

    def _total(self, node: fx.Node, size: int) -> Any:
        """The sum of a node over directions; products contract over them."""
        if node not in self.axis:
            return self._fake(node) * size
        if node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
            parts = [self._total(arg, size) for arg in node.all_input_nodes]
            return parts[0] + parts[-1]
        if product := as_einsum(node, self.axis, summed=True):
            return self._einsum(*product)
        return self._fake(node).sum(0)

    def _einsum(self, equation: str, operands: Sequence[fx.Node]) -> Any:
        return aten.einsum.default(equation, [self._fake(x) for x in operands])

    def _fake(self, node: fx.Node) -> Any:
        return self.recorder.fake(self.copies[node])

    def _map(self, node: fx.Node, size: int) -> None:
        """Traces an op for all directions at once."""
        inputs = node.all_input_nodes

        def call(*fakes: Any) -> Any:
            named = dict(zip(inputs, fakes, strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), named.__getitem__)  # type: ignore
            return node.target(*args, **kwargs)  # type: ignore[operator]

        dims = tuple(0 if arg in self.axis else None for arg in inputs)
        last = self.graph._root.prev
        with self.recorder.active():
            fakes = [self._fake(arg) for arg in inputs]
            if broadcasts(node, self.axis):
                out = call(*fakes)
            elif product := as_einsum(node, self.axis, summed=False):
                out = self._einsum(*product)
            elif scales(node, self.axis):
                d, x = fakes
                out = d * call(aten.ones_like.default(x), x)
            else:
                try:
                    out = vmapped(call, dims, fakes, value(node))
                except (RuntimeError, RuleError):  # RuleError: a batching rule writes in place
                    self.given_up += behind(last)
                    out = one_by_one(call, dims, fakes, size)
            if isinstance(out, list | tuple):
                self.several[node] = [(self.recorder.node(x), size) for x in out]
            else:
                self.copies[node], self.axis[node] = self.recorder.node(out), size

    def _widened(self, node: fx.Node, size: int) -> fx.Node:
        """The copy of a node, with the axis if it is wanted with one."""
        copy = self.copies[node]
        if not size or node in self.axis:
            return copy
        with self.recorder.active():
            x = self.recorder.fake(copy)
            return self.recorder.node(x.expand(size, *x.shape))

    def _call(self, node: fx.Node) -> None:
        """Batches the programs that a higher-order op calls."""
        convention, groups = CONVENTIONS[node.target], operands_of(node)
        axes = [self.axis.get(arg, 0) for group in groups for arg in group]
        carried = len(groups[0]) if convention.carried else 0
        while True:  # until what is carried gets no axis that it does not start with
            walks = [self._inner(program, axes) for program in programs_of(node)]
            bodies = walks[convention.conditions :]
            found = [max(each) for each in zip(*(w.reached() for w in bodies), strict=True)]
            results = [*map(max, found[:carried], axes), *found[carried:]]
            if results[:carried] == axes[:carried]:
                break
            axes[:carried] = results[:carried]
        for condition in walks[: convention.conditions]:
            condition.finish([0])
        for body in bodies:
            body.finish(results)
        self._install(node, walks, axes, results, carried)

    def _inner(self, program: Program, axes: Sequence[int]) -> _Walk:
        pairs = zip(program.placeholders(), axes, strict=True)
        return _Walk(program.graph, {node: k for (node, _), k in pairs if k}, self.sizes)

    def _install(
        self,
        node: fx.Node,
        walks: Sequence[_Walk],
        axes: Sequence[int],
        results: Sequence[int],
        carried: int,
    ) -> None:
        """Writes the call; what is sliced or stacked by rounds has the axis in second place."""
        convention = CONVENTIONS[node.target]
        lengths, programs = iter(axes), iter(walks)
        args: list[Any] = []
        for i, arg in enumerate(node.args):
            if isinstance(arg, Program):
                args.append(plain(next(programs).graph))
            elif i in convention.operands:
                sliced = convention.sliced == convention.operands.index(i)
                args.append(tuple(self._operand(x, next(lengths), sliced) for x in arg))  # type: ignore
            else:
                args.append(fx.map_arg(arg, self.copies.__getitem__))
        copy = self.graph.call_function(node.target, tuple(args))  # type: ignore[arg-type]
        stacked = [convention.sliced is not None and i >= carried for i in range(len(results))]
        with self.recorder.fakes:
            every = zip(value(node), results, stacked, strict=True)
            copy.meta["val"] = tuple(_with_axis(*one) for one in every)
        self.several[node] = [
            (self._turned(self.recorder.item(copy, i), size > 0 and stacked[i]), size)
            for i, size in enumerate(results)
        ]

    def _operand(self, node: fx.Node, size: int, sliced: bool) -> fx.Node:
        return self._turned(self._widened(node, size), size > 0 and sliced)

    def _turned(self, node: fx.Node, turns: bool) -> fx.Node:
        """The node with its first two axes in each other's place, if it turns."""
        if not turns:
            return node
        with self.recorder.active():
            return self.recorder.node(self.recorder.fake(node).transpose(0, 1))


def _with_axis(x: Any, size: int, stacked: bool) -> Any:
    """A fake like another one, with an axis more if that has a length; of rounds, behind theirs."""
    if not size:
        return x
    return x.new_empty([x.shape[0], size, *x.shape[1:]]) if stacked else wider(x, size)
