"""Lookup, gather and scatter by integer indices or boolean masks."""

from __future__ import annotations

import torch

from ..rule import jvp, linear

aten = torch.ops.aten

linear(aten.embedding.default, wrt="weight")
for _op in (
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.take.default,
    aten.take_along_dim.default,
    aten.masked_select.default,
):
    linear(_op, wrt="self")
for _op in (aten.scatter.src, aten.scatter_add.default):
    linear(_op, wrt=("self", "src"))
for _op in (aten.index_put.default, aten._unsafe_index_put.default):
    linear(_op, wrt=("self", "values"))
linear(aten.index_copy.default, wrt=("self", "source"))
linear(aten.index_add.default, wrt=("self", "source"))
linear(aten.masked_scatter.default, wrt=("self", "source"))
linear(aten.index_fill.int_Tensor, wrt=("self", "value"))
linear(aten.masked_fill.Tensor, wrt=("self", "value"))
jvp(aten.masked_fill.Scalar, self=lambda d, mask: torch.masked_fill(d, mask, 0))
jvp(aten.scatter.value, self=lambda d, dim, index: torch.scatter(d, dim, index, 0))
jvp(aten.index_fill.int_Scalar, self=lambda d, dim, index: torch.index_fill(d, dim, index, 0))
