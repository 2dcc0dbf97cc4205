"""Pushforward: the tangent of a `torch.autograd.Function`, as a program made of its own derivative.

A Function with a `jvp` says itself what its tangent is, one with a `backward` alone the transpose.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.autograd.function import Function
from torch.utils import _pytree as pytree

from . import rule
from .autocast import without_casts
from .binding import signature_of
from .custom import Call, Ref, attached, calls, intermediate
from .errors import FwdcompileError, RuleError
from .program import Program, is_differentiable, value
from .transpose import Pushforward, Tensors, pushed, transposed

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
    held = [intermediate(x, inputs) if is_differentiable(x) else x for x in saved]
    dots = made.push(Tensors(held, inputs, out), d["inputs"])
    return tuple(intermediate(x, inputs) if x is not None and made.opaque else x for x in dots)


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
    tensors = Tensors(saved, inputs, outs).like(f"{call.name}, a torch.autograd.Function,")
    if call.function.jvp is not Function.jvp:
        return pushed(_own(call), tensors)
    return transposed(_pullback(call), tensors, call.name, "Give the Function a jvp.")


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
