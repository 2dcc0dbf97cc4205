"""Rows of rules/elementwise.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from check import check, jvp_by_rule
from torch import Tensor

aten = torch.ops.aten


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _v(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


X, Y, Z = _t(3, 4), _t(3, 4, seed=2), _t(3, 4, seed=3)
ROW, COLUMN, SCALAR, EMPTY = _t(4, seed=4), _t(3, 1, seed=5), _t(seed=6), _t(0, 4)
POSITIVE, UNIT = X.abs() + 0.1, torch.tanh(X)
INT, BOOL = torch.tensor([3, -2, 1, 0]), torch.tensor([True, False, True, True])
C = torch.complex(X, Y)

ARITHMETIC: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    *(
        (op, pair, kwargs)
        for op in (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor)
        for pair in ((X, Y), (X, ROW), (COLUMN, ROW), (SCALAR, X), (EMPTY, ROW), (X, INT), (INT, X))
        for kwargs in ({}, {"alpha": 3}, {"alpha": -1})
    ),
    (aten.add.Tensor, (C, X), {"alpha": 2j}),
    (aten.add.Tensor, (X, 2.0), {}),
    (aten.add.Scalar, (X, 2, 3), {}),
    (aten.sub.Scalar, (X, 2, 3), {}),
    (aten.rsub.Scalar, (X, 2), {}),
    (aten.rsub.Scalar, (X, 2, 3), {}),
    *(
        (op, pair, {})
        for op in (aten.mul.Tensor, aten.div.Tensor)
        for pair in ((X, Y), (X, ROW), (COLUMN, ROW), (SCALAR, X), (EMPTY, ROW), (INT, X), (C, Y))
    ),
    (aten.mul.Tensor, (X, BOOL), {}),
    (aten.mul.Tensor, (X, 2.5), {}),
    (aten.mul.Scalar, (X, 2.5), {}),
    (aten.div.Tensor, (X, 2.5), {}),
    (aten.div.Scalar, (X, 2.5), {}),
    (aten.div.Tensor_mode, (X, Y), {"rounding_mode": None}),
    (aten.div.Tensor_mode, (X, Y), {"rounding_mode": "floor"}),
    (aten.div.Tensor_mode, (X, Y), {"rounding_mode": "trunc"}),
    (aten.div.Scalar_mode, (X, 2.0), {"rounding_mode": None}),
    (aten.div.Scalar_mode, (X, 2.0), {"rounding_mode": "floor"}),
    (aten.neg.default, (X,), {}),
    (aten.reciprocal.default, (X,), {}),
    (aten.fmod.Tensor, (X, Y), {}),
    (aten.fmod.Tensor, (X, ROW), {}),
    (aten.fmod.Scalar, (X, 0.3), {}),
    (aten.remainder.Tensor, (X, Y), {}),
    (aten.remainder.Tensor, (COLUMN, ROW), {}),
    (aten.remainder.Scalar, (X, 0.3), {}),
    (aten.lerp.Scalar, (X, Y, 0.3), {}),
    (aten.lerp.Tensor, (X, Y, Z), {}),
    (aten.lerp.Tensor, (X, ROW, SCALAR), {}),
    (aten.addcmul.default, (X, Y, Z), {}),
    (aten.addcmul.default, (ROW, X, COLUMN), {"value": 2.5}),
    (aten.addcdiv.default, (X, Y, Z), {}),
    (aten.addcdiv.default, (ROW, X, COLUMN), {"value": 2.5}),
]

POWERS = [
    *((aten.pow.Tensor_Scalar, (X, k), {}) for k in (0, 1, 2, 3, -1, -2.0, True)),
    *((aten.pow.Tensor_Scalar, (POSITIVE, k), {}) for k in (0.5, 2.5, -0.5)),
    (aten.pow.Tensor_Scalar, (_v(0.0, -1.0), 2), {}),
    (aten.pow.Tensor_Scalar, (_v(0.0, -1.0), 1), {}),
    (aten.pow.Tensor_Scalar, (C, 1.5), {}),
    *((aten.pow.Scalar, (base, X), {}) for base in (2, 2.5, 1)),
    (aten.pow.Scalar, (0, _v(1.0, 2.0)), {}),
    (aten.pow.Tensor_Tensor, (POSITIVE, Y), {}),
    (aten.pow.Tensor_Tensor, (POSITIVE, ROW), {}),
    (aten.pow.Tensor_Tensor, (COLUMN.abs(), ROW), {}),
    (aten.pow.Tensor_Tensor, (X, INT), {}),
    (aten.pow.Tensor_Tensor, (C, C), {}),
    (aten.square.default, (X,), {}),
    (aten.sqrt.default, (POSITIVE,), {}),
    (aten.sqrt.default, (C,), {}),
    (aten.rsqrt.default, (POSITIVE,), {}),
    (aten.hypot.default, (X, Y), {}),
    (aten.hypot.default, (COLUMN, ROW), {}),
    *((op.default, (X,), {}) for op in (aten.exp, aten.exp2, aten.expm1, aten.sigmoid)),
    *((op.default, (POSITIVE,), {}) for op in (aten.log, aten.log2, aten.log10, aten.log1p)),
    *((op.default, (C,), {}) for op in (aten.exp, aten.log, aten.log2, aten.sigmoid)),
    (aten.logaddexp.default, (X, Y), {}),
    (aten.logaddexp.default, (X, ROW), {}),
    (aten.logaddexp2.default, (X, Y), {}),
]

TRIGONOMETRY = [
    *(
        (getattr(aten, name).default, (X,), {})
        for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")
    ),
    *(
        (getattr(aten, name).default, (C,), {})
        for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")
    ),
    *(
        (getattr(aten, name).default, (UNIT,), {})
        for name in ("asin", "acos", "atan", "asinh", "atanh")
    ),
    *(
        (getattr(aten, f"a{name}").default, (C,), {})
        for name in ("sin", "tan", "sinh", "cosh", "tanh")
    ),
    (aten.acosh.default, (POSITIVE + 1,), {}),
    (aten.tanh.default, (EMPTY,), {}),
    (aten.tanh.default, (SCALAR,), {}),
    (aten.atan2.default, (X, Y), {}),
    (aten.atan2.default, (COLUMN, ROW), {}),
]

ROUNDING = [
    *(
        (getattr(aten, name).default, (X * 3,), {})
        for name in ("sign", "floor", "ceil", "round", "trunc")
    ),
    (aten.round.decimals, (X,), {"decimals": 1}),
    (aten.nan_to_num.default, (X,), {}),
    (aten.copysign.Tensor, (X, Y), {}),
    (aten.copysign.Tensor, (COLUMN, ROW), {}),
    (aten.copysign.Scalar, (X, -2.0), {}),
]

CHOICES = [
    *(
        (op.default, pair, {})
        for op in (aten.maximum, aten.minimum, aten.fmax, aten.fmin)
        for pair in ((X, Y), (X, ROW), (COLUMN, ROW), (EMPTY, ROW), (X, SCALAR))
    ),
    (aten.clamp.default, (X, -0.5, 0.5), {}),
    (aten.clamp.default, (X, -0.5), {}),
    (aten.clamp.default, (X, None, 0.5), {}),
    (aten.clamp.default, (X, 0.5, -0.5), {}),
    (aten.clamp.Tensor, (X, Y, Z), {}),
    (aten.clamp.Tensor, (X, ROW), {}),
    (aten.clamp.Tensor, (X, None, COLUMN), {}),
    (aten.clamp.Tensor, (COLUMN, ROW, Y), {}),
    (aten.clamp_min.default, (X, 0.5), {}),
    (aten.clamp_max.default, (X, 0.5), {}),
    (aten.clamp_min.Tensor, (X, ROW), {}),
    (aten.clamp_max.Tensor, (X, ROW), {}),
    (aten.where.self, (X > 0, X, Y), {}),
    (aten.where.self, (X > 0, ROW, COLUMN), {}),
    (aten.where.self, (BOOL, SCALAR, ROW), {}),
    (aten.where.ScalarOther, (X > 0, X, 2.0), {}),
    (aten.where.ScalarOther, (X > 0, ROW, 2.0), {}),
    (aten.where.ScalarSelf, (X > 0, 2.0, X), {}),
]

COPIES = [
    *((getattr(aten, name).default, (X,), {}) for name in ("clone", "alias", "alias_copy")),
    (aten.clone.default, (X.t(),), {"memory_format": torch.contiguous_format}),
    (aten._to_copy.default, (X,), {"dtype": torch.complex128}),
    (aten.fill.Tensor, (X, SCALAR), {}),
    (aten.fill.Scalar, (X, 2.0), {}),
    (aten.full_like.default, (X, 2.0), {}),
    (aten.zeros_like.default, (X,), {}),
    (aten.ones_like.default, (X,), {}),
    (aten.new_zeros.default, (X, [2]), {}),
    (aten.new_ones.default, (X, [2]), {}),
    (aten.new_full.default, (X, [2], 1.5), {}),
]


@pytest.mark.parametrize(
    ("op", "args", "kwargs"), ARITHMETIC + POWERS + TRIGONOMETRY + ROUNDING + CHOICES + COPIES
)
def test_row(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


A, B = _v(0.0, -1.0, 2.0, 1.0, 0.0), _v(0.0, -1.0, 1.0, 2.0, -0.0)
ZEROS = _v(0.0, 0.0, 0.0, -1.0, -2.0, -2.0)
EXPONENTS = _v(0.0, 1.0, -1.0, 0.5, 2.0, 0.0)
EXTREMES = _v(math.inf, -math.inf, math.nan, 0.0, 1.0)

KINKS = [
    *((op.default, (A, B)) for op in (aten.maximum, aten.minimum, aten.fmax, aten.fmin)),
    *((op.default, (EXTREMES, EXTREMES.flip(0))) for op in (aten.fmax, aten.fmin)),
    (aten.clamp.default, (A, -1.0, 1.0)),
    (aten.clamp.default, (A, 1.0, -1.0)),
    (aten.clamp.Tensor, (A, B, B)),
    (aten.clamp.Tensor, (A, B, A)),
    (aten.clamp_min.default, (A, 0.0)),
    (aten.clamp_max.default, (A, 0.0)),
    (aten.clamp_min.Tensor, (A, B)),
    (aten.clamp_max.Tensor, (A, B)),
    (aten.pow.Tensor_Tensor, (ZEROS, EXPONENTS)),
    (aten.pow.Scalar, (0, EXPONENTS)),
    (aten.pow.Scalar, (-2.0, EXPONENTS)),
    *((aten.pow.Tensor_Scalar, (ZEROS, k)) for k in (0, 1, 2, -1, 0.5)),
    (aten.nan_to_num.default, (EXTREMES,)),
    (aten.copysign.Tensor, (A, B)),
    (aten.atan2.default, (A, B)),
    (aten.hypot.default, (A, B)),
    (aten.sqrt.default, (ZEROS,)),
    (aten.asin.default, (EXTREMES,)),
    (aten.log.default, (ZEROS,)),
    (aten.div.Tensor, (A, B)),
]


@pytest.mark.parametrize(("op", "args"), KINKS)
def test_kink_follows_torch(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args, second=False)


def test_second_derivative_at_zero() -> None:
    check(aten.pow.Tensor_Scalar, _v(0.0, 1e-3), 2)
    check(aten.pow.Tensor_Tensor, _v(2.0, 3.0), _v(0.0, 0.0))


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.remainder.Scalar_Tensor, (2.3, X)),
        (aten.frexp.Tensor, (X,)),
        (aten.ldexp.Tensor, (X, INT)),
        (aten.ldexp.Tensor, (X, Y)),
        # Torch drops the imaginary part of the tangent of a real exponent.
        (aten.pow.Scalar, (1 + 2j, X)),
        (aten.pow.Tensor_Tensor, (C, Y)),
    ],
)
def test_row_beyond_torch(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args, oracle="difference")


def test_detach_has_no_tangent() -> None:
    for op in (aten.detach.default, aten.detach_copy.default):
        _, (tangent,) = jvp_by_rule(op, (X,), {}, {0: Y})
        assert tangent is not None and not tangent.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tangent_has_the_dtype_of_its_primal(dtype: torch.dtype) -> None:
    x, d = X.to(dtype), Y.to(dtype)
    for op, args in (
        (aten.maximum.default, (x, x)),
        (aten.pow.Scalar, (2, x)),
        (aten.mul.Tensor, (x, SCALAR)),
        (aten.where.ScalarOther, (X > 0, x, 1.0)),
    ):
        (out,), (tangent,) = jvp_by_rule(
            op, args, {}, {1 if op is aten.where.ScalarOther else 0: d}
        )
        assert tangent is not None and tangent.dtype == out.dtype == dtype
