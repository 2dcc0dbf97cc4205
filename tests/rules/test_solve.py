"""Rows of rules/solve.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from check import check
from functions import Function, check_function, normal
from torch import Tensor
from torch._ops import OpOverload

import fwdcompile
from fwdcompile.rule import table

aten = torch.ops.aten
Sample = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _name(x: object) -> str:
    return str(x) if isinstance(x, OpOverload) else ""


EYE = torch.eye(3, dtype=torch.float64)
A, BATCH = normal(3, 3) + 2 * EYE, normal(2, 3, 3, seed=2) + 2 * EYE
TALL, WIDE = normal(4, 3, seed=3), normal(3, 4, seed=4)
B, V = normal(3, 2, seed=5), normal(3, seed=6)
COMPLEX = normal(2, 3, 3, seed=8, dtype=torch.complex128) + 2 * EYE

INVERSES: list[Sample] = [
    *((aten.linalg_inv.default, (a,), {}) for a in (A, BATCH)),
    (aten.linalg_inv_ex.default, (A,), {}),
    (aten.linalg_tensorinv.default, (normal(2, 3, 6, seed=7),), {}),
    (aten.linalg_tensorinv.default, (normal(6, 3, 2, seed=7), 1), {}),
    (
        aten.linalg_pinv.atol_rtol_tensor,
        (TALL,),
        {"atol": normal().abs() / 1e3, "rtol": normal() * 0},
    ),
    *(
        (aten.linalg_solve.default, (a, b), {})
        for a, b in ((A, B), (A, V), (BATCH, B), (BATCH, normal(2, 3)), (BATCH, V), (A, BATCH))
    ),
    *((aten.linalg_solve.default, (a, normal(2, 2, 3)), {"left": False}) for a in (A, BATCH)),
    *(
        (aten.linalg_solve_triangular.default, (a, B), {"upper": upper, "unitriangular": unit})
        for a in (A, BATCH)
        for upper in (False, True)
        for unit in (False, True)
    ),
    (aten.linalg_solve_triangular.default, (A, B.mT), {"upper": True, "left": False}),
]

# Torch itself has no tangent for these, or one that counts the triangle that is not read.
BY_DIFFERENCE: list[Sample] = [
    *(
        (aten.triangular_solve.default, (B, A), {"transpose": transpose, "unitriangular": unit})
        for transpose in (False, True)
        for unit in (False, True)
    ),
    (aten.triangular_solve.default, (B, BATCH, False), {}),
    *((aten.cholesky_solve.default, (B, A, upper), {}) for upper in (False, True)),
    (aten.cholesky_solve.default, (B, BATCH), {}),
    *(
        (aten.cholesky_inverse.default, (a, upper), {})
        for a in (A, BATCH)
        for upper in (False, True)
    ),
    *((aten.linalg_pinv.atol_rtol_tensor, (a,), {}) for a in (TALL, WIDE, A)),
]

FUNCTIONS: dict[str, tuple[Function, Tensor]] = {
    "solve_ex": (lambda x: torch.linalg.solve_ex(x, x[0])[0], A),
    "solve_ex left": (lambda x: torch.linalg.solve_ex(x, B.mT, left=False)[0], A),
    "lu_solve": (lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), x[:, :2]), A),
    "lu_solve adjoint": (
        lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), B, adjoint=True),
        BATCH,
    ),
    "lu_solve complex": (
        lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), x, adjoint=True),
        COMPLEX,
    ),
    "lu_solve right": (
        lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), B.mT, left=False),
        A,
    ),
}
DRIVERS = ["gels", "gelsy", "gelsd", "gelss", None]


@cache
def _checked(name: str) -> set[Any]:
    function, x = FUNCTIONS[name]
    return check_function(function, x)


@pytest.mark.parametrize(("op", "args", "kwargs"), INVERSES, ids=_name)
def test_inverses_and_solves(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), BY_DIFFERENCE, ids=_name)
def test_what_torch_lacks(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, oracle="difference", **kwargs)


@pytest.mark.parametrize("upper", [False, True])
def test_cholesky_inverse_of_a_complex_factor(upper: bool) -> None:
    """The diagonal of a factor is real; torch's own tangent is wrong."""

    def inverse(x: Tensor) -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(x @ x.mH, upper=upper), upper=upper)

    check_function(inverse, COMPLEX, same=lambda x: torch.linalg.inv(x @ x.mH))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    _checked(name)


def _solution(driver: str | None) -> Function:
    """The solution, and the residuals where there are any."""

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        solution, residuals, _, _ = torch.linalg.lstsq(a, b, driver=driver)
        return (solution, residuals) if residuals.numel() else (solution,)

    return function


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("shape", [(5, 3), (3, 3), (3, 5), (2, 5, 3), (0, 5, 3)])
def test_lstsq(driver: str | None, shape: tuple[int, ...]) -> None:
    for dtype in (torch.float64, torch.complex128):
        a = normal(*shape, dtype=dtype)
        check_function(_solution(driver), a, normal(*shape[:-1], 2, seed=2, dtype=dtype))
        check_function(_solution(driver), a, normal(*shape[:-1], seed=3, dtype=dtype))


@pytest.mark.parametrize("driver", ["gelsd", "gelss"])
@pytest.mark.parametrize("a", [TALL, WIDE, BATCH])
def test_singular_values_of_lstsq(driver: str, a: Tensor) -> None:
    """Torch gives them the tangent zero."""
    b = normal(*a.shape[:-1], 2)
    check_function(lambda x: torch.linalg.lstsq(x, b, driver=driver)[3], a, oracle="difference")


def test_lstsq_of_lesser_rank() -> None:
    a = torch.tensor([[1.0, 0], [0, 0], [0, 0]], dtype=torch.float64)
    b, b_dot = normal(3, 2), normal(3, 2, seed=2)
    x, x_dot = fwdcompile.jvp(lambda y: torch.linalg.lstsq(a, y)[0], (b,), (b_dot,))
    torch.testing.assert_close(x, torch.linalg.lstsq(a, b)[0])
    torch.testing.assert_close(x_dot, torch.linalg.lstsq(a, b_dot)[0])


def test_torch_itself_still_refuses_to_guess_shapes() -> None:
    fwdcompile.jvp(lambda y: torch.linalg.lstsq(A, y)[0], (B,), (B,))
    with (
        pytest.raises(torch._subclasses.fake_tensor.DynamicOutputShapeException),
        torch._subclasses.FakeTensorMode(),
    ):
        torch.linalg.lstsq(torch.empty(3, 3), torch.empty(3, 2))


@pytest.mark.parametrize("hermitian", [False, True])
def test_ldl_solve(hermitian: bool) -> None:
    a = COMPLEX + COMPLEX.mH if hermitian else BATCH + BATCH.mT
    ld, pivots = torch.linalg.ldl_factor(a, hermitian=hermitian)
    b = normal(2, 3, 2, dtype=a.dtype)
    _, x_dot = fwdcompile.jvp(
        lambda y: torch.linalg.ldl_solve(ld, pivots, y, hermitian=hermitian), (b,), (b,)
    )
    torch.testing.assert_close(x_dot, torch.linalg.solve(a, b))


def test_ldl_factor_is_refused() -> None:
    for factor in (torch.linalg.ldl_factor, torch.linalg.ldl_factor_ex):
        with pytest.raises(fwdcompile.MissingRuleError, match="lu_factor"):
            fwdcompile.jvp(lambda x: factor(x + x.mT)[0], (A,), (A,))


def test_functions_reach_every_row() -> None:
    tested = {op for op, _, _ in INVERSES + BY_DIFFERENCE}.union(*map(_checked, FUNCTIONS))
    tested |= {aten.linalg_lstsq.default, aten.linalg_ldl_solve.default}
    tested |= {aten.linalg_ldl_factor.default, aten.linalg_ldl_factor_ex.default}
    rows = {op for op, row in table.items() if row.where.startswith("rules/solve.py")}
    assert rows <= tested
