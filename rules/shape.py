"""Views, permutations, joining, splitting, padding: all linear."""

from __future__ import annotations

import torch

from ..rule import jvp, linear, not_implemented

aten = torch.ops.aten

for _op in (
    aten.reshape.default,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.flatten.using_ints,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.chunk.default,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
    aten.tile.default,
    aten._pad_circular.default,
    aten.repeat_interleave.self_int,
    aten.repeat_interleave.self_Tensor,
    aten.diagonal.default,
    aten.diag_embed.default,
    aten.tril.default,
    aten.triu.default,
    aten.unfold.default,
    aten.constant_pad_nd.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    aten.im2col.default,
    aten.col2im.default,
    aten.permute_copy.default,
    aten.expand_copy.default,
    aten.slice_copy.Tensor,
    aten.select_copy.int,
    aten.unsqueeze_copy.default,
    aten.squeeze_copy.dim,
    aten.transpose_copy.int,
):
    linear(_op, wrt="self")
for _op in (aten.select_scatter.default, aten.slice_scatter.default, aten.diagonal_scatter.default):
    linear(_op, wrt=("self", "src"))
for _op in (aten.cat.default, aten.stack.default):
    linear(_op, wrt="tensors")

# A tangent need not have its primal's strides, so what is a view of the primal may be a copy here.
for _op in (aten.view.default, aten._unsafe_view.default, aten.view_copy.default):
    jvp(_op, self=lambda d, size: aten.reshape(d, size))
not_implemented(
    aten.as_strided.default, "it reads memory by strides, and a tangent may have others; use views"
)
