"""Simplify: small named passes, each of which makes an equal program cheaper.

A pass changes a graph in place. None of them removes, merges or reorders a random op of the
primal, so that outputs stay bit-identical and the random stream is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from .calls import drop_operands, drop_results, merge_operands
from .program import is_differentiable, is_random, programs_of
from .reassociate import reassociate
from .sizes import same_layout
from .stack import stack

Pass = Callable[[fx.Graph], None]


def cse(graph: fx.Graph) -> None:
    """Computes equal expressions once.

    Before: `a = tanh(x); b = tanh(x); c = a + b`. After: `a = tanh(x); c = a + a`.

    Requires a functional graph. Ensures that random ops and uninitialised memory stay apart.
    """
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if programs_of(node):
            merge_operands(node)
        if node.op != "call_function" or not _is_pure(node):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        twin = seen.setdefault(key, node)
        if twin is not node:
            node.replace_all_uses_with(twin)
            graph.erase_node(node)
            if node.meta.get("role") == "primal":
                twin.name, twin.meta = node.name, node.meta


def dce(graph: fx.Graph) -> None:
    """Removes nodes that no output needs.

    Before: `a = tanh(x); b = exp(x); return a`. After: `a = tanh(x); return a`.

    Requires nothing. Ensures that random ops stay, so that the random stream does not move.
    """
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not is_random(node):
            graph.erase_node(node)
        elif programs := programs_of(node):
            drop_results(node)
            for program in programs:
                dce(program.graph)
            drop_operands(node)


def identities(graph: fx.Graph) -> None:
    """Drops tangent ops that change nothing: casts to the same dtype, expands to the same shape.

    Before: `d = expand(c, [2, 3])` of a c that is [2, 3]. After: `c`.

    Requires values of shape and dtype on each node. Ensures that primal ops are left alone.
    """
    for node in list(graph.nodes):
        if node.meta.get("role") in ("glue", "tangent") and node.target in _IDENTITIES:
            source = node.args[0]
            if isinstance(source, fx.Node) and _same_tensor(node, source):
                node.replace_all_uses_with(source)
                graph.erase_node(node)


def detach_tangents(graph: fx.Graph) -> None:
    """Keeps autograd out of the tangent: it reads detached primals.

    Before: `y = tanh(x); y_dot = x_dot * (1 - y * y)`. After: `y = tanh(x);
    y_const = detach(y); y_dot = detach(x_dot) * (1 - y_const * y_const)`.

    Requires roles on each node. Ensures that autograd still differentiates the primal outputs.
    Not among `PASSES`: `transform(model, tracks_grad=False)` asks for it.
    """
    detached: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.meta.get("role") not in ("glue", "tangent"):
            continue
        if node.op == "placeholder":
            detached[node] = _detach(graph, node)
            continue
        for source in node.all_input_nodes:
            if source.meta.get("role") == "primal" and is_differentiable(source.meta["val"]):
                if source not in detached:
                    detached[source] = _detach(graph, source)
            if source in detached:
                node.replace_input_with(source, detached[source])
    for program in (program for node in graph.nodes for program in programs_of(node)):
        detach_tangents(program.graph)


def _detach(graph: fx.Graph, source: fx.Node) -> fx.Node:
    after = source
    while after.next.op == "placeholder":
        after = after.next
    with graph.inserting_after(after):
        copy = graph.call_function(_aten.detach.default, (source,))
    copy.meta = dict(source.meta) | {"role": "constant"}
    copy.name = graph._graph_namespace.create_name(f"{source.name}_const", None)
    return copy


PASSES: dict[str, Pass] = {
    "reassociate": reassociate,
    "identities": identities,
    "cse": cse,
    "stack": stack,
    "dce": dce,
}

_aten = torch.ops.aten
_IDENTITIES = {
    _aten.expand.default,
    _aten.view.default,
    _aten.permute.default,
    _aten._to_copy.default,
    _aten.clone.default,
    _aten.alias.default,
    _aten.lift_fresh_copy.default,
}


def check_passes(passes: Sequence[str]) -> None:
    """Refuses names that no pass has.

    Raises:
        ValueError: no pass has that name.
    """
    if unknown := [name for name in passes if name not in PASSES]:
        raise ValueError(f"no pass is called {unknown[0]!r}; there are {', '.join(PASSES)}")


def simplify(graph: fx.Graph, passes: tuple[str, ...] = tuple(PASSES)) -> None:
    """Runs the named passes in order, then on the programs that the graph calls."""
    for name in passes:
        PASSES[name](graph)
    for program in (program for node in graph.nodes for program in programs_of(node)):
        simplify(program.graph, passes)


def _is_pure(node: fx.Node) -> bool:
    if node.target is getitem:
        return True
    uninitialised = "empty" in str(node.target)
    return isinstance(node.target, OpOverload) and not is_random(node) and not uninitialised


def _same_tensor(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and (x.dtype, x.device) == (y.dtype, y.device)
        and same_layout(x, y)
    )


def _key(arg: Any) -> Any:
    """A hashable key that tells 1, 1.0 and True apart."""
    if isinstance(arg, fx.Node):
        return arg
    if isinstance(arg, list | tuple):
        return tuple(_key(item) for item in arg)
    if isinstance(arg, dict):
        return tuple((name, _key(item)) for name, item in sorted(arg.items()))
    return type(arg), repr(arg)
