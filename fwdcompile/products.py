"""Products: matrix products as einsum, where an axis of directions is one more index.

As einsum, the directions of one operand become further rows of a single product, and a sum over
directions of two operands becomes a part of what is contracted. As a matrix product of tensors that
broadcast, the other operand would be copied for each direction, and many small products be made.
"""

from __future__ import annotations

import string
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from .program import value

aten = torch.ops.aten

_EQUATIONS: dict[Any, str] = {
    aten.mm.default: "ij,jk->ik",
    aten.bmm.default: "bij,bjk->bik",
    aten.matmul.default: "...ij,...jk->...ik",
    aten.linear.default: "...i,oi->...o",
}


def as_einsum(
    node: fx.Node, axis: Collection[fx.Node], summed: bool
) -> tuple[str, list[fx.Node]] | None:
    """The equation of a product some of whose operands have an axis of directions in front.

    Args:
        node: of the program without that axis.
        axis: the nodes that get it.
        summed: whether the result is summed over directions; else it has the axis, too.

    Returns:
        Equation and operands, or None for what is no such product.
    """
    found = _product(node)
    if found is None:
        return None
    equation, operands = found
    terms, out = equation.replace(" ", "").split("->")
    label = next(letter for letter in "z" + string.ascii_letters if letter not in equation)
    pairs = zip(terms.split(","), operands, strict=True)
    terms = ",".join(label * (x in axis) + term for term, x in pairs)
    return f"{terms}->{label * (not summed)}{out}", operands


def _product(node: fx.Node) -> tuple[str, list[fx.Node]] | None:
    if node.target is aten.einsum.default:
        equation, operands = node.args[:2]
        return (equation, list(operands)) if "->" in equation else None  # type: ignore
    operands = list(node.args)
    if node.target not in _EQUATIONS or len(operands) != 2:
        return None
    matrices = operands[1:] if node.target is aten.linear.default else operands
    if any(value(x).ndim < 2 for x in matrices):  # type: ignore[arg-type]
        return None
    return _EQUATIONS[node.target], operands  # type: ignore
