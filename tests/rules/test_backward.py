"""Rows of rules/backward.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import check
from torch import Tensor

aten = torch.ops.aten


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X2, X3 = _t(2, 3, 6, 6), _t(1, 2, 4, 6, 4)
MAX2, MAX3 = aten.max_pool2d_with_indices(X2, [2, 2]), aten.max_pool3d_with_indices(X3, [2, 2, 2])
BEST2, BEST3 = aten.adaptive_max_pool2d(X2, [2, 3]), aten.adaptive_max_pool3d(X3, [2, 3, 2])
DRAWN2 = aten.fractional_max_pool2d(X2, [2, 2], [3, 3], _t(2, 3, 2).sigmoid())
DRAWN3 = aten.fractional_max_pool3d(X3, [2] * 3, [2] * 3, _t(1, 2, 3).sigmoid())
SQUARE, CUBE = ([2, 2], [2, 2], [0, 0]), ([2, 2, 2], [2, 2, 2], [0, 0, 0])
CONV = ([1, 1], [1, 0], [1, 1], False, [0, 0], 1)

BACKWARD: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.avg_pool2d_backward.default, (_t(2, 3, 3, 3), X2, *SQUARE, False, True, None)),
    (aten.avg_pool3d_backward.default, (_t(1, 2, 2, 3, 2), X3, *CUBE, False, True, 3)),
    (aten._adaptive_avg_pool2d_backward.default, (_t(2, 3, 3, 2), X2)),
    (aten._adaptive_avg_pool3d_backward.default, (_t(1, 2, 2, 2, 3), X3)),
    (
        aten.max_pool2d_with_indices_backward.default,
        (torch.ones_like(MAX2[0]), X2, *SQUARE, [1, 1], False, MAX2[1]),
    ),
    (
        aten.max_pool3d_with_indices_backward.default,
        (MAX3[0].cos(), X3, *CUBE, [1, 1, 1], False, MAX3[1]),
    ),
    (aten.adaptive_max_pool2d_backward.default, (BEST2[0].cos(), X2, BEST2[1])),
    (aten.adaptive_max_pool3d_backward.default, (BEST3[0].cos(), X3, BEST3[1])),
    (
        aten.fractional_max_pool2d_backward.default,
        (DRAWN2[0].cos(), X2, [2, 2], [3, 3], DRAWN2[1]),
    ),
    (
        aten.fractional_max_pool3d_backward.default,
        (DRAWN3[0].cos(), X3, [2] * 3, [2] * 3, DRAWN3[1]),
    ),
    (aten.replication_pad1d_backward.default, (_t(3, 6, 9), X2[0], [1, 2])),
    (aten.replication_pad2d_backward.default, (_t(2, 3, 7, 9), X2, [1, 2, 0, 1])),
    (aten.replication_pad3d_backward.default, (_t(1, 2, 4, 7, 6), X3, [1, 1, 0, 1, 0, 0])),
    (aten._upsample_bilinear2d_aa_backward.default, (_t(1, 2, 3, 4), [3, 4], [1, 2, 6, 8], False)),
    (aten._upsample_bicubic2d_aa_backward.default, (_t(1, 2, 3, 4), [3, 4], [1, 2, 6, 8], True)),
    (aten.masked_scatter_backward.default, (X2, X2 > 0, [int((X2 > 0).sum())])),
    (
        aten.convolution_backward.default,
        (_t(2, 4, 6, 4), X2, _t(4, 3, 3, 3), [4], *CONV, [True, True, True]),
    ),
    (
        aten.convolution_backward.default,
        (_t(2, 4, 6, 4), X2, _t(4, 3, 3, 3), None, *CONV, [False, True, False]),
    ),
    (
        aten.convolution_backward.default,
        (_t(2, 4, 6, 4), X2, _t(4, 3, 3, 3), None, *CONV, [True, False, False]),
    ),
]


@pytest.mark.parametrize("number", range(len(BACKWARD)))
def test_backward_runs(number: int) -> None:
    op, args = BACKWARD[number]
    check(op, *args, oracle="difference")
