"""Torch's backward runs, which a function has that calls `torch.func.grad` by itself.

They are linear in the gradient of the output. Most read their input for its shape alone, or for
where an output came from, which does not move.
"""

from __future__ import annotations

import torch

from ..rule import jvp, linear

aten = torch.ops.aten

for _op in (
    aten._adaptive_avg_pool2d_backward.default,
    aten._adaptive_avg_pool3d_backward.default,
    aten.adaptive_max_pool2d_backward.default,
    aten.adaptive_max_pool3d_backward.default,
    aten.avg_pool2d_backward.default,
    aten.avg_pool3d_backward.default,
    aten.fractional_max_pool2d_backward.default,
    aten.fractional_max_pool3d_backward.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.max_pool3d_with_indices_backward.default,
    aten.replication_pad1d_backward.default,
    aten.replication_pad2d_backward.default,
    aten.replication_pad3d_backward.default,
):
    jvp(_op, grad_output=lambda d, call: call(grad_output=d), self=lambda d: None)

for _op in (
    aten._upsample_bicubic2d_aa_backward.default,
    aten._upsample_bilinear2d_aa_backward.default,
    aten.masked_scatter_backward.default,
):
    linear(_op, wrt="grad_output")

# Gradients of input, weight and bias; a product of that of the output with weight or input.
jvp(
    aten.convolution_backward.default,
    grad_output=lambda d, call: call(grad_output=d),
    input=lambda d, output_mask, call: call(input=d, output_mask=[False, output_mask[1], False]),
    weight=lambda d, output_mask, call: call(weight=d, output_mask=[output_mask[0], False, False]),
)
