"""Statements: the ops of a graph as lines of Python, with glue inside the line that uses it."""

from __future__ import annotations

import cmath
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from .program import Program, is_random, output_nodes, value
from .sizes import Sym
from .subgraph import CONVENTIONS
from .trace import bind_call, unflatten_call

aten = torch.ops.aten
WIDTH = 96
_ATOM = 9

# How an op is written between its operands: the symbol, and how tightly it binds.
_INFIX: dict[Any, tuple[str, int]] = {
    aten.add.Tensor: ("+", 4),
    aten.sub.Tensor: ("-", 4),
    aten.mul.Tensor: ("*", 5),
    aten.div.Tensor: ("/", 5),
    aten.mm.default: ("@", 5),
    aten.matmul.default: ("@", 5),
    aten.pow.Tensor_Scalar: ("**", 7),
    aten.gt.Scalar: (">", 1),
    aten.gt.Tensor: (">", 1),
    aten.ge.Scalar: (">=", 1),
    aten.ge.Tensor: (">=", 1),
    aten.lt.Scalar: ("<", 1),
    aten.lt.Tensor: ("<", 1),
    aten.le.Scalar: ("<=", 1),
    aten.le.Tensor: ("<=", 1),
    aten.eq.Scalar: ("==", 1),
    aten.eq.Tensor: ("==", 1),
    aten.ne.Scalar: ("!=", 1),
    aten.ne.Tensor: ("!=", 1),
}
_ARITHMETIC: dict[Any, tuple[str, int]] = {
    operator.add: ("+", 4),
    operator.sub: ("-", 4),
    operator.mul: ("*", 5),
    operator.floordiv: ("//", 5),
    operator.truediv: ("/", 5),
    operator.mod: ("%", 5),
    operator.pow: ("**", 7),
}
_WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.complex64: "c64", torch.complex128: "c128", torch.bool: "b8", torch.uint8: "u8",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def shape_text(x: Any) -> str:
    """A short type such as `f32[64, 10]`."""
    if isinstance(x, Tensor):
        dtype = _DTYPES.get(x.dtype, str(x.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(map(str, x.shape))}]" if x.ndim else dtype
    if isinstance(x, list | tuple):
        return ", ".join(shape_text(item) for item in x)
    return "int" if isinstance(x, SymInt) else type(x).__name__


@dataclass
class _Expression:
    text: str
    binding: int
    names: frozenset[str]


@dataclass
class Statement:
    """One line of the program.

    Attributes:
        node: what it computes.
        text: the line.
        defines: the names it gives values to.
        uses: the names it reads.
        dead: names of values that nothing reads any more behind it.
    """

    node: fx.Node
    text: str
    defines: tuple[str, ...]
    uses: frozenset[str]
    dead: list[str] = field(default_factory=list)


class Writer:
    """Turns nodes into statements, with single-use glue written inside the line that uses it."""

    def __init__(self, graph: fx.Graph, names: Mapping[fx.Graph, str]) -> None:
        self.graph = graph
        self.functions = names
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.pending: dict[fx.Node, _Expression] = {}
        self.written: list[Statement] = []
        self.sizes = {
            str(value(node)): node.name for node in graph.nodes if node.target is aten.sym_size.int
        }

    def declared(self, node: fx.Node) -> str:
        """A name and its type, in which a size that is left open goes by its own name."""
        text = shape_text(value(node))
        if self.sizes:
            text = re.sub(r"\b[su]\d+\b", lambda found: self.sizes.get(found[0], found[0]), text)
        return f"{node.name}: {text}"

    def statements(self) -> list[Statement]:
        """The lines of the program, in order."""
        for node in self.graph.nodes:
            if node.op != "call_function" or node.target is getitem:
                continue
            if isinstance(value(node), list | tuple):
                self._write_unpacking(node)
            elif self._is_inline(node):
                self.pending[node] = self._expression(node, WIDTH // 3)
            else:
                self._write(node)
        self._bury()
        return self.written

    def _write(self, node: fx.Node) -> None:
        start = f"{self.declared(node)} = "
        self._append(node, start, self._expression(node, len(start)), (node.name,))

    def _write_unpacking(self, node: fx.Node) -> None:
        items = {user.args[1]: user for user in node.users}
        names = [items[i].name if i in items else "_" for i in range(len(value(node)))]
        expression = self._expression(node)
        if len(items) == 1:
            (index, item), *_ = items.items()
            expression.text += f"[{index}]"
            start = f"{self.declared(item)} = "
        else:
            start = ", ".join(names)
            start = f"({start}) = " if len(start) > WIDTH // 2 else f"{start} = "
        self._append(node, start, expression, tuple(n for n in names if n != "_"))

    def _append(
        self, node: fx.Node, start: str, expression: _Expression, defines: tuple[str, ...]
    ) -> None:
        self.written.append(Statement(node, start + expression.text, defines, expression.names))

    def _is_inline(self, node: fx.Node) -> bool:
        held = self._may_be_inline(node)
        return held and not (self._frees_memory(node) and self._waits(node))

    def _may_be_inline(self, node: fx.Node) -> bool:
        if isinstance(value(node), Sym):
            return node.target is not aten.sym_size.int and len(node.users) == 1
        if node.meta.get("role") != "glue" or is_random(node) or len(node.users) != 1:
            return False
        (user,) = node.users
        once = sum(arg is node for arg in pytree.tree_leaves((user.args, user.kwargs))) == 1
        return once and user.op != "output" and user.meta.get("of") == node.meta.get("of")

    def _frees_memory(self, node: fx.Node) -> bool:
        """Whether more than twice the memory of a result is needed no more once it is there."""
        pending, dying = [node], 0
        while pending:
            for arg in pending.pop().all_input_nodes:
                if arg in self.pending:
                    pending.append(arg)
                elif arg.op != "placeholder" and all(
                    self.place[user] <= self.place[node] for user in arg.users
                ):
                    dying += _bytes(arg)
        return dying > 2 * _bytes(node)

    def _waits(self, node: fx.Node) -> bool:
        """Whether other lines stand between a node and the line that uses it."""
        between = node.next
        while between not in node.users:
            if between.op == "call_function" and not self._may_be_inline(between):
                return True
            between = between.next
        return False

    def _expression(self, node: fx.Node, before: int = 0) -> _Expression:
        """The text of a node; what would make its line too long becomes a line of its own."""
        expression = self._render(node)
        while before + len(expression.text) > WIDTH:
            inner = [arg for arg in node.all_input_nodes if arg in self.pending]
            if not inner:
                break
            longest = max(inner, key=lambda arg: len(self.pending[arg].text))
            kept = self.pending.pop(longest)
            start = f"{self.declared(longest)} = "
            self._append(longest, start, kept, (longest.name,))
            expression = self._render(node)
        return expression

    def _render(self, node: fx.Node) -> _Expression:
        names: set[str] = set()

        def operand(arg: Any, binding: int = 0) -> str:
            if isinstance(arg, fx.Node):
                inner = self.pending.get(arg, _Expression(arg.name, _ATOM, frozenset({arg.name})))
                names.update(inner.names)
                return inner.text if inner.binding >= binding else f"({inner.text})"
            if isinstance(arg, list | tuple):
                items = ", ".join(operand(item) for item in arg)
                return f"[{items}]"
            if isinstance(arg, Program):
                return self.functions[arg.graph]
            return _literal(arg)

        text, binding = _call_text(node, operand)
        return _Expression(text, binding, frozenset(names))

    def _bury(self) -> None:
        """Lists behind each statement the values that die there."""
        alive = {node.name for node in output_nodes(self.graph)}
        kept = (n for n in self.graph.nodes if n.op == "placeholder" or isinstance(value(n), Sym))
        alive |= {node.name for node in kept}
        for statement in reversed(self.written):
            last = [n for n in (*statement.defines, *sorted(statement.uses)) if n not in alive]
            statement.dead = list(dict.fromkeys(last))
            alive |= statement.uses | set(statement.defines)


def _bytes(node: fx.Node) -> int:
    """The size of a tensor; of one whose size is open, at the sizes that it was captured with."""
    x = value(node)
    if not isinstance(x, Tensor):
        return 0
    count = x.numel()
    return x.element_size() * (count if isinstance(count, int) else int(count.node.hint or 0))


def _call_text(node: fx.Node, operand: Any) -> tuple[str, int]:
    op = node.target
    if op in CONVENTIONS:
        return f"{CONVENTIONS[op].function.__name__}({', '.join(map(operand, node.args))})", _ATOM
    if op in _ARITHMETIC:
        symbol, binding = _ARITHMETIC[op]
        left, right = node.args
        return f"{operand(left, binding)} {symbol} {operand(right, binding + 1)}", binding
    if op is aten.sym_size.int:
        return f"{operand(node.args[0], _ATOM)}.shape[{node.args[1]}]", _ATOM
    if not isinstance(op, OpOverload):  # torch.sym_max and its like
        return f"torch.{op.__name__}({', '.join(map(operand, node.args))})", _ATOM  # type: ignore
    bound = bind_call(op, node.args, node.kwargs)
    args, kwargs = unflatten_call(op, bound)
    if op in _INFIX and len(args) == 2 and not kwargs and isinstance(args[0], fx.Node):
        symbol, binding = _INFIX[op]
        left = operand(args[0], binding + (symbol in ("**", ">", "<", ">=", "<=", "==", "!=")))
        return f"{left} {symbol} {operand(args[1], binding + 1)}", binding
    if op is aten.rsub.Scalar and len(args) == 2:
        return f"{operand(args[1])} - {operand(args[0], 5)}", 4
    if op is aten.neg.default:
        return f"-{operand(args[0], 6)}", 6
    name = "torch.where" if op in _WHERE else str(op).removesuffix(".default")
    prefix = "" if name.startswith(("aten.", "torch.")) else "torch.ops."
    keywords = [f"{k}={operand(v)}" for k, v in kwargs.items() if not _is_usual(k, v)]
    return f"{prefix}{name}({', '.join([operand(a) for a in args] + keywords)})", _ATOM


def _is_usual(keyword: str, setting: Any) -> bool:
    return (keyword == "pin_memory" and not setting) or (
        keyword == "layout" and setting is torch.strided
    )


def _literal(x: Any) -> str:
    if isinstance(x, float) and not math.isfinite(x):
        return f'float("{x}")'
    if isinstance(x, complex) and not cmath.isfinite(x):
        return f"complex({_literal(x.real)}, {_literal(x.imag)})"
    if isinstance(x, torch.device):
        return f'torch.device("{x}")'
    return quoted(x)


def quoted(x: Any) -> str:
    """Python's own notation with the double quotes that code formatters prefer."""
    text = repr(x)
    return text if '"' in text else text.replace("'", '"')
