"""A captured or generated program: one flat functional graph and what its ends mean."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

# The outputs that the tangent of an input can move, by the name of that input.
Reached = dict[str, tuple[str, ...]]
Kind = Literal[
    "parameter", "buffer", "constant", "input", "tangent", "output", "second", "gradient"
]


@dataclass(frozen=True)
class Slot:
    """What one placeholder or one output of a program stands for.

    `name` is the parameter's or buffer's qualified name, or the path of an argument or output
    (`x`, `batch.image`, `out.0`). A tangent slot has its primal's name and the number of its
    direction; an output of kind `buffer` or `input` is the new value of something forward changed,
    one of kind `gradient` the forward gradient of a parameter, by activity perturbation, and one of
    kind `second` the sum of an output's second derivatives along directions.
    `factor` is "u" or "v" where two inputs make one tangent, their outer product. `size` is the
    length of the axis in front of a tangent that stands for several directions, 0 without one.
    """

    kind: Kind
    name: str
    direction: int = 0
    factor: str = ""
    size: int = 0


@dataclass(frozen=True)
class OutSpec:
    """The pytree a model returns: each leaf is the name of an output slot or a fixed value."""

    tree: Any
    leaves: tuple[tuple[bool, Any], ...]

    def build(self, values: dict[str, Any]) -> Any:
        """Puts named values and fixed leaves into the model's own structure."""
        flat = [values[leaf] if named else leaf for named, leaf in self.leaves]
        return pytree.tree_unflatten(flat, self.tree)


@dataclass(frozen=True)
class Program:
    """A functional ATen graph with its calling convention.

    A higher-order op (`torch.cond`) has the programs that it calls among its arguments.

    Attributes:
        graph: placeholders, `call_function` nodes of ATen overloads, one flat output tuple.
        inputs: the meaning of each placeholder, in order.
        outputs: the meaning of each output, in order.
        out_spec: the pytree that the model returns.
        title: how the model is called in the printed program.
        constants: values of the `constant` inputs, by name.
        aliases: second names of tied parameters, each with the name its value goes by.
        calls: of `torch.autograd.Function`, see `custom.py`.
        plain: leaves of the arguments that are no tensors, by name; the program has them in it.
        literals: names of the constants that the model itself makes of numbers.
        fixed: tensors, with their versions, whose numbers decided what the program computes.
        sealed: why autograd cannot go through the program; empty where it can.
    """

    graph: fx.Graph
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    out_spec: OutSpec
    title: str
    constants: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    calls: tuple[Any, ...] = ()
    plain: dict[str, Any] = field(default_factory=dict)
    literals: frozenset[str] = frozenset()
    fixed: tuple[tuple[Tensor, int], ...] = ()
    sealed: str = ""

    @property
    def is_stale(self) -> bool:
        """Whether someone has written to a tensor that decided."""
        return any(x._version != version for x, version in self.fixed)

    @cached_property
    def changed(self) -> frozenset[str]:
        """The names of the buffers and inputs that the model writes to."""
        return frozenset(s.name for s in self.outputs if s.kind in ("buffer", "input"))

    def placeholders(self) -> Iterator[tuple[fx.Node, Slot]]:
        """Pairs each placeholder with its slot."""
        nodes = (node for node in self.graph.nodes if node.op == "placeholder")
        return zip(nodes, self.inputs, strict=True)

    def results(self) -> Iterator[tuple[fx.Node, Slot]]:
        """Pairs each node of the output tuple with its slot."""
        return zip(output_nodes(self.graph), self.outputs, strict=True)

    def copy(self) -> Program:
        """The same program with a graph of its own, names and metadata included."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        for node in graph.nodes:
            node.args = fx.node.map_aggregate(node.args, _copied)
        return replace(self, graph=graph)

    def __repr__(self) -> str:
        return f"<program {self.title}>"


def programs_of(node: fx.Node) -> list[Program]:
    """The programs that a higher-order op calls; no other node has any."""
    args: tuple[Any, ...] = node.args
    return [arg for arg in args if isinstance(arg, Program)]


def graphs(graph: fx.Graph) -> Iterator[fx.Graph]:
    """The graphs of all programs that a graph calls, innermost first, and then itself."""
    for node in graph.nodes:
        for program in programs_of(node):
            yield from graphs(program.graph)
    yield graph


def same_ops(one: Program, other: Program) -> bool:
    """Whether two captures of a model have the same ops with the same numbers."""

    def told(program: Program) -> list[str]:
        return [n.format_node() or n.name for g in graphs(program.graph) for n in g.nodes]

    return told(one) == told(other)


def output_nodes(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The nodes in the output tuple of a flat graph."""
    nodes: tuple[fx.Node, ...] = graph.output_node().args[0]  # type: ignore[assignment]
    return nodes


def _copied(arg: Any) -> Any:
    return arg.copy() if isinstance(arg, Program) else arg


def value(node: fx.Node) -> Any:
    """The fake value recorded for a node: a FakeTensor, a sequence of them, or a number."""
    return node.meta.get("val")


def outputs_reached(program: Program) -> Reached:
    """For each tangent by name, the outputs whose tangents depend on it, in their order."""
    nodes = {node: slot for node, slot in program.placeholders() if slot.kind == "tangent"}
    marks: dict[fx.Node, set[str]] = {node: {slot.name} for node, slot in nodes.items()}
    for node in program.graph.nodes:
        if node.op != "output":
            for before in node.all_input_nodes:
                marks.setdefault(node, set()).update(marks.get(before, ()))
    reached: Reached = {slot.name: () for slot in nodes.values()}
    for node, slot in program.results():
        if slot.kind == "tangent":
            for name in marks.get(node, ()):
                reached[name] = tuple(dict.fromkeys((*reached[name], slot.name)))
    return reached


def is_differentiable(x: object) -> bool:
    """Whether `x` is a tensor of a floating or complex dtype: only those have tangents."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def can_move(node: fx.Node) -> bool:
    """Whether a node, or one of its several outputs, can have a tangent."""
    return any(map(is_differentiable, pytree.tree_leaves(node.meta.get("val"))))


def is_random(node: fx.Node) -> bool:
    """Whether the op of a node, or one that it calls, draws from the random number generator."""
    if any(is_random(inner) for program in programs_of(node) for inner in program.graph.nodes):
        return True
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def identifier(name: str) -> str:
    """A Python identifier close to `name`: `fc1.weight` becomes `fc1_weight`."""
    word = re.sub(r"\W+", "_", name).strip("_")
    if keyword.iskeyword(word) or word in ("aten", "torch"):  # what a program calls torch's ops by
        return f"{word}_"
    return word if word and not word[0].isdigit() else f"arg_{word}".rstrip("_")


def op_name(node: fx.Node) -> str:
    """The bare name of the op a node calls: `linear` for `aten.linear.default`."""
    if node.target is torch.ops.aten.sym_size.int:
        return "n"
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1].strip("_") if schema else node.target.__name__  # type: ignore[union-attr]


def location(node: fx.Node) -> str:
    """The user's source line of a node, `models/net.py:12: y = ...`; empty where unknown."""
    if "source" not in node.meta:
        return ""
    file, line, code = node.meta["source"]
    return f"{file}:{line}: {code}" if code else f"{file}:{line}"


def origin(node: fx.Node) -> dict[str, Any]:
    """What the metadata of a node says of where in the model it comes from."""
    return {key: node.meta[key] for key in ("source", "module") if key in node.meta}


def rename(graph: fx.Graph, wanted: Mapping[fx.Node, str]) -> None:
    """Gives every node a name: those in `wanted` first and in that order, then all others.

    A name that is taken, or is a Python keyword or builtin, gets a number behind it.
    """
    graph._graph_namespace = fx.graph._Namespace()
    others = {node: node.name for node in graph.nodes if node not in wanted}
    for node, name in {**wanted, **others}.items():
        node.name = graph._graph_namespace.create_name(name, node)
        if node.op == "placeholder":
            node.target = node.name
