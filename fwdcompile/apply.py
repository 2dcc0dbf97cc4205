"""One row of the rule table applied at one op: from tangents of operands to those of the op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from . import rule
from .rule import Rule
from .trace import Recorder, bind_call, caller


@dataclass(frozen=True)
class Site:
    """One op of the primal program at which a rule is applied, with fakes for its values."""

    node: fx.Node
    row: Rule
    arguments: dict[str, Any]
    out: Any


def site_of(node: fx.Node, copy: fx.Node, row: Rule, recorder: Recorder) -> Site:
    """The call that `copy` is of `node` in the graph being built, with fakes for its values."""
    arguments = fx.map_arg(bind_call(row.op, copy.args, copy.kwargs), recorder.fake)
    return Site(node, row, arguments, recorder.fake(copy))  # type: ignore[arg-type]


def apply(site: Site, dots: dict[str, Any]) -> Any:
    """Runs a row on fakes; `dots` holds the present tangents by argument name."""
    row = site.row
    call = caller(row.op, site.arguments)
    named = site.arguments | {"out": site.out, "call": call}

    def pick(term: rule.Term, skip: int) -> dict[str, Any]:
        return {name: named[name] for name in rule.parameters(term)[skip:]}

    match row.word:
        case "zero":
            return None
        case "linear":
            return call(**{name: _filled(dots.get(name), named[name]) for name in row.wrt})
        case "joint":
            return row.terms[""](dots, **pick(row.terms[""], 1))
        case "multilinear":
            terms = [call(**{name: _filled(d, named[name])}) for name, d in dots.items()]
        case "pointwise":
            terms = [d * row.terms[name](**pick(row.terms[name], 0)) for name, d in dots.items()]
        case _:
            terms = [row.terms[name](d, **pick(row.terms[name], 1)) for name, d in dots.items()]
    return _sum(terms)


def through(node: fx.Node, d: Tensor, recorder: Recorder) -> Any:
    """The tangent of a node from that of its first operand, by its row, inside a recorder."""
    row = rule.table[node.target]  # type: ignore[index]
    return apply(site_of(node, node, row, recorder), {row.op._schema.arguments[0].name: d})


def _filled(d: Any, primal: Any) -> Any:
    """A tangent with zeros for what is absent, because a jointly linear op needs every operand."""
    if isinstance(primal, list | tuple):
        dots = d or [None] * len(primal)
        return [_filled(one, x) for one, x in zip(dots, primal, strict=True)]
    return torch.zeros_like(primal) if d is None and isinstance(primal, Tensor) else d


def _sum(terms: Sequence[Any]) -> Any:
    present = [term for term in terms if term is not None]
    if not present:
        return None
    total = present[0]
    for term in present[1:]:
        total = (
            tuple(_sum(pair) for pair in zip(total, term, strict=True))
            if isinstance(term, tuple)
            else total + term
        )
    return total
