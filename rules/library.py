"""Ops of other libraries, which have their rows once a program calls them."""

from __future__ import annotations

from torch import fx
from torch._ops import OpOverload

from ..rule import Rule, maker, multilinear, table

# Products of experts: Hugging Face's in place of torch's grouped one.
PRODUCTS = {"transformers::grouped_mm_fallback": ("input", "weight")}


@maker
def product(node: fx.Node) -> Rule | None:
    """The row of a library's product."""
    op = node.target
    if not isinstance(op, OpOverload) or (wrt := PRODUCTS.get(op.name())) is None:  # type: ignore[no-untyped-call]
        return None
    multilinear(op, wrt=wrt)
    return table[op]
