"""More ops of random programs: those that move, look up, write in place, multiply or normalise."""

from __future__ import annotations

from program_ops import (
    BINARY,
    KINKED,
    REDUCTIONS,
    SMOOTH,
    Op,
    same_last,
    same_rows,
    same_shape,
    weight_of,
)

VIEWS = [
    *map(Op, """
{x}.reshape({shape})
{x}.view({shape})
{x}.permute({perm})
{x}.transpose({dim}, {dim2})
{x}.movedim({dim}, {dim2})
{x}.unsqueeze({new})
{x}.squeeze({dim})
{x}.squeeze()
{x}.flatten()
{x}.flatten(-2)
{x}.unflatten({dim}, (1, -1))
{x}.expand({k}, *{x}.shape)
{x}.unsqueeze(-1).expand(*{x}.shape, {k})
{x}[{cut}]
{x}[{cut}][..., None]
{x}.select({dim}, {place})
{x}.narrow({dim}, {place}, 1)
{x}.unfold({dim}, {k}, {k2})
{x}.diagonal({shift}, -2, -1)
{x}.flip({dims})
{x}.roll({shift}, {dim})
{x}.rot90({shift}, (-2, -1))
{x}.tile({k}, 1)
{x}.repeat({k}, *[1] * {x}.ndim)
{x}.repeat_interleave({k}, {dim})
{x}.tril({shift})
{x}.triu({shift})
torch.diag_embed({x}, {shift})
torch.chunk({x}, 2, {dim})[0]
torch.split({x}, {k}, {dim})[-1]
torch.tensor_split({x}, 2, {dim})[1]
torch.unbind({x}, {dim})[-1]
torch.cat(torch.split({x}, 1, {dim})[::-1], {dim})
torch.stack(torch.unbind({x}, {dim})[::-1], {dim2})
torch.hstack([{x}, {x}.sin()])
F.pad({x}, {pads}, value={c})
F.pad({x}, (1, 1), mode="reflect")
F.pad({x}, (2, 1), mode="circular")
F.pad({x}, (1, 0), mode="replicate")
{x}.contiguous()
{x}.clone()
torch.atleast_2d({x})
""".strip().splitlines()),
    Op("{x}.mT", ndim=(2, 9)),
    Op("torch.cat([{x}, {y}], {dim})", same_shape),
    Op("torch.stack([{x}, {y}, {x}], {new})", same_shape),
    Op("torch.meshgrid({x}.flatten(), {y}.flatten(), indexing='ij')[1]", lambda x, y: True),
]  # fmt: skip

INDEXING = [
    *map(Op, """
{x}.index_select({dim}, {index})
{x}.index_fill({dim}, {index}, {c})
{x}[..., {last}]
{x}[..., {last}, None, :1]
{x}[{first}, ..., {last}]
torch.gather({x}, {dim}, {x}.argsort({dim}))
torch.where({x} > {c}, {x}, 0.0)
F.embedding({first}, {x})
""".strip().splitlines()),
    *(Op(text, same_shape) for text in """
torch.gather({x}, {dim}, {y}.argsort({dim}))
torch.take_along_dim({x}, {y}.argmax({dim}, keepdim=True), {dim})
torch.scatter_add({x}, {dim}, ({y} > 0).long(), {y})
torch.scatter({x}, {dim}, {y}.argsort({dim}), {y})
torch.scatter_reduce({x}, {dim}, ({y} > 0).long(), {y}, "mean")
torch.scatter_reduce({x}, {dim}, ({y} > 0).long(), {y}, "amax")
torch.index_add({x}, {dim}, {index}, {y}.index_select({dim}, {index}), alpha={c})
{x}.index_copy({dim}, {index}[:1], {y}.index_select({dim}, {index}[:1]))
{x}.index_put(({first},), {y}[{first}], accumulate=True)
{x}.masked_scatter({y} > 0.3, {y})
torch.select_scatter({x}, {y}.select({dim}, {place}), {dim}, 0)
torch.slice_scatter({x}, {y}.narrow({dim}, {place}, 1), {dim}, 0, 1)
torch.diagonal_scatter({x}, {y}.diagonal(0, -2, -1), 0, -2, -1)
""".strip().splitlines()),
]  # fmt: skip

IN_PLACE = [
    *map(Op, """
{x}.clone().add_({y})
{x}.clone().mul_({y})
{x}.clone().sub_({y}, alpha={c})
{x}.clone().div_({y} * {y} + 0.5)
torch.sigmoid_({x} * {c})
{x}.clone().clamp_(min={c})
{x}.clone().masked_fill_({x} > 0.2, {c})
torch.zeros_like({x}).copy_({y})
{w}.mul_({c})
{w}.tanh_()
{w}.neg_()
{w}.add_({x}).tanh_()
{w}.copy_({x})
{w}[{cut}].zero_()
{w}[{cut}].mul_({c})
{w}.t_()
{out} = {x}.clone(); {out}[{cut}] = {c}
{out} = {x}.clone(); {out}[{cut}] = {y}.sin().sum()
{out} = {x}.clone(); {out}[{cut}] *= {c}
{out} = {x}.clone(); {out}[{cut}].sin_()
{out} = {x}.clone(); {out}.flatten()[1:] *= {c}
{out} = {x}.clone(); {out}.diagonal(0, -2, -1).mul_({c})
{out} = {x}.clone(); {out}.unbind({dim})[0].copy_({x}.unbind({dim})[-1])
""".strip().splitlines()),
    Op("{out} = {x}.clone(); {out}.mT.add_({x}.mT)", ndim=(2, 9)),
    Op("{out} = {x}.clone(); {out}[{x} > 0.1] = {c}", ndim=(1, 9)),
    *(Op(text, same_shape) for text in """
{out} = {x}.clone(); {out}[..., 1:] = {y}[..., :-1]
{out} = {x}.new_zeros(2, *{x}.shape); {out}[0] = {x}; {out}[1].copy_({y})
{out} = {x}.clone(); {out}.index_add_({dim}, {index}, {y}.index_select({dim}, {index}))
{out} = {x}.clone(); {out}.scatter_add_({dim}, ({y} > 0).long(), {y})
{out} = {x}.clone(); {out}[..., {last}] = {y}[..., {last}]
""".strip().splitlines()),
]  # fmt: skip

PRODUCTS = [
    Op("{x} @ {y}.mT", same_rows),
    Op("torch.matmul({x}, {y}.select(-2, 0))", lambda x, y: same_last(x, y) and y.ndim == 2),
    Op("torch.einsum('...i,...i->...', {x}, {y})", same_rows),
    Op("torch.einsum('ij,kj->ki', {x}, {y})", same_rows, (2, 2)),
    Op("torch.einsum('...ij->...j', {x})", ndim=(2, 9)),
    Op("torch.tensordot({x}, {y}, ([-1], [-1]))", same_last),
    Op("torch.bmm({x}, {y}.mT)", same_rows, (3, 3)),
    Op("torch.mm({x}.mT, {y})", same_shape, (2, 2)),
    Op("torch.dot({x}, {y})", same_shape, (1, 1)),
    Op("torch.outer({x}.flatten(), {y}.flatten())", lambda x, y: True),
    Op("torch.kron({x}, {y})", lambda x, y: True),
    Op("F.linear({x}, {y})", same_rows, (2, 9)),
    Op("F.linear({x}, {y}, {y}.sum(-1))", lambda x, y: same_last(x, y) and y.ndim == 2),
    Op("torch.addmm({x}, {x} @ {y}.mT, {y}, beta={c}, alpha={c})", same_rows, (2, 2)),
    Op("torch.baddbmm({x}, {x} @ {y}.mT, {y})", same_rows, (3, 3)),
    Op("torch.linalg.multi_dot([{x}, {y}.mT, {y}])", same_rows, (2, 2)),
    Op("torch.trace({x} @ {y}.mT)", same_shape, (2, 2)),
    Op("torch.linalg.inv({x} @ {x}.mT + 2 * torch.eye({x}.shape[-2]).double())", ndim=(2, 9)),
    Op("torch.linalg.matrix_power({x}.mT @ {x}, {k})", ndim=(2, 9)),
    Op(
        "torch.linalg.solve({x}.mT @ {x} + 2 * torch.eye({x}.shape[-1]).double(), {y}.mT)",
        same_shape,
        (2, 9),
        second_order=False,
    ),
    Op("torch.linalg.det({x} @ {x}.mT + torch.eye({x}.shape[-2]).double())", ndim=(2, 9),
       second_order=False),
]  # fmt: skip

LAYERS = [
    Op("F.conv1d({x}, {y}, padding={k})", weight_of, (3, 3)),
    Op("F.conv1d({x}, {y}[:, :, :1], stride={k})", weight_of, (3, 3)),
    Op("F.conv2d({x}, {y}, {y}.sum((1, 2, 3)))", weight_of, (4, 4)),
    Op("F.conv_transpose1d({x}, {y}.transpose(0, 1))", weight_of, (3, 3)),
    Op("F.avg_pool1d({x}, {k}, stride=1)", ndim=(2, 3)),
    Op("F.max_pool1d({x}, {k})", ndim=(2, 3)),
    Op("F.adaptive_avg_pool1d({x}, {k})", ndim=(2, 3)),
    Op("F.avg_pool2d({x}, {k}, stride=1, padding=0)", ndim=(3, 4)),
    Op("F.max_pool2d({x}, {k})", ndim=(3, 4)),
    Op("F.interpolate({x}, scale_factor=2, mode='nearest')", ndim=(3, 4)),
    Op("F.interpolate({x}, size=3, mode='linear')", ndim=(3, 3)),
    Op("F.layer_norm({x}, {x}.shape[-1:], eps=0.1)", ndim=(1, 9), second_order=False),
    Op("F.layer_norm({x}, {x}.shape[-1:], {y}, {y}.sin(), 0.1)",
       lambda x, y: same_last(x, y) and y.ndim == 1, second_order=False),
    Op("F.rms_norm({x}, {x}.shape[-1:], eps=0.1)", ndim=(1, 9)),
    Op("F.group_norm({x}, 1, eps=0.1)", ndim=(2, 9), second_order=False),
    Op("F.batch_norm({x}, None, None, training=True, eps=0.1)", ndim=(2, 5), second_order=False),
    Op("F.instance_norm({x}, eps=0.1)", ndim=(3, 5), second_order=False),
]  # fmt: skip

INTEGERS = [
    *map(Op, """
{x} > {y}
{x}.argmax({dim}, keepdim={keep})
{x}.argsort({dim})
({x} > 0).any({dim})
({x} * 4).long()
{x}.isfinite()
{i} + 1
{i}.unsqueeze(0)
""".strip().splitlines()),
]  # fmt: skip

FAMILIES = {
    "smooth": SMOOTH,
    "binary": BINARY,
    "views": VIEWS,
    "reductions": REDUCTIONS,
    "indexing": INDEXING,
    "in place": IN_PLACE,
    "kinked": KINKED,
    "products": PRODUCTS,
    "layers": LAYERS,
    "integers": INTEGERS,
}
