"""Custom: a `torch.autograd.Function` in a captured program keeps a derivative of its own.

Its forward is recorded on detached inputs, and its results leave through the op `attached`, which
also names the inputs: there the tangents go round the forward, by `pushforward.py`.

    y = Function.apply(x)   becomes   y = attached([forward(x.detach())], [x], saved, key)
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx
from torch._dynamo.variables.misc import AutogradFunctionVariable
from torch.autograd import function
from torch.autograd.function import Function, FunctionCtx
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .hazards import here, line_of
from .program import Program, is_differentiable, rename


def empty(x: Tensor) -> Tensor:
    """A tensor of the same shape, strides, dtype and device."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


@torch.library.custom_op("fwdcompile::attached", mutates_args=())
def _attached(
    outs: list[Tensor], inputs: list[Tensor], saved: list[Tensor], key: int
) -> list[Tensor]:
    return [x.clone() for x in outs]


@torch.library.custom_op("fwdcompile::intermediate", mutates_args=())
def _intermediate(x: Tensor, inputs: list[Tensor]) -> Tensor:
    return x.clone()


_attached.register_fake(lambda outs, *_: list(map(empty, outs)))
_intermediate.register_fake(lambda x, _: empty(x))

# Why autograd cannot go through a program with one.
FUNCTION = "a torch.autograd.Function, the derivative is in the tangents alone"

attached = torch.ops.fwdcompile.attached.default
intermediate = torch.ops.fwdcompile.intermediate.default


class Context(FunctionCtx):
    """The `ctx` of a Function while it is captured, and again when its derivative is."""

    to_save: tuple[Any, ...] = ()
    dirty_tensors: tuple[Any, ...] = ()
    non_differentiable: tuple[Any, ...] = ()
    materialize_grads = True
    saved_tensors: tuple[Any, ...] = ()

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad


@dataclass(frozen=True)
class Ref:
    """Where a tensor that a ctx holds is found: a place in `inputs`, `outs` or `saved`."""

    group: str
    place: int


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a Function in a program.

    Attributes:
        function: the class.
        needs: for each argument whether it is differentiable: those are `inputs`, in order.
        outs: for each result its place in the list `outs`, or what makes zeros like it.
        ctx: what its ctx holds, with a `Ref` for each tensor.
    """

    function: Any
    needs: tuple[bool, ...]
    outs: tuple[int | Callable[[], Tensor], ...]
    ctx: dict[str, Any]

    @property
    def name(self) -> str:
        """The class, as messages name it."""
        return str(self.function.__qualname__)

    def context(self, **groups: Sequence[Tensor]) -> Context:
        """The ctx with tensors of `inputs`, `outs` and `saved` in the places of those it held."""
        ctx = Context(self.needs)
        vars(ctx).update(
            pytree.tree_map_only(Ref, lambda ref: groups[ref.group][ref.place], self.ctx)
        )
        return ctx


calls: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()
_keys = itertools.count()


@contextmanager
def kept_derivatives() -> Iterator[dict[int, Call]]:
    """Records the Functions of the user by `attached`; gives what it has recorded, by key.

    Branches and loop bodies of higher-order ops are traced by dynamo, which takes a Function apart
    by itself; what it met there is raised at the end.

    Raises:
        CaptureError: a Function of a kind, or in a place, that cannot be kept.
    """
    traced = AutogradFunctionVariable.call_apply
    transformed: Any = vars(function)["custom_function_call"]
    made: dict[int, Call] = {}
    met: list[CaptureError] = []

    def apply(cls: Any, *args: Any) -> Any:
        if cls.__module__.startswith("torch."):
            return super(function._SingleLevelFunction, cls).apply(*args)
        return _apply(cls, here(), made, args)

    def custom_function_call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.startswith("torch."):
            return transformed(cls, *args, **kwargs)
        raise _refused(cls, here(), "inside a transform of torch.func it cannot be kept")

    def call_apply(self: Any, tx: Any, *args: Any) -> Any:
        if not self.fn_cls.__module__.startswith("torch."):
            where = line_of(tx.frame_summary())
            met.append(_refused(self.fn_cls, where, "in a branch or a loop body it cannot be kept"))
        return traced(self, tx, *args)

    with (
        # Function.apply ends in these two; a model may have bound it long before
        mock.patch.object(function._SingleLevelFunction, "apply", classmethod(apply), create=True),
        mock.patch.object(function, "custom_function_call", custom_function_call),
        mock.patch.object(AutogradFunctionVariable, "call_apply", call_apply),
    ):
        yield made
    if met:
        raise met[0]


def _refused(function: Any, where: str, reason: str) -> CaptureError:
    return CaptureError(
        f"{where}\n  {function.__qualname__} is a torch.autograd.Function with a derivative of its "
        f"own: {reason}.\n  Write it as plain torch ops, or make it a torch.library.custom_op and "
        "give that op a row with fwdcompile.rule.jvp."
    )


def _apply(cls: Any, where: str, made: dict[int, Call], args: tuple[Any, ...]) -> Any:
    apart = cls.setup_context is not Function.setup_context
    inner = [x.detach() if is_differentiable(x) else x for x in args]
    ctx = Context(tuple(map(is_differentiable, args)))
    out = cls.forward(*inner) if apart else cls.forward(ctx, *inner)
    if apart:
        cls.setup_context(ctx, tuple(inner), out)
    if ctx.dirty_tensors:
        raise _refused(cls, where, "it writes to its inputs (mark_dirty)")
    results = list(out) if isinstance(out, tuple) else [out]
    moving = [i for i, x in enumerate(results) if is_differentiable(x) and not _is_fixed(x, ctx)]
    inputs = [x for x in args if is_differentiable(x)]
    if not moving or not inputs:
        return out
    outs = [results[i] for i in moving]
    if len(set(map(id, outs))) < len(outs):
        raise _refused(cls, where, "it returns one tensor twice")
    groups = {"inputs": [x for x in inner if is_differentiable(x)], "outs": outs, "saved": []}
    held = pytree.tree_map(lambda x: ref(x, groups), vars(ctx))
    if any(isinstance(x, SymInt | SymFloat | SymBool) for x in pytree.tree_leaves(held)):
        raise _refused(cls, where, "its ctx holds a size that is open")
    places = tuple(moving.index(i) if i in moving else _zeros(x) for i, x in enumerate(results))
    call = Call(cls, ctx.needs_input_grad, places, held)
    key = next(_keys)
    calls[key] = made[key] = call
    # as for torch, what forward reads besides its arguments is constant
    fixed = [[x.detach() for x in group] for group in (outs, groups["saved"])]
    for i, x in zip(moving, attached(fixed[0], inputs, fixed[1], key), strict=True):
        results[i] = x
    return tuple(results) if isinstance(out, tuple) else results[0]


def _is_fixed(x: Tensor, ctx: Context) -> bool:
    return any(x is fixed for fixed in ctx.non_differentiable)


def ref(x: Any, groups: dict[str, list[Tensor]]) -> Any:
    """Where a tensor is found, in "saved" if nowhere else; what is no tensor, as it is."""
    if not isinstance(x, Tensor):
        return x
    for group, tensors in groups.items():
        for place, known in enumerate(tensors):
            if x is known:
                return Ref(group, place)
    groups["saved"].append(x)
    return Ref("saved", len(groups["saved"]) - 1)


def _zeros(x: Any) -> Callable[[], Any]:
    """Makes what torch hands to backward for a result without a derivative."""
    if not isinstance(x, Tensor):
        return lambda: None
    shape, dtype, device = tuple(x.shape), x.dtype, x.device
    return lambda: torch.zeros(shape, dtype=dtype, device=device)


def adopt_calls(program: Program, made: Mapping[int, Call]) -> Program:
    """A captured program that keeps its calls alive, their results named after the Functions."""
    nodes = [node for node in program.graph.nodes if node.target is attached]
    kept = {node: made[node.args[3]] for node in nodes}
    names: dict[fx.Node, str] = {}
    for node, call in kept.items():
        word = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", call.function.__name__).lower()
        single = len(node.args[0]) == 1
        names |= {user: word if single else f"{word}_{user.args[1]}" for user in node.users}
    rename(program.graph, names)
    return replace(program, calls=tuple(kept.values()))


def dissolve(graph: fx.Graph) -> None:
    """Leaves of Functions what their forwards compute, as soon as tangents have gone round them.

    Before: `y = attached([exp(detach(x))], [x], [], 0)[0]`. After: `y = exp(x)`.

    Requires that the program is run without autograd.
    """
    names: dict[fx.Node, str] = {}
    for node in list(graph.nodes):
        if node.target in (intermediate, torch.ops.aten.detach.default):
            _replace(node, node.args[0])
    for node in graph.find_nodes(op="call_function", target=attached):
        for user in list(node.users):
            source = node.args[0][user.args[1]]  # type: ignore[index]
            names |= {source: user.name} if source.op == "call_function" else {}
            _replace(user, source)
        graph.erase_node(node)
    rename(graph, names)


def _replace(node: fx.Node, source: Any) -> None:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
