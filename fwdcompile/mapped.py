"""Mapped: one op run for all directions, which stand along a first axis of some operands."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx
from torch.func import vmap
from torch.utils import _pytree as pytree

from .program import op_name, value

aten = torch.ops.aten


def broadcasts(node: fx.Node, axis: Collection[fx.Node]) -> bool:
    """Whether an op takes the new axis of some operands as it takes any first one."""
    ranks = {arg: value(arg).ndim for arg in node.all_input_nodes}
    aligned = all(ranks[arg] == max(ranks.values()) for arg in ranks if arg in axis)
    if node.target is aten.linear.default:
        return not any(arg in axis for arg in node.all_input_nodes[1:])
    if node.target is aten.matmul.default:
        # an operand of more dimensions, without the axis, would be copied for each direction
        folds = all(arg in axis or rank == 2 for arg, rank in ranks.items())
        return aligned and folds and min(ranks.values()) > 1
    # what autograd alone calls need not broadcast: aten.gelu_backward by oneDNN does not
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if not is_pointwise or op_name(node).endswith("_backward"):
        return False
    # a tensor without axes has a weaker dtype than one with some
    return aligned and max(ranks.values()) > 0


def scales(node: fx.Node, axis: Collection[fx.Node]) -> bool:
    """Whether an op multiplies its first operand, which has the axis, by a slope of its second.

    That slope is then computed once, and not for each direction.
    """
    if node.target is not aten.gelu_backward.default or len(node.all_input_nodes) < 2:
        return False
    d, x = node.all_input_nodes
    return d in axis and x not in axis and value(d).shape == value(x).shape


def vmapped(
    call: Callable[..., Any], dims: Sequence[int | None], fakes: list[Any], expected: Any
) -> Any:
    """Runs an op under torch's vmap.

    Args:
        call: the op, as a function of its tensors.
        dims: 0 for each tensor that has the axis, else None.
        fakes: the tensors.
        expected: what it gives for one direction.

    Raises:
        RuntimeError: torch cannot batch it, would run it for one direction after another, with a
            warning, or gives another dtype, as torch.where does for a scalar of a longer one.
    """
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        out = vmap(call, tuple(dims))(*fakes)
    finally:
        functorch._set_vmap_fallback_enabled(before)
    pairs = zip(pytree.tree_leaves(out), pytree.tree_leaves(expected), strict=True)
    if any(mine.dtype != theirs.dtype for mine, theirs in pairs):
        raise RuntimeError("vmap promotes the dtypes of scalars differently here")
    return out


def one_by_one(
    call: Callable[..., Any], dims: Sequence[int | None], fakes: list[Any], size: int
) -> Any:
    """Runs an op for one direction after another, and stacks what it gives."""
    outs = []
    for k in range(size):
        pairs = zip(fakes, dims, strict=True)
        outs.append(call(*(x if dim is None else x.select(0, k) for x, dim in pairs)))
    if isinstance(outs[0], list | tuple):
        return [torch.stack(each) for each in zip(*outs, strict=True)]
    return torch.stack(outs)
