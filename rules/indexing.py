"""Lookup, gather and scatter by integer indices or boolean masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
    aten.repeat_interleave.self_Tensor,
):
    linear(_op, wrt="self")


# Where one place is written twice, torch leaves open which write wins.
for _op in (aten.scatter.src, aten.scatter_add.default):
    linear(_op, wrt=("self", "src"))
for _op in (
    aten.index_put.default,
    aten._unsafe_index_put.default,
    aten._unsafe_masked_index_put_accumulate.default,
):
    linear(_op, wrt=("self", "values"))
for _op in (
    aten.index_add.default,
    aten.index_copy.default,
    aten.masked_scatter.default,
    aten.put.default,
):
    linear(_op, wrt=("self", "source"))

linear(aten.index_fill.int_Tensor, wrt=("self", "value"))
jvp(aten.index_fill.int_Scalar, self=lambda d, call: call(self=d, value=0))
jvp(aten.scatter.value, self=lambda d, call: call(self=d, value=0))
jvp(aten._unsafe_masked_index.default, self=lambda d, call: call(self=d, fill=0))
jvp(aten.masked_fill.Scalar, self=lambda d, call: call(self=d, value=0))
jvp(
    aten.masked_fill.Tensor,
    self=lambda d, mask: d.masked_fill(mask, 0),
    value=lambda d, mask: torch.where(mask, d, 0),
)


def _bag(
    d: Tensor, mode: int, out: tuple[Tensor, Tensor, Tensor, Tensor], call: Callable[..., Any]
) -> Any:
    """A bag's maximum (mode 2) takes the tangent at its index; an empty bag has none."""
    if mode != 2:
        return call(weight=d)[0], None, None, None
    _, _, size, rows = out
    empty = (size[: rows.shape[0]] == 0).unsqueeze(-1)  # a last offset may be no bag's
    return d.gather(0, rows).masked_fill(empty, 0), None, None, None


for _op in (aten._embedding_bag.default, aten._embedding_bag_forward_only.default):
    jvp(
        _op,
        weight=_bag,
        per_sample_weights=lambda d, call: (
            call(per_sample_weights=d)[0],
            None,
            None,
            None,
        ),
    )
