"""Linearity: whether a program is seen to be linear in some of its inputs."""

from __future__ import annotations

from collections.abc import Collection
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from . import rule
from .errors import FwdcompileError
from .program import Program, is_differentiable, is_random, op_name, value
from .simplify import dce
from .sizes import Sym
from .trace import bind_call
from .transform import Walk


def not_linear(program: Program, group: str) -> str:
    """Why a program is not seen to be linear in the tensors of a group; empty if it is.

    It is if its tangent along them depends on none of them, and zeros for them give zeros.
    """
    if drawn := [node for node in program.graph.nodes if is_random(node)]:
        return f"{op_name(drawn[0])} draws random numbers"
    starts = list(members(program, group))
    try:
        return _not_affine(program, starts) or _not_zero(program, starts)
    except FwdcompileError as error:
        return str(error)


def _not_affine(program: Program, starts: Collection[fx.Node]) -> str:
    """Why the slope along some inputs is not seen to be one for all of their values."""
    walk = Walk(program, 1)
    names = [slot.name for node, slot in program.placeholders() if node in starts]
    dual = walk.run(dict.fromkeys(names, range(1)), ())
    for node in downstream(starts):
        if isinstance(value(node), Sym):
            return f"{op_name(node)} reads a value"
        if is_differentiable(value(node)) and node not in walk.dots:
            return f"{op_name(node)} has no slope"
    dce(dual.graph)
    for node in downstream([walk.primals[node] for node in starts]):
        if node.meta["role"] != "primal":
            return f"the slope of {node.meta['of']} depends on it"
    return ""


def _not_zero(program: Program, starts: Collection[fx.Node]) -> str:
    """Why zeros for some inputs are not seen to give zeros."""
    zeros = set(starts)
    for node, slot in program.placeholders():
        if slot.kind == "constant" and not program.constants[slot.name].any():
            zeros.add(node)
    for node in program.graph.nodes:
        if node.op == "call_function" and _vanishes(node, zeros):
            zeros.add(node)
    added = [node for node, _ in program.results() if node not in zeros]
    return f"it adds something in {op_name(added[0])}" if added else ""


def _vanishes(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """Whether an op gives zeros where some of what it reads is zero, whatever the rest."""

    def zero(arg: Any) -> bool:
        if isinstance(arg, list | tuple):
            return all(map(zero, arg))
        number = isinstance(arg, int | float | complex) and arg == 0
        return arg is None or number or (isinstance(arg, fx.Node) and arg in zeros)

    name = op_name(node)
    if node.target is getitem:
        return zero(node.args[0]) or _tried(node.args[0], zeros, node.args[1])  # type: ignore
    if not isinstance(node.target, OpOverload):
        return False
    bound = bind_call(node.target, node.args, node.kwargs)
    if name.startswith(("zeros", "new_zeros", "empty", "new_empty")):
        return True  # what nobody writes to empty memory is nobody's derivative
    if name.startswith(("full", "new_full", "scalar_tensor")) or name == "fill":
        return zero([bound[key] for key in ("fill_value", "s", "value") if key in bound])
    if not zeros.intersection(node.all_input_nodes):
        return False
    row = rule.table.get(node.target)
    if name in _READS:
        return all(zero(bound[arg]) for arg in _READS[name])
    if row is not None and row.word == "linear":
        return all(zero(bound[arg]) for arg in row.wrt)
    return _tried(node, zeros)


# The arguments that have to be zero.
_READS = {
    "add": ("self", "other"), "sub": ("self", "other"), "rsub": ("self", "other"),
    "div": ("self",), "where": ("self", "other"), "detach": ("self",),
}  # fmt: skip


def _tried(node: fx.Node, zeros: Collection[fx.Node], item: int | None = None) -> bool:
    """Whether one op gives zeros for zeros and, in place of the rest, for random numbers."""
    generator = torch.Generator().manual_seed(0)

    def sample(arg: fx.Node) -> Any:
        x = value(arg)
        drawn = torch.rand(x.shape, generator=generator) * 0.8 + 0.1
        drawn = torch.zeros(x.shape) if arg in zeros else drawn
        drawn = drawn > 0.5 if x.dtype == torch.bool else drawn
        return drawn.to(x.device, x.dtype)  # an index becomes zero

    try:
        with torch.no_grad():
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), sample)  # type: ignore[misc]
            found = node.target(*args, **kwargs)  # type: ignore[operator]
        found = found if item is None else found[item]
        return all(bool((x == 0).all()) for x in pytree.tree_leaves(found))
    except Exception:  # what cannot be tried is not seen
        return False


def paths(program: Program, group: str) -> set[tuple[int, int]]:
    """Which outputs depend on which tensors of a group, as pairs of places."""
    outs = list(program.results())
    found = set()
    for node, place in members(program, group).items():
        reached = {node, *downstream([node])}
        found |= {(place, place_of(slot.name)) for out, slot in outs if out in reached}
    return found


def members(program: Program, group: str) -> dict[fx.Node, int]:
    """The inputs of a group, each with its place in it."""
    return {
        node: place_of(slot.name)
        for node, slot in program.placeholders()
        if slot.name.startswith(f"{group}.")
    }


def downstream(starts: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes whose values depend on those of some, in the order of the program."""
    seen, found = set(starts), []
    for node in next(iter(seen)).graph.nodes if seen else ():
        if node.op == "call_function" and seen.intersection(_read(node)):
            seen.add(node)
            found.append(node)
    return found


def _read(node: fx.Node) -> list[fx.Node]:
    """What an op reads the values of: zeros_like, new_full and fill take a shape first."""
    name = op_name(node)
    shape = name.startswith("new_") or name.endswith("_like") or name == "fill"
    rest: list[fx.Node] = []
    fx.map_arg((node.args[1:], node.kwargs), rest.append)
    return rest if shape else node.all_input_nodes


def place_of(name: str) -> int:
    """The place in its group that a name ends in."""
    return int(name.rsplit(".", 1)[1])
