"""Rows of rules/fourier.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import check

import fwdcompile

aten = torch.ops.aten

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(3, 4, dtype=torch.float64, generator=GENERATOR)
Z = torch.randn(3, 4, dtype=torch.complex128, generator=GENERATOR)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten._fft_r2c.default, (X, [0, 1], 0, True)),
        (aten._fft_r2c.default, (X, [1], 1, False)),
        (aten._fft_c2r.default, (Z, [1], 2, 6)),
        (aten._fft_c2r.default, (Z, [0, 1], 0, 7)),
        (aten._fft_c2c.default, (Z, [0], 1, True)),
        (aten._fft_c2c.default, (Z, [0, 1], 2, False)),
    ],
)
def test_transforms_are_linear(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args)


def test_a_filter_in_the_frequency_domain() -> None:
    def low_pass(x: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft(torch.fft.rfft(x)[..., :2], n=4, norm="ortho").tanh()

    mine = fwdcompile.jvp(low_pass, (X,), (X,))
    torch.testing.assert_close(mine, torch.func.jvp(low_pass, (X,), (X,)), rtol=1e-12, atol=1e-12)
