"""Views, permutations, joining, splitting, padding: ops that move elements and compute nothing."""

from __future__ import annotations

import torch

from ..rule import jvp, linear, not_implemented

aten = torch.ops.aten

for _op in (
    aten.reshape.default,
    aten.expand.default,
    aten.expand_copy.default,
    aten.permute.default,
    aten.permute_copy.default,
    aten.transpose.int,
    aten.transpose_copy.int,
    aten.t.default,
    aten.t_copy.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze_copy.default,
    aten.squeeze_copy.dim,
    aten.squeeze_copy.dims,
    aten.unsqueeze.default,
    aten.unsqueeze_copy.default,
    aten.slice.Tensor,
    aten.slice_copy.Tensor,
    aten.narrow_copy.default,
    aten.select.int,
    aten.select_copy.int,
    aten.split.Tensor,
    aten.split_copy.Tensor,
    aten.unsafe_split.Tensor,
    aten.split_with_sizes.default,
    aten.split_with_sizes_copy.default,
    aten.unsafe_split_with_sizes.default,
    aten.unbind.int,
    aten.unbind_copy.int,
    aten.diagonal.default,
    aten.diagonal_copy.default,
    aten.unfold.default,
    aten.unfold_copy.default,
    aten.flip.default,
    aten.roll.default,
    aten.rot90.default,
    aten.repeat.default,
    aten.tile.default,
    aten.repeat_interleave.self_int,
    aten.diag_embed.default,
    aten.tril.default,
    aten.triu.default,
    aten._pad_circular.default,
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
):
    linear(_op, wrt="self")

for _op in (
    aten.cat.default,
    aten.stack.default,
    aten.hstack.default,
    aten.vstack.default,
    aten.dstack.default,
    aten.column_stack.default,
    aten.block_diag.default,
):
    linear(_op, wrt="tensors")

for _op in (aten.select_scatter.default, aten.slice_scatter.default, aten.diagonal_scatter.default):
    linear(_op, wrt=("self", "src"))

# A tangent need not have its primal's strides, so a view of it is asked for as a reshape.
for _op in (aten.view.default, aten.view_copy.default, aten._unsafe_view.default):
    jvp(_op, self=lambda d, size: d.reshape(size))

jvp(aten.constant_pad_nd.default, self=lambda d, call: call(self=d, value=0))

for _op in (aten._to_sparse.default, aten._to_sparse.sparse_dim):
    not_implemented(_op, "sparse layouts have no forward mode here; keep the tensor dense")
for _op in (aten.view.dtype, aten.view_copy.dtype):
    not_implemented(_op, "it reinterprets bits, which has no derivative; convert with .to(dtype)")
