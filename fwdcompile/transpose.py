"""Transpose: a tangent from a backward.

A backward says what J' g is; J x_dot is the transpose of that. So it is captured as a program,
shown to be linear in g, and the vjp of this map of g is captured along x_dot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import SymFloat, SymInt, Tensor, fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from .capture import capture
from .custom import dissolve, empty
from .errors import RuleError
from .linearity import downstream, members, not_linear, paths, place_of
from .program import Program, op_name, programs_of, value
from .simplify import dce
from .subgraph import set_outputs
from .transform import transform

aten = torch.ops.aten


class Tensors(NamedTuple):
    """What a derivative is made of: what is saved, the inputs with a tangent, the results."""

    saved: list[Tensor]
    inputs: list[Tensor]
    outs: list[Tensor]

    def like(self, who: str) -> Tensors:
        """Tensors of the same layout, without numbers.

        Raises:
            RuleError: a size is open.
        """
        if any(isinstance(n, SymInt) for group in self for x in group for n in x.shape):
            raise RuleError(
                f"{who} takes tensors whose size is open. Leave dynamic=True out, and give it no "
                "tensor whose size depends on values."
            )
        with FakeTensorMode():
            return Tensors(*([empty(x) for x in group] for group in self))


@dataclass(frozen=True, eq=False)
class Pushforward:
    """A program from `saved`, `inputs`, `outs` and `dots`, all lists, to the tangents of `outs`.

    It is opaque where second derivatives of it would not be those of the Function.
    """

    program: Program
    opaque: bool = False
    _along: dict[tuple[str, ...], Program] = field(default_factory=dict)

    @cached_property
    def leaves_out(self) -> bool:
        """Whether a tangent that is left out costs nothing; otherwise it has to be zeros."""
        return not not_linear(self.program, "dots")

    def push(self, tensors: Tensors, dots: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The tangents of `outs` from those of `inputs`, op by op."""
        given = {f"dots.{i}": x for i, x in enumerate(dots) if x is not None}
        with _disable_current_modes():
            program = self.along(given)
        if not self.leaves_out:
            zeros = [torch.zeros_like(x) for x in tensors.inputs]
            given = _named(dots=zeros) | given
        found = evaluate(program, _named(**tensors._asdict()) | given)
        return [found.get(f"out.{i}") for i in range(len(tensors.outs))]

    def along(self, present: Iterable[str]) -> Program:
        """The program for some of the tangents: as it is linear, its own tangent along them."""
        key = tuple(present)
        if key not in self._along:
            self._along[key] = self._restricted(key) if self.leaves_out else self.program
        return self._along[key]

    def _restricted(self, present: tuple[str, ...]) -> Program:
        program = transform(self.program, present)
        pairs = [(node, slot) for node, slot in program.results() if slot.kind == "tangent"]
        pairs = [(node, slot) for node, slot in pairs if not node.meta.get("absent")]
        set_outputs(program.graph, [node for node, _ in pairs])
        dce(program.graph)
        return replace(program, outputs=tuple(slot for _, slot in pairs))


def pushed(own: Callable[..., Any], tensors: Tensors) -> Pushforward:
    """The pushforward that a function of `saved`, `inputs`, `outs` and `dots` computes."""
    program = _captured(own, *tensors, list(map(empty, tensors.inputs)))
    return Pushforward(program, opaque=bool(program.calls))


def transposed(
    pullback: Callable[..., Any], tensors: Tensors, who: str, instead: str
) -> Pushforward:
    """The pushforward that a pullback says by its transpose.

    Args:
        pullback: gives the gradients of `inputs`, from `saved`, `inputs`, `outs` and `gs`, the
            gradients of `outs`.
        tensors: without numbers.
        who: whose pullback it is, for messages.
        instead: what the user can do where this raises.

    Raises:
        RuleError: it is not seen to be linear in `gs`, or torch cannot transpose it.
    """
    program = _captured(pullback, *tensors, list(map(empty, tensors.outs)))
    _join_detached(program)
    for node in downstream(members(program, "gs")):
        if not _has_formula(node):
            raise RuleError(
                f"the backward of {who} calls {node.target}, which torch has no derivative of.\n"
                f"  {instead}"
            )
    if reason := not_linear(program, "gs"):
        raise RuleError(
            f"the backward of {who} is not linear in the gradient that it is given ({reason}), so "
            f"that it does not say what a tangent is.\n  {instead}"
        )
    with torch.enable_grad():  # otherwise formulas of torch reuse what has no second derivative
        forth = _captured(_transposed(program), *tensors, list(map(empty, tensors.inputs)))
    if paths(program, "gs") != {(j, i) for i, j in paths(forth, "dots")}:
        raise RuleError(
            f"the backward of {who} calls an op that torch has no derivative of.\n  {instead}"
        )
    return Pushforward(forth, opaque=bool(program.calls))


def _captured(function: Callable[..., Any], *groups: list[Tensor]) -> Program:
    """A program of what a function returns; Functions that it calls have been taken apart."""
    program = capture(function, groups, {})
    for node in program.graph.nodes:
        read = isinstance(value(node), SymFloat) or node.target is aten._local_scalar_dense.default
        if read or programs_of(node):
            raise RuleError(
                f"a derivative reads a number from a tensor, or has control flow ({op_name(node)})"
            )
    if program.constants.keys() - program.literals:
        raise RuleError(
            "a derivative reads a tensor that is no argument and is not saved in ctx as a tensor, "
            "a list or a dict of tensors"
        )
    pairs = [(node, slot) for node, slot in program.results() if slot.kind == "output"]
    set_outputs(program.graph, [node for node, _ in pairs])
    if program.calls:
        dissolve(program.graph)
    dce(program.graph)
    return replace(program, outputs=tuple(slot for _, slot in pairs))


def _join_detached(pullback: Program) -> None:
    """Lets what depends on a gradient depend on it where backward detaches it as well."""
    for node in downstream(members(pullback, "gs")):
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            pullback.graph.erase_node(node)


def _has_formula(node: fx.Node) -> bool:
    """Whether autograd knows the op; where it does not know a library's, it says nothing."""
    if not isinstance(node.target, OpOverload) or node.target.namespace in ("aten", "prims"):
        return True
    keys = ("Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd")
    name = node.target.name()  # type: ignore[no-untyped-call]
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)


def _transposed(pullback: Program) -> Callable[..., Any]:
    names = [slot.name for slot in pullback.outputs]

    def pushforward(saved: Any, inputs: Any, outs: Any, dots: Any) -> Any:
        known = _named(saved=saved, inputs=inputs, outs=outs)
        if not names:
            return []

        def linear(*gs: Tensor) -> tuple[Tensor, ...]:
            found = evaluate(pullback, known | _named(gs=gs))
            return tuple(found[name] for name in names)

        grads, vjp = torch.func.vjp(linear, *map(torch.zeros_like, outs))  # type: ignore[misc]
        each = zip((dots[place_of(name)] for name in names), grads, strict=True)
        return list(vjp(tuple(_like(dot, grad) for dot, grad in each)))

    return pushforward


def _like(dot: Tensor, grad: Tensor) -> Tensor:
    """The transpose of what autograd does to a gradient that is not quite like its input."""
    dot = dot.to(grad.dtype)
    return dot if dot.shape == grad.shape else dot.expand(grad.shape)


def evaluate(program: Program, values: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a program op by op, on tensors of any kind.

    Args:
        program: of a derivative, without higher-order ops.
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


def _named(**groups: Sequence[Tensor]) -> dict[str, Any]:
    return {f"{group}.{i}": x for group, xs in groups.items() for i, x in enumerate(xs)}
