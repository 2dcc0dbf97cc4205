"""Rows of rules/special.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import check, jvp_by_rule
from torch import Tensor

from fwdcompile.errors import RuleError

aten = torch.ops.aten


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y, ROW, COLUMN = _t(3, 4), _t(3, 4, seed=2), _t(4, seed=4), _t(3, 1, seed=5)
POSITIVE, UNIT, ZERO = X.abs() + 0.3, torch.tanh(X), torch.zeros(2, dtype=torch.float64)
EMPTY, SCALAR = _t(0, 4), _t(seed=6)

ROWS: list[tuple[Any, tuple[Any, ...]]] = [
    *((op.default, (x,)) for op in (aten.erf, aten.erfc, aten.sinc) for x in (X, EMPTY, SCALAR)),
    (aten.special_erfcx.default, (X,)),
    (aten.erfinv.default, (UNIT,)),
    (aten.special_ndtri.default, (torch.sigmoid(X),)),
    (aten.special_log_ndtr.default, (X * 4,)),
    (aten.special_entr.default, (POSITIVE,)),
    (aten.lgamma.default, (X,)),
    (aten.digamma.default, (POSITIVE,)),
    *((aten.polygamma.default, (n, POSITIVE)) for n in (0, 1, 3)),
    (aten.i0.default, (X,)),
    (aten.special_i1.default, (X,)),
    (aten.special_i0e.default, (X,)),
    (aten.special_i1e.default, (X,)),
    (aten.xlogy.Tensor, (X, POSITIVE)),
    (aten.xlogy.Tensor, (COLUMN, ROW.abs())),
    (aten.xlogy.Scalar_Self, (2.0, POSITIVE)),
    (aten.xlogy.Scalar_Other, (X, 2.0)),
    (aten.special_xlog1py.default, (X, POSITIVE)),
    (aten.special_xlog1py.self_scalar, (2.0, POSITIVE)),
    (aten.special_xlog1py.other_scalar, (X, 2.0)),
]
BEYOND_TORCH: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.special_zeta.self_scalar, (3.0, POSITIVE)),
    (aten.special_bessel_j0.default, (X,)),
    (aten.special_bessel_j1.default, (X,)),
    (aten.special_bessel_y0.default, (POSITIVE,)),
    (aten.special_bessel_y1.default, (POSITIVE,)),
    (aten.special_modified_bessel_i0.default, (X,)),
    (aten.special_modified_bessel_i1.default, (X,)),
    (aten.special_modified_bessel_k0.default, (POSITIVE,)),
    (aten.special_modified_bessel_k1.default, (POSITIVE,)),
    (aten.special_scaled_modified_bessel_k0.default, (POSITIVE,)),
    (aten.special_scaled_modified_bessel_k1.default, (POSITIVE,)),
    (aten.special_spherical_bessel_j0.default, (POSITIVE,)),
]
LIMITS: list[tuple[Any, tuple[Any, ...]]] = [
    (op.default, (ZERO,))
    for op in (
        aten.sinc,
        aten.i0,
        aten.special_i1,
        aten.special_bessel_j0,
        aten.special_bessel_j1,
        aten.special_modified_bessel_i1,
        aten.special_spherical_bessel_j0,
    )
]


@pytest.mark.parametrize(("op", "args"), ROWS)
def test_row(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args)


@pytest.mark.parametrize(("op", "args"), BEYOND_TORCH)
def test_row_beyond_torch(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args, oracle="difference")


@pytest.mark.parametrize(("op", "args"), LIMITS)
def test_limit_at_zero(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args, oracle="difference")


@pytest.mark.parametrize("op", [aten.igamma.default, aten.igammac.default])
def test_incomplete_gamma(op: Any) -> None:
    check(op, POSITIVE, Y.abs(), wrt=(1,), oracle="difference")
    with pytest.raises(RuleError, match="no closed derivative"):
        jvp_by_rule(op, (POSITIVE, Y.abs()), {}, {0: Y})


def test_zeta() -> None:
    check(aten.special_zeta.default, POSITIVE + 1, Y.abs() + 0.5, wrt=(1,), oracle="difference")


def test_kink_follows_torch() -> None:
    x = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    y = torch.tensor([0.0, 1.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    for args in ((x, y), (x, y - 1)):
        check(aten.xlogy.Tensor, *args, second=False)
        check(aten.special_xlog1py.default, *args, second=False)
    for other in (0.0, -1.0, 2.0):
        check(aten.xlogy.Scalar_Other, x, other, second=False)
        check(aten.special_xlog1py.other_scalar, x, other, second=False)
    check(aten.special_i0e.default, x, second=False)
    check(aten.special_i1e.default, x, second=False)
    check(aten.special_entr.default, x[3:], second=False)
