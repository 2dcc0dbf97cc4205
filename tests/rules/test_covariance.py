"""Lowerings of rules/covariance.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functions import normal

import fwdcompile

COUNTS, IMPORTANCES = torch.tensor([1, 2, 0, 3, 1]), normal(5, seed=3).abs()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"correction": 0},
        {"fweights": COUNTS},
        {"aweights": IMPORTANCES, "correction": 2},
        {"fweights": COUNTS, "aweights": IMPORTANCES},
    ],
)
def test_covariance(settings: dict[str, Any], dtype: torch.dtype) -> None:
    for shape in ((3, 5), (5,)):
        x, x_dot = normal(*shape, dtype=dtype), normal(*shape, seed=2, dtype=dtype)
        expected = torch.func.jvp(lambda x: torch.cov(x, **settings), (x,), (x_dot,))
        found = fwdcompile.jvp(lambda x: torch.cov(x, **settings), (x,), (x_dot,))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(3, 5), (5,)])
def test_correlation(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, x_dot = normal(*shape, dtype=dtype), normal(*shape, seed=2, dtype=dtype)
    expected = torch.func.jvp(torch.corrcoef, (x,), (x_dot,))
    torch.testing.assert_close(fwdcompile.jvp(torch.corrcoef, (x,), (x_dot,)), expected)


def test_importances_are_differentiated() -> None:
    x = normal(3, 5)
    args = (IMPORTANCES,), (normal(5, seed=4),)

    def covariance(weights: torch.Tensor) -> torch.Tensor:
        return torch.cov(x, aweights=weights)

    expected = torch.func.jvp(covariance, *args)
    torch.testing.assert_close(fwdcompile.jvp(covariance, *args), expected)
