"""Rows of rules/convolution.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import check, jvp_by_rule
from torch import Tensor

aten = torch.ops.aten


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X1, X2, X3 = _t(2, 4, 7), _t(2, 4, 6, 5), _t(1, 2, 4, 4, 3)

CASES: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.conv1d.default, (X1, _t(3, 4, 2), _t(3))),
    (aten.conv1d.default, (X1, _t(6, 2, 3), None, [2], [1], [1], 2)),
    (aten.conv1d.padding, (X1, _t(3, 4, 3), _t(3), [1], "same", [2])),
    (aten.conv2d.default, (X2, _t(3, 4, 3, 2), _t(3))),
    (aten.conv2d.default, (X2[0], _t(3, 4, 3, 2), _t(3))),
    (aten.conv2d.default, (X2[:0], _t(3, 4, 3, 2), _t(3))),
    (aten.conv2d.default, (X2, _t(4, 1, 3, 3), _t(4), [2, 1], [1, 2], [2, 1], 4)),
    (aten.conv2d.default, (X2.to(memory_format=torch.channels_last), _t(3, 4, 3, 2), _t(3))),
    (aten.conv2d.padding, (X2, _t(3, 4, 2, 2), _t(3), [1, 1], "valid")),
    (aten.conv3d.default, (X3, _t(2, 2, 2, 2, 2), _t(2), [1, 2, 1], [1, 0, 1])),
    (aten.conv3d.padding, (X3, _t(2, 2, 3, 3, 3), None, [1, 1, 1], "same")),
    (aten.conv_transpose1d.default, (X1, _t(4, 3, 3), _t(3), [2], [1], [1], 1, [1])),
    (aten.conv_transpose2d.input, (X2, _t(4, 2, 3, 2), _t(4), [2, 1], [1, 0], [1, 0], 2, [1, 2])),
    (aten.conv_transpose2d.input, (X2[0], _t(4, 2, 3, 2), _t(2))),
    (aten.conv_transpose3d.input, (X3, _t(2, 3, 2, 2, 2), None)),
    (aten.convolution.default, (X2, _t(3, 4, 3, 2), _t(3), [1], [1], [1], False, [0], 1)),
    (aten.convolution.default, (X1, _t(4, 2, 3), _t(4), [2], [0], [1], True, [1], 2)),
]


@pytest.mark.parametrize(("op", "args"), CASES)
def test_row(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args)


def test_bias_and_input_without_weight() -> None:
    check(aten.conv2d.default, X2, _t(3, 4, 3, 2), _t(3), wrt=(0, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
def test_dtype(dtype: torch.dtype) -> None:
    x, w, b = X2.to(dtype), _t(3, 4, 3, 2).to(dtype), _t(3).to(dtype)
    dots = {0: torch.ones_like(x), 1: torch.ones_like(w), 2: torch.ones_like(b)}
    _, (out_dot,) = jvp_by_rule(aten.conv2d.default, (x, w, b), {}, dots)
    assert out_dot is not None
    assert out_dot.dtype == dtype
    conv = torch.nn.functional.conv2d
    expected = conv(dots[0], w, b) - b.view(-1, 1, 1) + conv(x, dots[1], dots[2])
    torch.testing.assert_close(out_dot, expected, rtol=0.05, atol=0.05)
