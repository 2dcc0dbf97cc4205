"""Registered: the tangent of a library's op, by the backward it has from `torch.library`.

What `register_autograd` was given is the only derivative of such an op; `transpose.py` makes a
tangent of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.autograd import function
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from . import rule
from .binding import signature_of
from .custom import Context, Ref, ref
from .errors import FwdcompileError, RuleError
from .program import is_differentiable, value
from .rule import Rule
from .trace import bind_call, unflatten_call
from .transpose import Pushforward, Tensors, transposed

Arguments = dict[str, Any]

# With what each is for, which so keeps its identity.
_known: dict[Any, tuple[Pushforward, Any]] = {}

with torch._C._AutoDispatchBelowAutograd():
    _AUTOGRAD = torch._C._dispatch_tls_local_exclude_set()
_AUTOGRAD = _AUTOGRAD - torch._C._dispatch_tls_local_exclude_set()


@rule.maker
def row_of(node: fx.Node) -> Rule | None:
    """A row for a call of an op, from the backward that it is registered with, if there is one.

    Raises:
        RuleError: the backward cannot be transposed.
    """
    op = node.target
    if not isinstance(op, OpOverload) or op.namespace in ("aten", "prims", "fwdcompile"):
        return None
    arguments = fx.map_arg(bind_call(op, node.args, node.kwargs), value)
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set() - _AUTOGRAD
    with _disable_current_modes(), torch._C._ForceDispatchKeyGuard(include, exclude):
        if (info := _info(op, arguments)) is None:  # type: ignore[arg-type]
            return None
        call = _Registered(op, info, arguments, value(node))  # type: ignore[arg-type]
        call.derive()
    names = tuple(arguments)
    return Rule(op, "joint", names, {"": _term(call, names)}, _where(info._backward_fn))


def _info(op: OpOverload, arguments: Arguments) -> Any:
    """What torch keeps of an op's `register_autograd`: found where it calls for a derivative."""
    met: list[Any] = []

    def apply(cls: Any, *args: Any) -> Any:
        met.append(cls)
        raise _Met

    moving = pytree.tree_map_only(
        Tensor, lambda x: x.detach().requires_grad_(is_differentiable(x)), arguments
    )
    args, kwargs = unflatten_call(op, moving)
    patched = mock.patch.object(
        function._SingleLevelFunction, "apply", classmethod(apply), create=True
    )
    try:
        with torch.enable_grad(), patched:
            op(*args, **kwargs)
    except _Met:
        found = inspect.getclosurevars(met[0].forward).nonlocals
        if "orig_forward" in found:  # of an op that takes or returns lists
            found = inspect.getclosurevars(found["orig_forward"]).nonlocals
        info = found.get("info")
        return info if found.get("op") is op and getattr(info, "_backward_fn", None) else None
    except Exception:  # an op that refuses such inputs has no derivative that is known here
        return None
    return None


class _Met(Exception):  # noqa: N818
    """Not for users: an op asks for its derivative."""


class _Registered:
    """A call of an op, its tensors apart from the places that they are found at."""

    def __init__(self, op: OpOverload, info: Any, arguments: Arguments, out: Any) -> None:
        self.op, self.info = op, info
        differentiable = [
            [x for x in pytree.tree_leaves(tree) if is_differentiable(x)]
            for tree in (arguments, out)
        ]
        groups = {"inputs": differentiable[0], "outs": differentiable[1], "saved": []}
        self.places = pytree.tree_map(lambda x: ref(x, groups), (arguments, out))
        self.tensors = Tensors(groups["saved"], groups["inputs"], groups["outs"])

    def derive(self) -> None:
        """Makes the pushforward; calls that differ in nothing share one."""
        signature = repr([[signature_of(x) for x in group] for group in self.tensors])
        info = self.info
        key = (self.op, info._backward_fn, info._setup_context_fn, repr(self.places), signature)
        if key not in _known:
            instead = f"Give {self.op} a row with fwdcompile.rule.jvp."
            try:
                like = self.tensors.like(str(self.op))
                made = transposed(self.pullback, like, str(self.op), instead)
                if made.opaque:
                    raise RuleError(
                        f"the backward of {self.op} calls a torch.autograd.Function: second "
                        f"derivatives would lack its part.\n  {instead}"
                    )
                _known[key] = made, self.places
            except FwdcompileError as error:
                raise RuleError(str(error)) from error
            except Exception as error:
                raise RuleError(
                    f"the backward of {self.op} raised {type(error).__name__}: {error}\n  {instead}"
                ) from error
        self.pushforward, _ = _known[key]

    def pullback(
        self, saved: list[Tensor], inputs: list[Tensor], outs: list[Tensor], gs: list[Tensor]
    ) -> list[Tensor | None]:
        """What the registered functions compute: gradients of `inputs` from those of `outs`."""
        groups = {"saved": saved, "inputs": inputs, "outs": outs}
        arguments, out = pytree.tree_map_only(
            Ref, lambda place: groups[place.group][place.place], self.places
        )
        schema = self.op._schema.arguments
        given = [arguments[a.name] for a in schema if not a.kwarg_only]
        named = {a.name: arguments[a.name] for a in schema if a.kwarg_only}
        ctx = Context(tuple(pytree.tree_map(is_differentiable, given)))
        if self.info._setup_context_fn:
            keywords = {"keyword_only_inputs": named} if named else {}
            self.info._setup_context_fn(ctx=ctx, inputs=tuple(given), output=out, **keywords)
        ctx.saved_tensors = ctx.to_save

        def gradient(x: Tensor, place: Ref) -> Tensor | None:
            if place.group == "outs" and not any(x is fixed for fixed in ctx.non_differentiable):
                return gs[place.place]
            return torch.zeros_like(x) if ctx.materialize_grads else None

        grads = pytree.tree_map(gradient, out, self.places[1])
        several = len(self.op._schema.returns) > 1
        found = self.info._backward_fn(ctx, *(grads if several else [grads]))
        found = found if isinstance(found, tuple) else (found,)
        return [x for _, x in _leaves(dict(zip(arguments, found, strict=False)), arguments)]

    def group(self, arguments: Arguments, out: Any) -> Tensors:
        """The tensors of a call that differs in its tensors alone."""
        tensors = Tensors(*(list(group) for group in self.tensors))
        leaves = pytree.tree_leaves((arguments, out))
        for place, x in zip(pytree.tree_leaves(self.places), leaves, strict=True):
            if isinstance(place, Ref):
                getattr(tensors, place.group)[place.place] = x
        return tensors


def _leaves(values: Mapping[str, Any], arguments: Arguments) -> Iterator[tuple[Tensor, Any]]:
    """The differentiable tensors among arguments, each with its part of the value by that name."""
    for name, arg in arguments.items():
        tensors = arg if isinstance(arg, list | tuple) else [arg]
        found = values.get(name)
        parts = found if isinstance(found, list | tuple) else [found] * len(tensors)
        pairs = zip(tensors, parts, strict=True)
        yield from ((x, part) for x, part in pairs if is_differentiable(x))


def _term(call: _Registered, names: tuple[str, ...]) -> Callable[..., Any]:
    def term(d: Arguments, out: Any, **arguments: Any) -> Any:
        dots = [dot for _, dot in _leaves(d, arguments)]
        found = iter(call.pushforward.push(call.group(arguments, out), dots))
        if isinstance(out, Tensor):
            return next(found)
        return tuple(next(found) if is_differentiable(x) else None for x in out)

    kind = inspect.Parameter.KEYWORD_ONLY
    asked = [inspect.Parameter(name, kind) for name in ("d", "out", *names)]
    term.__signature__ = inspect.Signature(asked)  # type: ignore[attr-defined]
    return term


def _where(backward: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(backward), "__code__", None)
    return rule.place_in(code, code.co_firstlineno) if code else repr(backward)
