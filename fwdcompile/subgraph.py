"""Subgraphs: higher-order ops (`torch.cond`, scan, while_loop, map) and the programs they call.

The programs stand among the op's arguments, where torch has the names of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import control
from .errors import CaptureError
from .program import OutSpec, Program, Slot, graphs, location, output_nodes, programs_of


@dataclass(frozen=True)
class Convention:
    """How a higher-order op calls its programs.

    Attributes:
        function: what a generated program calls, and prints.
        programs: for each program, in the op's order, what its function's name ends in; dynamo
            fails where a global has a name of its own making, as `cond_true_0`.
        operands: places of the lists of operands among the op's arguments; a program takes all of
            them, one after the other.
        carried: whether the first list holds values that the body's first results replace.
        conditions: how many of the programs, the first ones, do not make the op's results.
        sliced: which of the lists holds what each round takes a slice of; results that are not
            carried are then stacked along a first axis.
    """

    function: Callable[..., Any]
    programs: tuple[str, ...]
    operands: tuple[int, ...]
    carried: bool = False
    conditions: int = 0
    sliced: int | None = None


CONVENTIONS: Mapping[Any, Convention] = {
    torch.ops.higher_order.cond: Convention(control._cond, ("if_true", "if_false"), (3,)),
    torch.ops.higher_order.while_loop: Convention(
        control._while_loop, ("condition", "body"), (2, 3), carried=True, conditions=1
    ),
    torch.ops.higher_order.scan: Convention(
        control._scan, ("body",), (1, 2, 3), carried=True, sliced=1
    ),
    torch.ops.higher_order.map_impl: Convention(control._map, ("body",), (1, 2), sliced=0),
}


def operands_of(node: fx.Node) -> list[list[Any]]:
    """The operands of a higher-order op, list by list."""
    return [list(node.args[i]) for i in CONVENTIONS[node.target].operands]  # type: ignore


def adopt(
    graph: fx.Graph, owner: torch.nn.Module, tidy: Callable[[fx.Graph, list[str]], None]
) -> None:
    """Puts programs in the place of the modules that higher-order ops of a captured graph name.

    Args:
        graph: a copy of the graph of `owner`.
        owner: the module that torch.export made.
        tidy: names the nodes of a new graph, and its inputs as they are given to it.

    Raises:
        CaptureError: an op that is none of `CONVENTIONS` calls a module.
    """
    for node in list(graph.nodes):
        named = [arg for arg in pytree.tree_leaves(node.args) if _is_module(arg, owner)]
        if named and node.target not in CONVENTIONS:
            raise CaptureError(
                f"{location(node) or 'unknown line'}\n  op {node.target} is a higher-order op that "
                "fwdcompile cannot transform. It can torch.cond, scan, while_loop and map."
            )
        if named:
            operands = [arg for group in operands_of(node) for arg in group]
            if literals := [arg for arg in operands if not isinstance(arg, fx.Node)]:
                raise CaptureError(
                    f"{location(node) or 'unknown line'}\n  op {node.target} carries the number "
                    f"{literals[0]}; let it carry a tensor, torch.tensor({literals[0]})."
                )
            names = [arg.name for arg in operands]
            node.args = tuple(
                _adopted(getattr(owner, arg.target), names, tidy) if arg in named else arg
                for arg in node.args
            )
    for node in [node for node in graph.nodes if _is_module(node, owner)]:
        graph.erase_node(node)


def _is_module(arg: Any, owner: torch.nn.Module) -> bool:
    if not isinstance(arg, fx.Node) or arg.op != "get_attr":
        return False
    return isinstance(getattr(owner, str(arg.target), None), fx.GraphModule)


def _adopted(
    module: fx.GraphModule, names: list[str], tidy: Callable[[fx.Graph, list[str]], None]
) -> Program:
    graph = fx.Graph()
    results: Any = graph.graph_copy(module.graph, {})
    results = results if isinstance(results, list | tuple) else (results,)
    if not all(isinstance(result, fx.Node) for result in results):
        raise CaptureError(f"a branch or loop body must return tensors alone, not {results}")
    graph.output(tuple(results))
    tidy(graph, names)
    adopt(graph, module, tidy)
    return plain(graph)


def plain(graph: fx.Graph) -> Program:
    """A graph as the program of a higher-order op: inputs and outputs are known by their place."""
    inputs = (Slot("input", node.name) for node in graph.nodes if node.op == "placeholder")
    count = len(output_nodes(graph))
    outputs = tuple(Slot("output", f"out.{i}") for i in range(count))
    spec = OutSpec(pytree.tree_structure((0,) * count), tuple((True, s.name) for s in outputs))
    return Program(graph, tuple(inputs), outputs, spec, "")


def called(graph: fx.Graph) -> Iterator[tuple[fx.Node, Program, str]]:
    """Each program that a graph calls, innermost first, with the op and what its name ends in."""
    for node in graph.nodes:
        for program, ending in zip(programs_of(node), _endings(node), strict=True):
            yield from called(program.graph)
            yield node, program, ending


def function_names(graph: fx.Graph) -> dict[fx.Graph, str]:
    """A function's name for each program that a graph calls, unlike all names of values."""
    space = fx.graph._Namespace()
    for inner in graphs(graph):
        for node in inner.nodes:
            space.create_name(node.name, None)
    return {
        program.graph: space.create_name(f"{node.name}_{ending}", None)
        for node, program, ending in called(graph)
    }


def _endings(node: fx.Node) -> tuple[str, ...]:
    return CONVENTIONS[node.target].programs if node.target in CONVENTIONS else ()


def set_outputs(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Lets a program's graph return `nodes`."""
    graph.output_node().args = (tuple(nodes),)
