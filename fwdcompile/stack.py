"""Stack: products that share a weight take the form that was measured to be the fastest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from . import rule
from .costs import Product, best_form
from .program import value
from .trace import Recorder, bind_call, fake_mode, label, substitute

aten = torch.ops.aten
Form = Callable[[list[Tensor], Tensor], list[Tensor]]

_OPS: dict[str, Any] = {
    "linear": aten.linear.default,
    "conv1d": aten.conv1d.default,
    "conv2d": aten.conv2d.default,
    "conv3d": aten.conv3d.default,
}


@dataclass(frozen=True)
class Group:
    """The product of a primal, first, and those of its tangents with the same weight."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    biases: tuple[fx.Node | None, ...]
    weight: fx.Node
    product: Product


def stack(graph: fx.Graph) -> None:
    """Writes products of one weight as one product of stacked rows, where that is faster.

    Before: `y = linear(x, w); y_dot = linear(x_dot, w)`. After:
    `both = linear(cat([x, x_dot]), w); y, y_dot = both.split(...)`.

    Which form is the fastest has to be measured (`FGD.calibrate`, `fwdcompile calibrate`); a
    product of which nothing is known, or whose size is open, stays as it is. Requires a functional
    graph with values and roles on each node. Ensures that results are equal but for rounding,
    primal ones included.
    """
    recorder = Recorder(graph, fake_mode(graph), keep=rule.table)
    for nodes in _mates(graph):
        group = _group(nodes)
        form = best_form(group.product)
        if form in (None, "apart") or form not in forms(group.product):
            continue
        first = group.nodes[0]
        before = first.prev
        with graph.inserting_before(first), recorder.active():
            xs = [recorder.fake(x) for x in group.inputs]
            outs = forms(group.product)[form](xs, recorder.fake(group.weight))
            results = [
                y if bias is None else _with_bias(y, recorder.fake(bias), group.product)
                for y, bias in zip(outs, group.biases, strict=True)
            ]
        label(first, before)
        for node, result in zip(group.nodes, results, strict=True):
            substitute(node, recorder.node(result))


def groups(graph: fx.Graph) -> list[Group]:
    """All products by a weight, those of a primal and its tangents with one weight together."""
    return [_group(nodes) for nodes in _mates(graph)]


def _mates(graph: fx.Graph) -> list[list[fx.Node]]:
    order = {node: i for i, node in enumerate(graph.nodes)}
    mates: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target not in _OPS.values():
            continue
        bound = bind_call(node.target, node.args, node.kwargs)
        shape = value(bound["input"]).shape
        if not any(isinstance(n, SymInt) for n in (*shape, *value(node).shape)):
            primal = node.name if node.meta.get("role") == "primal" else node.meta.get("of")
            key = node.target, primal, bound["weight"], shape, _options(bound)
            mates.setdefault(key, []).append(node)
    return [
        [n for n in nodes if all(order[x] < order[nodes[0]] for x in n.all_input_nodes)]
        for nodes in mates.values()
    ]


def forms(product: Product) -> Mapping[str, Form]:
    """The forms of a product: each makes one result of every left operand; the plain one first."""
    op, rows = _OPS[product.op], product.shapes[0][0]
    options = dict(product.options)

    def times(x: Tensor, w: Tensor) -> Tensor:
        result: Tensor = op(x, w, None, **options)
        return result

    found: dict[str, Form] = {"apart": lambda xs, w: [times(x, w) for x in xs]}
    batched = len(product.shapes[0]) >= max(2, len(product.shapes[1]))
    if batched and product.count > 1:
        found["stacked"] = lambda xs, w: list(torch.split(times(torch.cat(xs), w), rows))
    if product.op == "linear" and len(product.shapes[0]) == 2:
        found["turned"] = lambda xs, w: [(w @ x.mT).mT for x in xs]
        if product.count > 1:
            found["stacked and turned"] = lambda xs, w: list(
                torch.split((w @ torch.cat(xs).mT).mT, rows)
            )
    return found


def _group(nodes: list[fx.Node]) -> Group:
    calls = [bind_call(n.target, n.args, n.kwargs) for n in nodes]  # type: ignore[arg-type]
    x, w = value(calls[0]["input"]), value(calls[0]["weight"])
    name = next(name for name, op in _OPS.items() if op is nodes[0].target)
    shapes = tuple(x.shape), tuple(w.shape)
    product = Product(name, shapes, len(nodes), _options(calls[0]), x.dtype, x.device)
    inputs, biases = [call["input"] for call in calls], [call["bias"] for call in calls]
    return Group(tuple(nodes), tuple(inputs), tuple(biases), calls[0]["weight"], product)


def _options(bound: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    rest = {k: v for k, v in bound.items() if k not in ("input", "weight", "bias")}
    return tuple((k, tuple(v) if isinstance(v, list | tuple) else v) for k, v in rest.items())


def _with_bias(y: Tensor, bias: Tensor, product: Product) -> Tensor:
    return y + bias.view(-1, *[1] * (len(product.shapes[1]) - 2))
