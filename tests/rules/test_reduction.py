"""Rows of rules/reduction.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from check import check, jvp_by_rule
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten
Sample = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _v(*numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _name(x: object) -> str:
    return str(x) if isinstance(x, OpOverload) else ""


X, Y, CUBE, SCALAR, EMPTY = _t(3, 4), _t(3, 4, seed=2), _t(2, 3, 4), _t(), _t(0, 4)
NAN, INF = math.nan, math.inf
ZEROS = _v([0.0, 2.0, -1.0, 3.0], [0.0, 1.5, 0.0, 2.0], [1.0, -2.0, 0.5, 1.0])
TIES = _v([1.0, 2.0, 2.0, 0.0], [3.0, 0.0, 3.0, 3.0], [1.0, 1.0, 1.0, 1.0])
DIMS: tuple[Any, ...] = ([0], [-1], [0, 2], [])

SUMS: list[Sample] = [
    *((op, (x,), {}) for op in (aten.sum.default, aten.mean.default) for x in (CUBE, SCALAR)),
    (aten.sum.default, (EMPTY,), {}),
    *(
        (op, (CUBE, dim, keepdim), {})
        for op in (aten.sum.dim_IntList, aten.mean.dim)
        for dim in DIMS
        for keepdim in (False, True)
    ),
    (aten.sum.dim_IntList, (SCALAR, [0]), {}),
    (aten.sum.dim_IntList, (EMPTY, [0]), {}),
    (aten.nansum.default, (_v([1.0, NAN, 2.0], [0.5, 1.0, NAN]),), {}),
    (aten.nansum.default, (_v([1.0, NAN, 2.0], [0.5, 1.0, NAN]), [-1], True), {}),
    (aten.trace.default, (X,), {}),
    (aten.cumsum.default, (X, -1), {}),
    (aten.cumsum.default, (SCALAR, 0), {}),
    (aten.cumsum.default, (EMPTY, 0), {}),
]

EXTREMA: list[Sample] = [
    *(
        (op, (CUBE, dim, keepdim), {})
        for op in (aten.amax.default, aten.amin.default)
        for dim in DIMS
        for keepdim in (False, True)
    ),
    *((op, (SCALAR, [0]), {}) for op in (aten.amax.default, aten.amin.default)),
    *(
        (op, (x,), {})
        for op in (
            aten.max.default,
            aten.min.default,
            aten.median.default,
            aten.nanmedian.default,
        )
        for x in (CUBE, SCALAR)
    ),
    (aten.nanmedian.default, (_v(1.0, NAN, 2.0, 3.0),), {}),
    *(
        (op, (x, dim, keepdim), {})
        for op in (
            aten.max.dim,
            aten.min.dim,
            aten.median.dim,
            aten.nanmedian.dim,
            aten.mode.default,
        )
        for x, dim in ((CUBE, 1), (CUBE, -1), (SCALAR, 0))
        for keepdim in (False, True)
    ),
    *((aten.kthvalue.default, (CUBE, 2, -2, keepdim), {}) for keepdim in (False, True)),
    *(
        (aten.sort.default, (x, dim, down), {})
        for x, dim, down in ((X, -1, True), (SCALAR, 0, False))
    ),
    (aten.sort.stable, (X,), {"stable": True, "dim": 0}),
    *(
        (aten.topk.default, (X, 2, dim, largest), {})
        for dim in (0, -1)
        for largest in (True, False)
    ),
    *(
        (op, (x, dim), {})
        for op in (aten.cummax.default, aten.cummin.default)
        for x, dim in ((CUBE, 1), (X, -1), (SCALAR, 0))
    ),
]

TIED: list[Sample] = [
    *((op, (TIES, [1]), {}) for op in (aten.amax.default, aten.amin.default)),
    *((op, (TIES,), {}) for op in (aten.max.default, aten.min.default, aten.median.default)),
    *((op, (TIES, 1), {}) for op in (aten.max.dim, aten.min.dim, aten.median.dim)),
    *((op, (TIES, 1), {}) for op in (aten.mode.default, aten.cummax.default, aten.cummin.default)),
    (aten.topk.default, (TIES, 2), {}),
    (aten.sort.stable, (TIES,), {"stable": True}),
    *((aten.linalg_vector_norm.default, (TIES, p, [1]), {}) for p in (INF, -INF, 1, 0, 0.5, 3)),
]

MOMENTS: list[Sample] = [
    *(
        (op, (CUBE, dim), {"correction": correction, "keepdim": keepdim})
        for op in (
            aten.var.correction,
            aten.std.correction,
            aten.var_mean.correction,
            aten.std_mean.correction,
        )
        for dim, correction, keepdim in (
            (None, None, False),
            (None, 0, True),
            ([0, -1], 2, False),
            ([1], 0.5, True),
            ([-1], 3, False),
        )
    ),
    (aten.std.correction, (_v([1.0, 1.0, 1.0], [1.0, 2.0, 4.0]), [1]), {}),
]

NORMS: list[Sample] = [
    *(
        (aten.linalg_vector_norm.default, (CUBE, p, dim, keepdim), {})
        for p in (2, 1, 0, 0.5, 1.5, 3, INF, -INF, -1.5)
        for dim, keepdim in ((None, False), ([1], True), ([0, -1], False))
    ),
    (aten.linalg_vector_norm.default, (SCALAR, 2), {}),
    (aten.linalg_vector_norm.default, (SCALAR, 3), {}),
    *((aten.dist.default, (X, other, p), {}) for p in (2, 1, 2.5, INF) for other in (Y, Y[0])),
    *(
        (aten.logsumexp.default, (CUBE, dim, keepdim), {})
        for dim in ([0], [1, -1])
        for keepdim in (False, True)
    ),
    (aten.logsumexp.default, (_v([-INF, 0.0, 1.0], [1e4, 1e4, -1e4]), [1]), {}),
]

COMPLEX = torch.complex(CUBE, CUBE.flip(0) + 1)
COMPLEX_SAMPLES: list[Sample] = [
    *(
        (op, (COMPLEX, [1]), {"correction": 1})
        for op in (
            aten.var.correction,
            aten.std.correction,
            aten.var_mean.correction,
            aten.std_mean.correction,
        )
    ),
    *(
        (aten.linalg_vector_norm.default, (COMPLEX, p, dim), {})
        for p in (2, 1, 0, 0.5, 3, INF, -INF)
        for dim in (None, [0, 1])
    ),
    *((aten.dist.default, (COMPLEX, COMPLEX.flip(1) + 2j, p), {}) for p in (2, 1, 2.5, INF)),
    *((aten.logcumsumexp.default, (COMPLEX, dim), {}) for dim in (0, 1)),
    *((aten.cumprod.default, (COMPLEX, dim), {}) for dim in (0, 1)),
    (aten.prod.default, (COMPLEX,), {}),
]

PRODUCTS: list[Sample] = [
    *((aten.prod.default, (x,), {}) for x in (X, ZEROS, ZEROS[0], SCALAR, EMPTY)),
    *(
        (aten.prod.dim_int, (x, dim, keepdim), {})
        for x, dim in ((CUBE, 1), (ZEROS, -1), (ZEROS, 0), (SCALAR, 0), (EMPTY, 0), (X[:, :1], 1))
        for keepdim in (False, True)
    ),
    *(
        (aten.cumprod.default, (x, dim), {})
        for x, dim in (
            (CUBE, 1),
            (ZEROS, -1),
            (ZEROS, 0),
            (SCALAR, 0),
            (EMPTY, 0),
            (_t(9, seed=3), 0),
        )
    ),
    *(
        (aten.logcumsumexp.default, (x, dim), {})
        for x, dim in ((CUBE, 1), (X, 0), (_t(9, seed=3), -1), (SCALAR, 0))
    ),
]


@pytest.mark.parametrize(("op", "args", "kwargs"), SUMS, ids=_name)
def test_sums(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), EXTREMA, ids=_name)
def test_extrema(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), TIED, ids=_name)
def test_ties_follow_torch(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, second=False, **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), MOMENTS, ids=_name)
def test_moments(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, second=args[0] is CUBE, **kwargs)


@pytest.mark.parametrize("correction", [3, 5])
@pytest.mark.filterwarnings("ignore:.*degrees of freedom:UserWarning")
def test_the_variance_of_too_few_has_no_number_for_a_tangent(correction: int) -> None:
    for op in (aten.var.correction, aten.std.correction):
        _, dots = jvp_by_rule(op, (CUBE, [1]), {"correction": correction}, {0: CUBE})
        assert dots[0] is not None
        assert dots[0].isnan().all()


@pytest.mark.parametrize(("op", "args", "kwargs"), NORMS, ids=_name)
def test_norms(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), COMPLEX_SAMPLES, ids=_name)
def test_complex(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


def test_a_running_logsumexp_keeps_its_digits() -> None:
    """Torch adds 1e-13 to a sum that is small where a later element is large."""
    x = _v([-20.0, -19.0, 0.0])
    check(aten.logcumsumexp.default, x, 1, oracle="difference")
    _, (x_dot,) = jvp_by_rule(aten.logcumsumexp.default, (x, 1), {}, {0: torch.ones_like(x)})
    torch.testing.assert_close(x_dot, torch.ones_like(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", [2, 1, 0.5, 1.5, 3, INF])
def test_the_norm_of_a_zero_vector_has_no_tangent(p: float) -> None:
    x = torch.zeros(2, 3, dtype=torch.float64)
    _, dots = jvp_by_rule(aten.linalg_vector_norm.default, (x, p, [1]), {}, {0: _t(2, 3)})
    assert dots[0] is not None
    torch.testing.assert_close(dots[0], torch.zeros_like(dots[0]), rtol=0, atol=0)


@pytest.mark.parametrize(("op", "args", "kwargs"), PRODUCTS, ids=_name)
def test_products_and_scans(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


@pytest.mark.parametrize("op", [aten.logsumexp.default, aten.logcumsumexp.default])
def test_log_sums_of_nothing_have_no_tangent(op: Any) -> None:
    x = _v([-INF, -INF, -INF], [-INF, 1.0, 2.0])
    dim = [1] if op is aten.logsumexp.default else 1
    _, dots = jvp_by_rule(op, (x, dim), {}, {0: _t(2, 3)})
    assert dots[0] is not None
    assert dots[0].isfinite().all()
    torch.testing.assert_close(dots[0][0], torch.zeros_like(dots[0][0]), rtol=0, atol=0)


def test_logcumsumexp_of_an_empty_tensor() -> None:
    check(aten.logcumsumexp.default, EMPTY, 0, oracle="difference")


def test_logcumsumexp_does_not_overflow() -> None:
    x, x_dot = _v(1e4, -1e4, 1e4, 2e4, 0.0), _t(5)
    _, dots = jvp_by_rule(aten.logcumsumexp.default, (x, 0), {}, {0: x_dot})
    mean = (x_dot[0] + x_dot[2]) / 2
    expected = torch.stack([x_dot[0], x_dot[0], mean, x_dot[3], x_dot[3]])
    assert dots[0] is not None
    torch.testing.assert_close(dots[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tangent_has_its_outputs_dtype(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    for op, args in (
        (aten.var.correction, (x, [1])),
        (aten.amax.default, (x, [1])),
        (aten.prod.default, (x,)),
        (aten.linalg_vector_norm.default, (x, 3)),
    ):
        outs, dots = jvp_by_rule(op, args, {}, {0: x})
        assert dots[0] is not None
        assert dots[0].dtype == outs[0].dtype == dtype


@pytest.mark.parametrize(
    "op", [aten.sum.default, aten.mean.default, aten.prod.default, aten.nansum.default]
)
def test_a_wider_accumulator(op: Any) -> None:
    x = X.float()
    outs, dots = jvp_by_rule(op, (x,), {"dtype": torch.float64}, {0: x})
    _, expected = torch.func.jvp(lambda x: op(x, dtype=torch.float64), (x,), (x,))
    assert dots[0] is not None
    assert dots[0].dtype == outs[0].dtype == torch.float64
    torch.testing.assert_close(dots[0], expected, rtol=1e-6, atol=1e-6)
