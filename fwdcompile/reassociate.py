"""Reassociate: a product with a rank-one tangent, x (u v'), becomes (x u) v'."""

from __future__ import annotations

from operator import getitem
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload

from . import rule
from .outer import Outer, rewrites
from .trace import Recorder, bind_call, caller, fake_mode, label, substitute


def reassociate(graph: fx.Graph) -> None:
    """Multiplies by the two factors of a rank-one tangent, one after the other.

    Before: `w_dot = u[:, None] * v; y_dot = linear(x, w_dot)`. After:
    `y_dot = (x @ v)[:, None] * u`, and nobody needs `w_dot`.

    Requires a functional graph with values on each node. Ensures that tangents are equal but for
    rounding, and that primal ops are left alone.
    """
    recorder = Recorder(graph, fake_mode(graph), keep=rule.table)
    outers: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        if node.meta.get("rank_one"):
            column, v = node.args
            outers[node] = Outer(recorder.fake(column.args[0]), recorder.fake(v), 0)
        elif node.target is getitem and node.args[0] in outers:
            outers[node] = outers[node.args[0]][node.args[1]]
        elif any(arg in outers for arg in node.all_input_nodes):
            _rewrite(node, recorder, outers)


def _rewrite(node: fx.Node, recorder: Recorder, outers: dict[fx.Node, Any]) -> None:
    """Puts what the factors allow in the place of one node; leaves it where there is nothing."""
    op = node.target
    if not isinstance(op, OpOverload):
        return
    bound = bind_call(op, node.args, node.kwargs)
    factored = [name for name, arg in bound.items() if _has_any(arg, outers)]
    function = rewrites.get((op, factored[0]))
    if function is None or len(factored) > 1:
        return
    operands = fx.map_arg(bound, lambda n: outers[n] if n in outers else recorder.fake(n))
    named = operands | {"call": caller(op, operands)}
    before, graph = node.prev, node.graph
    with graph.inserting_before(node), recorder.active():
        result = function(**{name: named[name] for name in rule.parameters(function)})
    label(node, before)
    if isinstance(result, Tensor):
        substitute(node, recorder.node(result))
    elif result is not NotImplemented:
        outers[node] = result


def _has_any(arg: Any, outers: dict[fx.Node, Any]) -> bool:
    if isinstance(arg, list | tuple):
        return any(_has_any(item, outers) for item in arg)
    return isinstance(arg, fx.Node) and arg in outers
