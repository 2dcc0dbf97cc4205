"""Linearity: whether a program is seen to be linear in some of its inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .errors import FwdcompileError, RuleError
from .program import Program, is_differentiable, is_random, op_name, value
from .simplify import dce
from .transform import _Transform


def evaluate(program: Program, values: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a program op by op, on tensors of any kind.

    Args:
        program: without higher-order ops.
        values: of its inputs and tangents, by name; what it does not read may be missing.
    """
    env: dict[fx.Node, Any] = {}
    for node, slot in program.placeholders():
        env[node] = values.get(slot.name)
        if slot.kind == "constant":
            env[node] = _constant(program.constants[slot.name])
    for node in program.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.node.map_aggregate(
                (node.args, dict(node.kwargs)), lambda x: env[x] if isinstance(x, fx.Node) else x
            )
            env[node] = node.target(*args, **kwargs)
    return {slot.name: env[node] for node, slot in program.results()}


def _constant(x: Tensor) -> Tensor:
    if x.numel() > 1:
        raise RuleError("a derivative makes a tensor of numbers; let forward save it in ctx")
    return torch.full(x.shape, x.item(), dtype=x.dtype, device=x.device)


def not_linear(program: Program, group: str) -> str:
    """Why a program is not seen to be linear in the tensors of a group; empty if it is."""
    if drawn := [node for node in program.graph.nodes if is_random(node)]:
        return f"{op_name(drawn[0])} draws random numbers"
    return _not_affine(program, group) or _not_zero(program, group)


def _not_affine(program: Program, group: str) -> str:
    """Why a program is not seen to have one slope along all tensors of a group.

    It has, if its tangent along them depends on none of them, and no value has lost its tangent.
    """
    names = {slot.name for slot in program.inputs if slot.name.startswith(f"{group}.")}
    walk = _Transform(program, 1)
    try:
        dual = walk.run(dict.fromkeys(names, range(1)), ())
    except FwdcompileError as error:
        return str(error)
    starts = [node for node, slot in program.placeholders() if slot.name in names]
    for node in _downstream(starts):
        if is_differentiable(value(node)) and node not in walk.dots:
            return f"{op_name(node)} has no slope"
    dce(dual.graph)
    for node in _downstream([walk.primals[node] for node in starts]):
        if node.meta["role"] != "primal":
            return f"the slope of {node.meta['of']} depends on it"
    return ""


def _not_zero(program: Program, group: str) -> str:
    """Says if zeros for the tensors of a group give something else, tried on numbers."""
    values: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    for node, slot in program.placeholders():
        x = value(node)
        sample = torch.rand(x.shape, generator=generator) * 0.8 + 0.1  # where most functions are
        if slot.name.startswith(f"{group}."):
            sample = torch.zeros(x.shape)
        sample = sample > 0.5 if x.dtype == torch.bool else sample
        values[slot.name] = sample.to(x.device, x.dtype)  # an index becomes zero
    with torch.no_grad():
        found = evaluate(program, values)
    affine = any(bool(x.nan_to_num().ne(0).any()) for x in found.values())
    return "it adds something" if affine else ""


def paths(program: Program, group: str) -> set[tuple[int, int]]:
    """Which outputs depend on which tensors of a group, as pairs of places."""
    outs = list(program.results())
    found = set()
    for node, slot in program.placeholders():
        if slot.name.startswith(f"{group}."):
            reached = {node, *_downstream([node])}
            found |= {(place_of(slot.name), place_of(s.name)) for n, s in outs if n in reached}
    return found


def _downstream(starts: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes whose values depend on those of some, in the order of the program."""
    seen, found = set(starts), []
    for node in next(iter(seen)).graph.nodes if seen else ():
        if node.op == "call_function" and seen.intersection(node.all_input_nodes):
            if not _reads_shape(node):
                seen.add(node)
                found.append(node)
    return found


def _reads_shape(node: fx.Node) -> bool:
    """Whether the op is one of zeros_like, new_empty and their kind."""
    return op_name(node).startswith("new_") or op_name(node).endswith("_like")


def place_of(name: str) -> int:
    """The place in its group that a name ends in."""
    return int(name.rsplit(".", 1)[1])
