"""Pushforward: the tangent of a `torch.autograd.Function`, as a program made of its own derivative.

A Function with a `jvp` says itself what its tangent is. One with a `backward` alone says what J' g
is; J x_dot is the transpose of that. So backward is captured as a program, shown to be linear in
g, and the vjp of this map of g is captured along x_dot.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor, fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.autograd.function import Function
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from . import rule
from .autocast import without_casts
from .binding import signature_of
from .capture import capture
from .custom import Call, Ref, attached, calls, dissolve, empty, intermediate
from .errors import FwdcompileError, RuleError
from .linearity import downstream, members, not_linear, paths, place_of
from .program import Program, is_differentiable, op_name, programs_of, value
from .simplify import dce
from .subgraph import set_outputs
from .transform import transform

aten = torch.ops.aten


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


_made: weakref.WeakKeyDictionary[Call, Pushforward | FwdcompileError] = weakref.WeakKeyDictionary()

rule.not_implemented(
    intermediate,
    "a torch.autograd.Function has saved it, and it is neither an input nor an output of forward, "
    "or makes it by another Function: its part in a second derivative is lost. Save inputs, or "
    "return it as a further output",
)


@rule.joint(attached, wrt=("inputs",))
def attached_dot(d: Any, inputs: Any, saved: Any, key: int, out: Any) -> Any:
    """The tangents of a Function's results, round its forward."""
    made = _made[calls[key]]
    if isinstance(made, FwdcompileError):
        raise RuleError(str(made))
    dots = {f"dots.{i}": x for i, x in enumerate(d["inputs"]) if x is not None}
    with _disable_current_modes():
        program = made.along(dots)
    if not made.leaves_out:
        dots = {f"dots.{i}": torch.zeros_like(x) for i, x in enumerate(inputs)} | dots
    held = [intermediate(x, inputs) if is_differentiable(x) else x for x in saved]
    found = evaluate(program, _named(saved=held, inputs=inputs, outs=out) | dots)
    dots_out = [found.get(f"out.{i}") for i in range(len(out))]
    return tuple(intermediate(x, inputs) if x is not None and made.opaque else x for x in dots_out)


def derive(program: Program) -> Program:
    """Makes the pushforwards of the Functions that a captured program calls.

    Where there is none, that is an error only if a tangent reaches the Function. Calls that differ
    in nothing share one.
    """
    known: dict[Any, Pushforward | FwdcompileError] = {}
    for node in program.graph.nodes:
        if node.target is attached and (call := calls[node.args[3]]) not in _made:
            kind = _kind(call, node)
            if kind not in known:
                with without_casts():
                    known[kind] = _tried(call, node)
            _made[call] = known[kind]
    return program


def _kind(call: Call, node: fx.Node) -> Any:
    """Equal for calls with one pushforward, as far as what their ctx holds can be compared."""
    plain = (bool, int, float, complex, str, torch.dtype, torch.device, Ref, type(None))
    leaves, spec = pytree.tree_flatten((call.ctx, list(call.outs)))
    if not all(type(leaf) in plain for leaf in leaves):
        return call
    held = tuple((type(leaf), repr(leaf)) for leaf in leaves)
    tensors = [[signature_of(value(x)) for x in group] for group in node.args[:3]]  # type: ignore
    return call.function, call.needs, held, repr(spec), repr(tensors)


def _tried(call: Call, node: fx.Node) -> Pushforward | FwdcompileError:
    try:
        return _pushforward(call, node)
    except FwdcompileError as error:
        return error
    except Exception as error:
        return RuleError(f"the derivative of {call.name} raised {type(error).__name__}: {error}")


def _pushforward(call: Call, node: fx.Node) -> Pushforward:
    outs, inputs, saved = ([value(x) for x in group] for group in node.args[:3])  # type: ignore
    if any(isinstance(n, SymInt) for x in (*outs, *inputs, *saved) for n in x.shape):
        raise RuleError(
            f"{call.name}, a torch.autograd.Function, takes tensors whose size is open. Leave "
            "dynamic=True out, and give it no tensor whose size depends on values."
        )
    with FakeTensorMode():
        like = [[empty(x) for x in group] for group in (saved, inputs, outs)]
        dots, gs = [empty(x) for x in inputs], [empty(x) for x in outs]
    if call.function.jvp is not Function.jvp:
        program = _captured(_own(call), *like, dots)
        return Pushforward(program, opaque=bool(program.calls))
    pullback = _captured(_pullback(call), *like, gs)
    _join_detached(pullback)
    if reason := not_linear(pullback, "gs"):
        raise RuleError(
            f"the backward of {call.name} is not linear in the gradient that it is given ({reason})"
            ", so that it does not say what a tangent is.\n  Give the Function a jvp."
        )
    unknown = RuleError(
        f"the backward of {call.name} calls an op that torch has no derivative of.\n  Give the "
        "Function a jvp."
    )
    if not all(map(_has_formula, downstream(members(pullback, "gs")))):
        raise unknown
    with torch.enable_grad():  # otherwise formulas of torch reuse what has no second derivative
        program = _captured(_transposed(pullback), *like, dots)
    if paths(pullback, "gs") != {(j, i) for i, j in paths(program, "dots")}:
        raise unknown
    return Pushforward(program, opaque=bool(pullback.calls))


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


def _own(call: Call) -> Callable[..., Any]:
    def pushforward(saved: Any, inputs: Any, outs: Any, dots: Any) -> Any:
        ctx = call.context(saved=saved, inputs=inputs, outs=outs)
        ctx.saved_tensors = getattr(ctx, "saved_for_forward", ctx.to_save)
        each = iter(dots)
        found = call.function.jvp(ctx, *(next(each) if needed else None for needed in call.needs))
        found = found if isinstance(found, tuple) else (found,)
        return [x for x, place in zip(found, call.outs, strict=True) if isinstance(place, int)]

    return pushforward


def _pullback(call: Call) -> Callable[..., Any]:
    own = call.function.vjp is not Function.vjp
    backward = call.function.vjp if own else call.function.backward

    def pullback(saved: Any, inputs: Any, outs: Any, gs: Any) -> Any:
        ctx = call.context(saved=saved, inputs=inputs, outs=outs)
        ctx.saved_tensors = ctx.to_save
        absent = [
            None if isinstance(p, int) or not ctx.materialize_grads else p() for p in call.outs
        ]
        given = [gs[p] if isinstance(p, int) else x for p, x in zip(call.outs, absent, strict=True)]
        boxed = getattr(call.function, "boxed_grads_call", False)
        found = backward(ctx, given) if boxed else backward(ctx, *given)
        found = found if isinstance(found, tuple) else (found,)
        if len(found) < len(call.needs):
            raise RuleError(f"backward returns {len(found)} gradients for {len(call.needs)} inputs")
        return [x for x, needed in zip(found, call.needs, strict=False) if needed]

    return pullback


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
            env[node] = _DIFFERENTIABLE.get(node.target, node.target)(*args, **kwargs)
    return {slot.name: env[node] for node, slot in program.results()}


# What torch has no derivative of, by ops that it has one of.
_DIFFERENTIABLE: dict[Any, Callable[..., Any]] = {
    aten.copy.default: lambda self, src, *_: src.to(self.dtype).expand(self.shape),
}


def _constant(x: Tensor) -> Tensor:
    if x.numel() > 1:
        raise RuleError("a derivative makes a tensor of numbers; let forward save it in ctx")
    return torch.full(x.shape, x.item(), dtype=x.dtype, device=x.device)


def _named(**groups: Sequence[Tensor]) -> dict[str, Any]:
    return {f"{group}.{i}": x for group, xs in groups.items() for i, x in enumerate(xs)}
