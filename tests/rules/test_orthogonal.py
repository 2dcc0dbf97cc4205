"""Rows of rules/orthogonal.py."""

from __future__ import annotations

import pytest
import torch
from functions import check_function, normal
from torch import Tensor

SHAPES = [(4, 3), (3, 3), (3, 4), (2, 4, 3), (1, 3), (3, 1), (0, 2), (2, 0)]
DTYPES = [torch.float64, torch.complex128]


def _reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.qr(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_qr(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(*shape, dtype=dtype)
    check_function(_reduced, x)
    check_function(lambda y: torch.linalg.qr(y, mode="r")[1], x, same=lambda y: _reduced(y)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_torch_refuses_by_differences(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(*shape, dtype=dtype)
    check_function(torch.geqrf, x, oracle="difference")
    check_function(lambda y: torch.linalg.qr(y, mode="complete"), x, oracle="difference")


def _reflections(rows: int, count: int, dtype: torch.dtype, *batch: int) -> tuple[Tensor, Tensor]:
    """Of any tau: the products need not be orthogonal."""
    return normal(*batch, rows, count, dtype=dtype), normal(*batch, count, seed=2, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (2,), (0,)])
def test_householder_product(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    for rows, count in ((4, 3), (3, 3), (3, 0)):
        x, tau = _reflections(rows, count, dtype, *batch)
        product = torch.linalg.householder_product
        check_function(product, x, tau, oracle="difference")
        check_function(product, x, tau[..., : count - 1] if count else tau, oracle="difference")
        check_function(product, x, torch.zeros_like(tau), oracle="difference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("transpose", [True, False])
def test_ormqr(dtype: torch.dtype, left: bool, transpose: bool) -> None:
    for batch in ((), (2,), (0,)):
        x, tau = _reflections(4, 3, dtype, *batch)
        shape = (4, 2) if left else (2, 4)
        other = normal(*batch, *shape, seed=3, dtype=dtype)

        def turned(x: Tensor, tau: Tensor, y: Tensor) -> Tensor:
            return torch.ormqr(x, tau, y, left=left, transpose=transpose)

        check_function(turned, x, tau, other, oracle="difference")
