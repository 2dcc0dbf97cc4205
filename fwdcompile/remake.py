"""Remake: a program that autograd may go through has nothing in it that autograd does not see."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from . import rule
from .errors import FwdcompileError
from .program import Program, can_move, is_differentiable, op_name, programs_of, rename, value
from .sizes import same_shape
from .subgraph import plain
from .trace import Recorder, bind_call, fake_mode, label
from .transform import transform

aten = torch.ops.aten


def remake(graph: fx.Graph) -> str:
    """Makes saved statistics again that autograd takes for constants.

    Before: `(y, mean, rstd) = native_layer_norm(x, ...); y_dot = (x_dot - ...) * rstd`. After:
    `(var, mean) = var_mean(x, ...); y_dot = (x_dot - ...) * rsqrt(var + eps)`.

    Requires values on each node. Ensures that the derivative of all outputs by autograd is the
    program's own, or says why it is not; results of the op itself stay, and so do statistics that
    the model returns. Not among `PASSES`: steps, which run without autograd, do not need it.

    Returns:
        Why autograd cannot go through the program: an op that it has no derivative of, and whose
        result it takes for a constant, without an error. Empty where it can.
    """
    recorder, reasons = Recorder(graph, fake_mode(graph), keep=rule.table), []
    moving: set[fx.Node] = set()  # what autograd has to know the derivative of
    names: dict[fx.Node, str] = {}
    for node in list(graph.nodes):
        reasons += [remake(program.graph) for program in programs_of(node)]
        if not _moves(node, moving):
            continue
        moving.add(node)
        if node.target in rule.remade and any(map(_read, _items(node))):
            names |= _remake(node, recorder)
        reasons.append(_unseen(node, recorder, moving))
    if names:
        rename(graph, names)
    return next(filter(None, reasons), "")


def _moves(node: fx.Node, moving: set[fx.Node]) -> bool:
    if not can_move(node):
        return False
    return node.op == "placeholder" or (
        not moving.isdisjoint(node.all_input_nodes) and not _stops(node)
    )


def _stops(node: fx.Node) -> bool:
    """Whether the derivative of an op is zero, as autograd knows."""
    row = rule.table.get(node.target)  # type: ignore[call-overload]
    return node.target is aten.detach.default or (row is not None and row.word == "zero")


def _unseen(node: fx.Node, recorder: Recorder, moving: Collection[fx.Node]) -> str:
    """Why autograd misses a part of the derivative at a node, if it does."""
    if not isinstance(node.target, OpOverload):
        return ""
    differentiable = tuple(map(_differentiable, (node.all_input_nodes, node)))
    key = node.target, repr(differentiable)
    if key not in _constant:
        _constant[key] = _constant_outputs(node, recorder)
    several = isinstance(value(node), list | tuple)
    results = {item.args[1]: item for item in _items(node, 0)} if several else {0: node}
    lost = (results[i] for i in _constant[key] if i in results and _read(results[i]))
    if not any(_has_tangent(result, node, moving) for result in lost):
        return ""
    return f"autograd takes a result of {op_name(node)} for a constant, which it is not"


def _has_tangent(result: fx.Node, node: fx.Node, moving: Collection[fx.Node]) -> bool:
    """Whether a result of an op moves with those operands that do."""
    graph = fx.Graph()
    copies = {arg: graph.placeholder(arg.name) for arg in node.all_input_nodes}
    for one in dict.fromkeys((node, result)):
        copies[one] = graph.node_copy(one, copies.__getitem__)
    for original, copy in copies.items():
        copy.meta = dict(original.meta)
    graph.output((copies[result],))
    active = [copies[arg].name for arg in node.all_input_nodes if arg in moving]
    made = transform(plain(graph), active)
    return not all(n.meta.get("absent") for n, s in made.results() if s.kind == "tangent")


# Outputs that autograd takes for constants, by op and by which operands and results are floats.
_constant: dict[Any, frozenset[int]] = {}


def _differentiable(node: Any) -> Any:
    if isinstance(node, fx.Node):
        return [is_differentiable(x) for x in pytree.tree_leaves(value(node))]
    return [_differentiable(one) for one in node]


def _constant_outputs(node: fx.Node, recorder: Recorder) -> frozenset[int]:
    def required(arg: fx.Node) -> Any:
        x = value(arg)
        return x.detach().requires_grad_() if is_differentiable(x) else x

    try:
        with recorder.fakes, torch.enable_grad():
            args, kwargs = fx.map_arg((node.args, node.kwargs), required)
            outs = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # a run with autograd raises as well
        return frozenset()
    outs = outs if isinstance(outs, list | tuple) else [outs]
    fixed = (i for i, x in enumerate(outs) if is_differentiable(x) and not x.requires_grad)
    return frozenset(fixed)


def _items(node: fx.Node, first: int = 1) -> list[fx.Node]:
    return [user for user in node.users if user.target is getitem and user.args[1] >= first]  # type: ignore


def _read(item: fx.Node) -> bool:
    return any(user.op != "output" and not _stops(user) for user in item.users)


def _remake(node: fx.Node, recorder: Recorder) -> dict[fx.Node, str]:
    """Replaces the statistics of one op; what takes the place of one gets its name."""
    function = rule.remade[node.target]  # type: ignore[index]
    items, after = _items(node), node.next
    dtype = value(items[0]).dtype
    bound = bind_call(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    named = fx.map_arg(bound, recorder.fake)
    with node.graph.inserting_before(after), recorder.active():
        # statistics of short floats are those of longer ones
        wide = {name: _cast(named[name], dtype) for name in rule.parameters(function)}
        made = function(**wide)
        fitted = {
            item: recorder.node(_shaped(new, value(item)))
            for item in items
            if isinstance(new := made[item.args[1]], Tensor)  # type: ignore[index]
        }
    label(after, node, of=node)
    names = {}
    for item, new in fitted.items():
        name = item.name
        item.replace_all_uses_with(new, lambda user: user.op != "output")
        if not item.users:
            node.graph.erase_node(item)
            names[new] = name
    return names


def refuse_autograd(program: Program, tensors: Sequence[Tensor]) -> None:
    """Refuses to run a program that autograd, which would record the run, cannot go through.

    Raises:
        FwdcompileError: autograd, or torch's own forward mode, would differentiate it op by op.
    """
    if not program.sealed:
        return
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if recorded or forward_ad._current_level >= 0:
        raise FwdcompileError(
            f"Autograd cannot go through this program: {program.sealed}. Call it under "
            "torch.no_grad(), and not inside torch.func.jvp."
        )


def _shaped(x: Tensor, like: Tensor) -> Tensor:
    return x if same_shape(x, like) else x.reshape(like.shape)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
