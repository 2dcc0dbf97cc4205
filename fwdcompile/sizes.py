"""Sizes that a program leaves open: symbols in its shapes, and which calls the program serves.

A captured program may hold symbolic sizes: the batch, with `dynamic=True`, and sizes that depend on
values (`x[mask]`). Whatever was decided by a symbol's size while the program was made is a guard,
and a call is served only where all guards hold.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import sympy
import torch
from torch import SymFloat, SymInt, Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.export import Dim, ShapesCollection
from torch.fx.experimental.symbolic_shapes import (
    ShapeEnv,
    free_unbacked_symbols,
    statically_known_true,
)
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .program import Program, Slot, value

Sym = SymInt | SymFloat
aten = torch.ops.aten


def open_first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What torch.export is told to leave open: the first dimension of every input, from size 2.

    Sizes 0 and 1 stay fixed, as everywhere in torch: they broadcast, or are contiguous, by rules
    of their own.
    """
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] > 1:
            shapes[leaf] = {0: Dim.AUTO}
    return shapes


def thaw(graph: fx.Graph) -> None:
    """Lets what comes after export record further guards, which export's end forbids."""
    if (env := _environment(graph)) is not None:
        env.frozen = False


def serves(program: Program, values: Mapping[str, Any]) -> bool:
    """Whether a program may be called with tensors of these shapes, strides, dtypes and devices.

    Args:
        program: a captured or transformed program.
        values: primals by the name of the program's slots; tangents are like their primals.
    """
    sizes: dict[sympy.Symbol, int] = {}
    primals = ((node, slot) for node, slot in program.placeholders() if slot.kind != "tangent")
    pairs = [(value(node), values[slot.name]) for node, slot in primals if slot.name in values]
    for fake, given in pairs:
        kinds = [(x.dtype, x.device, x.ndim) for x in (fake, given)]
        if kinds[0] != kinds[1] or not _bound(fake.shape, given.shape, sizes):
            return False
    if not all(_bound(fake.stride(), given.stride(), sizes) for fake, given in pairs):
        return False
    env = _environment(program.graph)
    if env is None or not sizes:
        return True
    return all(size in env.var_to_range[symbol] for symbol, size in sizes.items()) and all(
        env.replace(guard.expr).xreplace(sizes) == sympy.true
        for guard in env.guards
        if not _of_layout(guard)
    )


def _of_layout(guard: Any) -> bool:
    """Whether torch asked for a size to choose a convolution's kernel, and by it strides alone."""
    frame = guard.sloc.framework_loc
    return frame is not None and frame.name == "conv" and frame.filename.endswith("fake_impls.py")


def _bound(fake: Sequence[Any], given: Sequence[int], sizes: dict[sympy.Symbol, int]) -> bool:
    """Fits symbolic sizes to given ones; a symbol met for the first time takes its size."""
    for mine, theirs in zip(fake, given, strict=True):
        expression = mine.node.expr if isinstance(mine, SymInt) else mine
        if isinstance(expression, sympy.Symbol):
            sizes.setdefault(expression, theirs)
        found = expression.xreplace(sizes) if isinstance(expression, sympy.Expr) else expression
        if found != theirs:
            return False
    return True


def mark_open(program: Program, given: Iterable[tuple[Slot, Any]]) -> None:
    """Tells torch.compile which dimensions of tensors the program leaves open.

    Args:
        program: with open sizes.
        given: its slots, those of inputs and tangents among them, with their tensors.
    """
    nodes = {slot: node for node, slot in program.placeholders()}
    for slot, x in given:
        shape = value(nodes[slot]).shape if slot.kind in ("input", "tangent") else ()
        for dim, size in enumerate(shape):
            if isinstance(size, SymInt):
                torch._dynamo.mark_dynamic(x, dim)


def symbolic_kernels(arguments: Any) -> AbstractContextManager[None]:
    """Lets ops find their kernels written in Python where a size is open; C++ ones would fix it."""
    tensors = (x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor))
    if any(x._has_symbolic_sizes_strides for x in tensors):
        return enable_python_dispatcher()
    return nullcontext()


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two fakes have one shape, whatever the size of the symbols in it."""
    return _equal(a.shape, b.shape)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two fakes have one shape and one set of strides, whatever the size of symbols."""
    return _equal(a.shape, b.shape) and _equal(a.stride(), b.stride())


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in pairs)


def wider(x: Tensor, size: int) -> Tensor:
    """An uninitialised tensor of `size` entries in a row, each laid out as `x`."""
    like = torch.empty_like(x)
    return like.new_empty_strided((size, *x.shape), (like.numel(), *like.stride()))


def unify(a: Tensor, b: Tensor) -> None:
    """Equates the sizes that depend on values, for a tangent has the shape of its primal."""
    for x, y in zip(a.shape, b.shape, strict=False):
        if free_unbacked_symbols(x) and free_unbacked_symbols(y):
            torch._check(x == y)  # type: ignore[no-untyped-call]


class _Arithmetic(PythonReferenceAnalysis):
    """How sympy's functions are computed by Python on numbers, and so by nodes."""

    int_truediv = staticmethod(operator.truediv)


class SizeNodes:
    """Nodes for the symbolic numbers that a rule hands to an op."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._known: dict[sympy.Expr, fx.Node] = {}

    def learn(self, node: fx.Node) -> None:
        """Remembers a node whose value is a symbolic number."""
        if isinstance(value(node), Sym):
            self._known.setdefault(value(node).node.expr, node)

    def node(self, number: Sym) -> Any:
        """The node that computes a symbolic number, or the number itself where it is fixed."""
        expression = number.node.expr
        if expression.is_number:
            return int(expression) if expression.is_Integer else float(expression)
        if expression.is_Symbol:
            return self._symbol(expression)
        if expression not in self._known:
            self._known[expression] = self._compute(expression)
        return self._known[expression]

    def _symbol(self, symbol: sympy.Symbol) -> fx.Node:
        """Reads a size off the first tensor that has it."""
        if symbol not in self._known:
            for node in self.graph.nodes:
                for dim, size in enumerate(getattr(value(node), "shape", ())):
                    if isinstance(size, SymInt) and size.node.expr == symbol:
                        read = self.graph.call_function(aten.sym_size.int, (node, dim))
                        read.meta["val"] = size
                        self._known[symbol] = read
                        return read
            raise AssertionError(f"no tensor of the graph has the size {symbol}")
        return self._known[symbol]

    def _compute(self, expression: sympy.Expr) -> fx.Node:
        env = {s: fx.Proxy(self._symbol(s)) for s in expression.free_symbols}
        result: fx.Node = sympy_interp(_Arithmetic, env, expression).node
        _evaluate(result)
        return result


def _evaluate(node: fx.Node) -> Any:
    """The value of a node of arithmetic, recorded on it and on what it is made of."""
    if "val" not in node.meta:
        args = fx.map_arg(node.args, _evaluate)
        node.meta["val"] = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return value(node)


def _environment(graph: fx.Graph) -> ShapeEnv | None:
    """Where torch keeps the symbols of a graph's shapes and the guards on them."""
    for node in graph.nodes:
        mode = getattr(value(node), "fake_mode", None)
        if mode is not None:
            env: ShapeEnv | None = mode.shape_env
            return env
    return None
