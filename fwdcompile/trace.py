"""Tracing: what a rule does to fake tensors becomes nodes of the graph being built."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from operator import getitem
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor, fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from .errors import RuleError
from .program import is_differentiable, op_name, value
from .sizes import SizeNodes, same_shape, symbolic_kernels


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Appends to `graph` every op that runs on fakes of its nodes.

    Ops in `keep` are recorded whole; other composite ops are recorded as what they consist of.
    """

    def __init__(self, graph: fx.Graph, fakes: FakeTensorMode, keep: Container[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph
        self.fakes = fakes
        self.keep = keep
        self.sizes = SizeNodes(graph)
        self._nodes: dict[int, fx.Node] = {}
        self._items: dict[tuple[fx.Node, int], fx.Node] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Records all that runs inside, below autograd so that composite ops stay visible."""
        with torch._C._AutoDispatchBelowAutograd(), self.fakes, self:
            yield

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func is torch.ops.aten.detach.default and not is_differentiable(args[0]):
            return args[0]
        if func not in self.keep and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        return self._record(func, args, kwargs)

    def _record(self, op: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Runs one op on fakes and appends its node; several outputs get `getitem` nodes."""
        if op._schema.is_mutable:
            raise RuleError(f"a rule may not change tensors in place, but it calls {op}")
        with symbolic_kernels((args, kwargs)):
            out = op(*args, **kwargs)
        given = tree_map_only((SymInt, SymFloat), self.sizes.node, (args, dict(kwargs)))
        node_args, node_kwargs = tree_map_only(Tensor, self.node, given)
        node = self.graph.call_function(op, node_args, node_kwargs)
        node.meta["val"] = out
        return self.fake(node)

    def node(self, fake: Tensor) -> fx.Node:
        """The node that a fake tensor stands for."""
        if id(fake) not in self._nodes:
            raise RuleError("a rule made a tensor from Python data; use numbers or new_full")
        return self._nodes[id(fake)]

    def fake(self, node: fx.Node) -> Any:
        """The fake tensor that stands for a node inside a rule; of several outputs, a tuple."""
        out = value(node)
        if isinstance(out, list | tuple):
            return tuple(self.fake(self.item(node, i)) for i in range(len(out)))
        if isinstance(out, Tensor) and self._nodes.get(id(out)) is not node:
            return self._register(node, out)
        return out

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """The node that takes one output out of a node of several."""
        if (node, index) not in self._items:
            item = self.graph.call_function(getitem, (node, index))
            item.meta["val"] = value(node)[index]
            self._items[node, index] = item
        return self._items[node, index]

    def _register(self, node: fx.Node, fake: Tensor) -> Tensor:
        if id(fake) in self._nodes:
            with _disable_current_modes(), self.fakes:
                fake = torch.empty_like(fake)
        self._nodes[id(fake)] = node
        node.meta["val"] = fake
        return fake


def behind(node: fx.Node) -> list[fx.Node]:
    """The nodes from the next one to the end of the graph."""
    found = []
    while (node := node.next).op != "root":
        found.append(node)
    return found


def label(node: fx.Node, before: fx.Node, of: fx.Node | None = None) -> None:
    """Gives what is between `before` and `node` the role of steps on the way to it, or to `of`."""
    meta = (of or node).meta
    added = before.next
    while added is not node:
        kept = {k: v for k, v in meta.items() if k not in ("val", "rank_one")}
        added.meta |= kept | {"role": "glue"}
        word = op_name(added)
        if added.target is getitem:
            word = f"{op_name(added.args[0])}_out{added.args[1]}"  # type: ignore[arg-type]
        added.name = node.graph._graph_namespace.create_name(word, None)
        added = added.next


def substitute(node: fx.Node, new: fx.Node) -> None:
    """Lets `new` take the place, the name and the role of `node`."""
    old, fresh = value(node), value(new)
    if old.dtype != fresh.dtype or not same_shape(old, fresh):
        raise AssertionError(f"{node.target}: {fresh.shape} {fresh.dtype}, not {old.shape}")
    name, role = node.name, node.meta.get("role")
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    if new.meta.get("role") == "glue":
        new.name, new.meta["role"] = name, role


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode that the fake values of a graph belong to, or a new one for an empty graph."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    return FakeTensorMode()


def unflatten_call(
    op: OpOverload, arguments: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name as the shortest positional and keyword arguments of `op`."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    short = True
    for argument in reversed(op._schema.arguments):
        given = arguments[argument.name]
        is_default = argument.has_default_value() and _same(given, argument.default_value)
        if argument.kwarg_only:
            if not is_default:
                kwargs[argument.name] = given
        elif not (short and is_default):
            short = False
            args.append(given)
    return tuple(reversed(args)), dict(reversed(kwargs.items()))


def bind_call(op: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in."""
    schema = op._schema.arguments
    bound = {a.name: a.default_value for a in schema}
    bound.update(zip((a.name for a in schema), args, strict=False))
    return bound | dict(kwargs)


def caller(op: OpOverload, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """The `call` of rules and rewrites: the op itself, with some of its arguments replaced."""

    def call(**changed: Any) -> Any:
        args, kwargs = unflatten_call(op, {**arguments, **changed})
        return op(*args, **kwargs)

    return call


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and not isinstance(a, Tensor | fx.Node) and bool(a == b)
