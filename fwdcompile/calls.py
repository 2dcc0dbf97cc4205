"""Calls: passes over higher-order ops, whose operands and results fit the programs they call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from .program import Program, output_nodes, programs_of, value
from .subgraph import CONVENTIONS, operands_of, plain, set_outputs

_aten = torch.ops.aten

# what Inductor turns into a write to the first operand
_PUTS = {
    _aten.index_put, _aten._unsafe_index_put, _aten.index_add, _aten.index_copy, _aten.index_fill,
    _aten.index_reduce, _aten.masked_scatter, _aten.put, _aten.scatter, _aten.scatter_add,
    _aten.scatter_reduce, _aten.slice_scatter, _aten.select_scatter, _aten.diagonal_scatter,
}  # fmt: skip


def merge_operands(node: fx.Node) -> None:
    """Hands an operand over once where it stands twice in a list.

    Before: `cond(p, f, g, [x, x])`. After: `cond(p, f, g, [x])`.

    What is carried from round to round stays apart.
    """
    groups = operands_of(node)
    first: dict[Any, int] = {}
    places = [(k, arg) for k, group in enumerate(groups) for arg in group]
    for i, key in enumerate(places):
        j = first.setdefault(key, i) if i >= _carried(node) else i
        for program in programs_of(node) if i != j else ():
            inputs = [placeholder for placeholder, _ in program.placeholders()]
            inputs[i].replace_all_uses_with(inputs[j])
    if len(kept := {*range(_carried(node)), *first.values()}) < len(places):
        _restrict(node, kept, range(len(value(node))))


def drop_results(node: fx.Node) -> None:
    """Lets the bodies of a higher-order op compute only what is used of its results.

    Before: `y, y_dot = cond(...); return y`. After: `y = cond(...)`, without the tangent.
    """
    used = {user.args[1] for user in node.users} | set(range(_carried(node)))
    if len(used) < len(value(node)):
        _restrict(node, range(sum(map(len, operands_of(node)))), used)  # type: ignore[arg-type]


def drop_operands(node: fx.Node) -> None:
    """Takes away operands that no program reads, but for the last one that gives a length.

    Before: `cond(p, f, g, [x, w])` where neither branch reads w. After: `cond(p, f, g, [x])`.
    """
    inputs = [[p for p, _ in program.placeholders()] for program in programs_of(node)]
    read = {i for i, nodes in enumerate(zip(*inputs, strict=True)) if any(n.users for n in nodes)}
    kept, start = read | set(range(_carried(node))), 0
    for group in operands_of(node):
        places = range(start, start + len(group))
        kept |= set(places[:1]) if kept.isdisjoint(places) else set()
        start += len(group)
    if len(kept) < start:
        _restrict(node, kept, range(len(value(node))))


def settle(graph: fx.Graph) -> None:
    """Gives what has to have it memory of its own, in the layout that it has to have.

    Before: `def true(x, x_dot): return (sin(x), x_dot)`. After: `x_dot` is cloned. Compiled
    higher-order ops refuse results that share memory with operands or with each other, and branches
    whose results differ in their strides.

    Before: `z = expand(x, [5, 3]); y = index_put(z, i, d)`. After: `z` is cloned. Inductor writes
    to it in place, where five rows are one.

    Requires values on each node. Ensures that numbers stay the same.
    """
    for node in list(graph.nodes):
        if getattr(node.target, "overloadpacket", None) in _PUTS:
            _settle_target(node)
        programs = programs_of(node)
        for program in programs:
            settle(program.graph)
        if programs:
            fixed = _carried(node) or (len(value(node)) if len(programs) > 1 else 0)
            wanted = [x if i < fixed else None for i, x in enumerate(value(node))]
            for program in programs[CONVENTIONS[node.target].conditions :]:
                set_outputs(program.graph, _owned(output_nodes(program.graph), wanted))
            _settle_carried(node, wanted)


def own_results(program: Program) -> None:
    """Gives results memory of their own where the caller writes to what they show.

    Before: `return (p, x)`, the new values of the buffers q and p, where p is the old value of p.
    After: `return (clone(p), x)`. Who writes one result after the other has the old value of each.

    Requires values on each node. Ensures that numbers stay the same.
    """
    written = {node for node, slot in program.placeholders() if slot.name in program.changed}
    if written:
        outputs = output_nodes(program.graph)
        end = program.graph.output_node()
        owned = [_clone(x, value(x), end) if _owner(x) in written else x for x in outputs]
        set_outputs(program.graph, owned)


def _settle_target(node: fx.Node) -> None:
    target: Any = node.args[0]
    x = value(target)
    if any(stride == 0 and n != 1 for n, stride in zip(x.shape, x.stride(), strict=True)):
        node.update_arg(0, _clone(target, x.new_empty(x.shape), node))


def _settle_carried(node: fx.Node, wanted: Sequence[Any]) -> None:
    """What is carried starts in memory of its own, in the layout that each round gives it."""
    owners: set[fx.Node] = set()
    for i, start in enumerate(operands_of(node)[0][: _carried(node)]):
        if _owner(start) in owners or _differs(start, wanted[i]):
            place = CONVENTIONS[node.target].operands[0]
            values: list[Any] = list(node.args[place])  # type: ignore[arg-type]
            values[i] = _clone(start, wanted[i], node)
            node.update_arg(place, tuple(values))
        owners.add(_owner(start))


def _owned(outputs: Sequence[fx.Node], wanted: Sequence[Any]) -> list[fx.Node]:
    owners: set[fx.Node] = set()
    owned = []
    for out, like in zip(outputs, wanted, strict=True):
        owner = _owner(out)
        if owner.op == "placeholder" or owner in owners or _differs(out, like):
            out = _clone(out, like, out.graph.output_node())
        owners.add(owner)
        owned.append(out)
    return owned


def _owner(node: fx.Node) -> fx.Node:
    """The node whose memory a node shows: followed back through views."""
    while node.op == "call_function":
        maker = node
        if not isinstance(node.target, OpOverload):
            maker = node.args[0]  # type: ignore[assignment]
        schema = getattr(maker.target, "_schema", None)
        if not schema or not any(result.alias_info is not None for result in schema.returns):
            break
        node = maker.args[0]  # type: ignore[assignment]
    return node


def _differs(node: fx.Node, like: Any) -> bool:
    return isinstance(like, Tensor) and value(node).stride() != like.stride()


def _clone(source: fx.Node, like: Any, before: fx.Node) -> fx.Node:
    layout = torch.preserve_format
    if _differs(source, like):
        layouts = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
        layout = next((f for f in layouts if _has_layout(like, f)), layout)
    options: dict[str, Any] = {} if layout is torch.preserve_format else {"memory_format": layout}
    graph = source.graph
    with graph.inserting_before(before):
        clone = graph.call_function(_aten.clone.default, (source,), options)
    clone.meta = dict(source.meta) | {"role": "glue"}
    clone.meta["val"] = value(source).clone(memory_format=layout)
    clone.name = graph._graph_namespace.create_name("clone", None)
    return clone


def _has_layout(x: Tensor, layout: torch.memory_format) -> bool:
    rank = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(layout, x.ndim)
    return x.ndim == rank and x.is_contiguous(memory_format=layout)


def _carried(node: fx.Node) -> int:
    return len(operands_of(node)[0]) if CONVENTIONS[node.target].carried else 0


def _restrict(node: fx.Node, operands: Collection[int], results: Collection[int]) -> None:
    """Leaves a higher-order op these operands and results, counted through all lists."""
    convention = CONVENTIONS[node.target]
    places = sorted(results)
    programs = iter(_restricted(node, operands, places))
    args = [next(programs) if isinstance(arg, Program) else arg for arg in node.args]
    start = 0
    for place, group in zip(convention.operands, operands_of(node), strict=True):
        args[place] = tuple(arg for i, arg in enumerate(group, start) if i in operands)
        start += len(group)
    node.args = tuple(args)
    node.meta["val"] = tuple(value(node)[i] for i in places)
    for user in list(node.users):
        user.args = (node, places.index(user.args[1]))  # type: ignore[arg-type]


def _restricted(node: fx.Node, operands: Collection[int], results: list[int]) -> list[Program]:
    restricted = []
    for k, program in enumerate(programs_of(node)):
        if k >= CONVENTIONS[node.target].conditions:
            outputs = output_nodes(program.graph)
            set_outputs(program.graph, [outputs[i] for i in results])
        for i, (placeholder, _) in enumerate(list(program.placeholders())):
            if i not in operands:
                program.graph.erase_node(placeholder)
        restricted.append(plain(program.graph))
    return restricted
