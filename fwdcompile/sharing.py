"""Sharing: memory that two tensors of a recorded graph share without torch knowing it.

A functional program has a new tensor for each write, and gives it to all that show the memory which
was written to. Torch finds those by the schemas of ops.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._C import _functorch as functorch
from torch._ops import OpOverload
from torch.export.exported_program import ExportedProgram

from . import rule
from .errors import CaptureError
from .hazards import user_line, written_by_node
from .program import value

aten = torch.ops.aten
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def tell_shared_memory(exported: ExportedProgram) -> None:
    """Takes out dropout that is off, which gives its operand, and not a copy as torch has it.

    Before: `a = dropout(x, 0.5, False); mul_(a, 2); return x`. After: `mul_(x, 2); return x`.

    Raises:
        CaptureError: what is written to is a view that torch does not know, or cannot write back.
    """
    modules = [m for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]
    for graph in (module.graph for module in modules):
        for node in [node for node in graph.nodes if _is_off(node)]:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        written: set[int] = set()
        for node in graph.nodes:
            written.update(*map(_memory, written_by_node(node)))
        for node in (node for node in graph.nodes if written & _memory(node)):
            if _leaves_gaps(node):
                raise CaptureError(
                    f"{user_line(node)}\n  {node.target} leaves gaps between its windows, and "
                    "their memory is written to: torch would write zeros.\n  Write to slices."
                )
            if _is_unknown_view(node) or _goes_by_strides(node):
                raise CaptureError(
                    f"{user_line(node)}\n  {node.target} gives a view or a copy here, which torch "
                    "cannot tell, and it is written to.\n  Take a .clone() of it."
                )


def _is_off(node: fx.Node) -> bool:
    return node.target is aten.dropout.default and not (node.args[1] and node.args[2])


def _leaves_gaps(node: fx.Node) -> bool:
    if node.target is not aten.unfold.default:
        return False
    x, dim, size, step = node.args
    length, windows = value(x).shape[dim], value(node).shape[dim]  # type: ignore
    return bool(step > size or (windows - 1) * step + size < length)  # type: ignore


def _is_unknown_view(node: fx.Node) -> bool:
    """Whether an op that stays whole shows its operand, although its schema has a new tensor."""
    if node.target not in rule.table:
        return False
    return not _is_view(node) and any(_memory(x) & _memory(node) for x in node.all_input_nodes)


def _goes_by_strides(node: fx.Node) -> bool:
    """Whether strides, which `as_strided` does not keep in a program, decide what this shows."""
    if not _is_view(node) or not node.target.has_kernel_for_dispatch_key(_COMPOSITE):  # type: ignore
        return False
    while _is_view(node):
        node = node.all_input_nodes[0]
        if node.target is aten.as_strided.default and not value(node).is_contiguous():
            return True
    return False


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _memory(node: fx.Node) -> set[int]:
    x = value(node)
    while isinstance(x, Tensor) and functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)  # of a batch, inside of vmap
    known = isinstance(x, Tensor) and x.layout is torch.strided
    return {x.untyped_storage()._cdata} if known else set()
