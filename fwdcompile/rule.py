"""The words a rule is written in, and the table they fill.

A rule says how the tangents of an op's arguments reach its output. It is a sum of terms, each
linear in the tangent of one argument; the engine (`transform.py`) calls the terms whose argument
has a tangent and adds what they return. Zeros, broadcasting and dtypes are the engine's business.

    linear(aten.view.default, wrt="self")                           # out_dot = view(self_dot, ...)
    multilinear(aten.mm.default, wrt=("self", "mat2"))              # product rule
    pointwise(aten.tanh.default, lambda out: 1 - out * out)         # slope; the engine multiplies
    zero(aten.floor.default)                                        # derivative is zero, or none
    jvp(aten.div.Tensor, self=lambda d, other: d / other,
                         other=lambda d, other, out: -d * out / other)
    @joint(aten.linear.default, wrt=("input", "weight", "bias"))    # all tangents at once

A term takes its tangent `d` first (a slope takes none), then by name only the arguments of the op
that it uses, and `out`, the primal output, when that saves work. `call(name=x, ...)` is the op
itself with some arguments replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

from torch import fx
from torch._ops import OpOverload

from .errors import RuleError

Term = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        op: the ATen (or user's) overload the row is for.
        word: which of the words made it.
        wrt: the arguments it can carry a tangent for.
        terms: functions by argument name (`pointwise`, `jvp`), or one under `""` (`joint`).
        where: `file:line` of the row, for error messages and the printed table.
        reason: for `not_implemented`, why.
    """

    op: OpOverload
    word: str
    wrt: tuple[str, ...]
    terms: Mapping[str, Term] = field(default_factory=dict)
    where: str = ""
    reason: str = ""


table: dict[OpOverload, Rule] = {}

# Ops with a row that capture takes apart all the same, where the function has an answer for the
# call; it returns NotImplemented to leave the op whole.
lowerings: dict[OpOverload, Callable[..., Any]] = {}

# Ops whose output shapes torch cannot tell before it runs them, with a function that tells them
# for capture: it takes the op's arguments and returns empty tensors.
shapes: dict[OpOverload, Callable[..., Any]] = {}

# Ops whose further outputs autograd takes for constants, with a function of the op's arguments that
# makes them by ops that autograd differentiates: a tuple, None for an output that it knows.
remade: dict[OpOverload, Callable[..., tuple[Any, ...]]] = {}

Maker = Callable[[fx.Node], Rule | None]
_makers: list[Maker] = []


def maker(function: Maker) -> Maker:
    """Decorates a function that makes rows for ops without one, or gives None.

    It takes a call of such an op in a program.
    """
    _makers.append(function)
    return function


def row_for(node: fx.Node) -> Rule | None:
    """The row of the op that a node calls: of the table, or made for it."""
    row = table.get(node.target)  # type: ignore[call-overload]
    return row or next(filter(None, (make(node) for make in _makers)), None)


def linear(op: OpOverload, wrt: str | tuple[str, ...]) -> None:
    """Declares `op` jointly linear in the arguments `wrt`: out_dot is op of their tangents.

    Args:
        op: an operator overload, such as `torch.ops.aten.view.default`.
        wrt: name, or names, of the arguments that are replaced together; a list of tensors is one.

    Raises:
        RuleError: unknown argument name, or a second row for the same op.

    Example:
        >>> linear(torch.ops.aten.view.default, wrt="self")
    """
    _register(op, "linear", (wrt,) if isinstance(wrt, str) else wrt)


def multilinear(op: OpOverload, wrt: tuple[str, ...]) -> None:
    """Declares `op` linear in each argument of `wrt` apart: the product rule.

    Example:
        >>> multilinear(torch.ops.aten.mm.default, wrt=("self", "mat2"))
    """
    _register(op, "multilinear", wrt)


def pointwise(op: OpOverload, *slope: Term, **slopes: Term) -> None:
    """Declares the slope of an elementwise `op`; the engine multiplies it by the tangent.

    Args:
        op: an elementwise overload.
        slope: slope with respect to the first argument.
        slopes: slopes by argument name, for ops of several tensors.

    Example:
        >>> pointwise(torch.ops.aten.tanh.default, lambda out: 1 - out * out)
    """
    terms = dict(zip([op._schema.arguments[0].name], slope, strict=False)) | slopes
    _register(op, "pointwise", tuple(terms), terms)


def zero(*ops: OpOverload) -> None:
    """Declares that no tangent leaves these ops: the derivative is zero, or there is none.

    Example:
        >>> zero(torch.ops.aten.floor.default, torch.ops.aten.sign.default)
    """
    for op in ops:
        _register(op, "zero", tuple(argument.name for argument in op._schema.arguments))


def jvp(op: OpOverload, **terms: Term) -> None:
    """Gives one term for each differentiable argument of `op`.

    Args:
        op: an operator overload.
        terms: by argument name, `f(d, <arguments by name>, out, call)`. For an argument that is
            a list of tensors, `d` is a list with None where an element has no tangent. For an op
            of several outputs the term returns a tuple, None where an output has no tangent.

    Example:
        >>> jvp(torch.ops.aten.mul.Tensor, self=lambda d, other: d * other,
        ...                                other=lambda d, self: d * self)
    """
    _register(op, "jvp", tuple(terms), terms)


def joint(*ops: OpOverload, wrt: tuple[str, ...]) -> Callable[[Term], Term]:
    """Decorates a function that takes all tangents of an op at once: the escape hatch.

    The function's first argument is a dict of the present tangents by argument name.

    Example:
        >>> @joint(torch.ops.aten.linear.default, wrt=("input", "weight", "bias"))
        ... def linear(d, input, weight): ...
    """

    def register(function: Term) -> Term:
        for op in ops:
            _register(op, "joint", wrt, {"": function})
        return function

    return register


def not_implemented(op: OpOverload, reason: str) -> None:
    """Refuses tangents through `op`, telling the user why and what to do instead.

    Example:
        >>> not_implemented(torch.ops.aten.bernoulli.Tensor, "its output is discrete")
    """
    _register(op, "not_implemented", (), reason=reason)


def parameters(term: Term) -> tuple[str, ...]:
    """The parameters of a term that the engine fills: those without a default, in order."""
    signature = inspect.signature(term).parameters.values()
    return tuple(p.name for p in signature if p.default is inspect.Parameter.empty)


def _register(
    op: OpOverload,
    word: str,
    wrt: tuple[str, ...],
    terms: Mapping[str, Term] | None = None,
    reason: str = "",
) -> None:
    terms = terms or {}
    where = _caller()
    if not isinstance(op, OpOverload):
        raise RuleError(f"{where}: {op!r} is not an operator overload (torch.ops.aten.mm.default)")
    if op in table:
        raise RuleError(f"{where}: {op} has a row already, at {table[op].where}")
    known = {argument.name for argument in op._schema.arguments}
    if not wrt and word != "not_implemented":
        raise RuleError(f"{where}: {word}({op}) names no argument")
    if unknown := [name for name in wrt if name not in known]:
        raise RuleError(f"{where}: {op} has no argument {unknown[0]!r}; it has {sorted(known)}")
    for name, term in terms.items():
        asked = parameters(term)[0 if word == "pointwise" else 1 :]
        if extra := [asks for asks in asked if asks not in known | {"out", "call"}]:
            raise RuleError(f"{where}: {op}, term {name!r}: {extra[0]!r} is no argument of the op")
    table[op] = Rule(op, word, wrt, terms, where, reason)


def _caller() -> str:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return "?" if frame is None else place_in(frame.f_code, frame.f_lineno)


def place_in(code: CodeType, line: int) -> str:
    """`file:line`, as rows name where they are."""
    path = Path(code.co_filename)
    return f"{path.parent.name}/{path.name}:{line}"
