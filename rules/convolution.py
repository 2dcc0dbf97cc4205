"""Convolutions, plain and transposed, in one to three dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rule import joint
from .linalg import Call, affine

aten = torch.ops.aten


@joint(
    aten.convolution.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    wrt=("input", "weight", "bias"),
)
def convolution(d: dict[str, Tensor], weight: Tensor, call: Call) -> Any:
    """As for a linear layer; a bias alone is one number for each channel."""
    bias_dot = d["bias"].view(-1, *[1] * (weight.ndim - 2)) if "bias" in d else None
    return affine(d, bias_dot, call)
