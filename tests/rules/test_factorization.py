"""Rows of rules/factorization.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from check import check, run
from torch import Tensor
from torch._ops import OpOverload

import fwdcompile
from fwdcompile.capture import capture
from fwdcompile.program import Program
from fwdcompile.rule import table
from fwdcompile.transform import as_primal, transform

aten = torch.ops.aten
Sample = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _name(x: object) -> str:
    return str(x) if isinstance(x, OpOverload) else ""


EYE = torch.eye(3, dtype=torch.float64)
A, BATCH = _t(3, 3) + 2 * EYE, _t(2, 3, 3, seed=2) + 2 * EYE
TALL, WIDE = _t(4, 3, seed=3), _t(3, 4, seed=4)
B, V = _t(3, 2, seed=5), _t(3, seed=6)

INVERSES: list[Sample] = [
    *((aten.linalg_inv.default, (a,), {}) for a in (A, BATCH)),
    (aten.linalg_inv_ex.default, (A,), {}),
    (aten.linalg_tensorinv.default, (_t(2, 3, 6, seed=7),), {}),
    (aten.linalg_tensorinv.default, (_t(6, 3, 2, seed=7), 1), {}),
    (aten.linalg_pinv.atol_rtol_tensor, (TALL,), {"atol": _t().abs() / 1e3, "rtol": _t() * 0}),
    (aten.linalg_matrix_exp.default, (A / 3,), {}),
    (aten.linalg_matrix_exp.default, (BATCH / 3,), {}),
    *(
        (aten.linalg_solve.default, (a, b), {})
        for a, b in ((A, B), (A, V), (BATCH, B), (BATCH, _t(2, 3)), (BATCH, V), (A, BATCH))
    ),
    *((aten.linalg_solve.default, (a, _t(2, 2, 3)), {"left": False}) for a in (A, BATCH)),
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
    *((aten.cholesky_inverse.default, (A, upper), {}) for upper in (False, True)),
    *((aten.linalg_pinv.atol_rtol_tensor, (a,), {}) for a in (TALL, WIDE, A)),
]


def _spd(x: Tensor) -> Tensor:
    return x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype)


def _unsigned(*factors: Tensor) -> tuple[Tensor, ...]:
    """Singular and eigenvectors are unique up to sign: what is even in each column."""
    return tuple(f * f if f.ndim > 1 else f for f in factors)


Function = Callable[[Tensor], Any]
FUNCTIONS: dict[str, tuple[Function, Tensor]] = {
    "solve_ex": (lambda x: torch.linalg.solve_ex(x, x[0])[0], A),
    "solve_ex left": (lambda x: torch.linalg.solve_ex(x, B.mT, left=False)[0], A),
    "det": (torch.linalg.det, BATCH),
    "slogdet": (lambda x: torch.linalg.slogdet(x)[1], BATCH),
    "logdet": (lambda x: torch.logdet(_spd(x)), A),
    "cholesky": (lambda x: torch.linalg.cholesky(_spd(x)), BATCH),
    "cholesky upper": (lambda x: torch.linalg.cholesky(_spd(x), upper=True), A),
    "cholesky_ex": (lambda x: torch.linalg.cholesky_ex(_spd(x))[0], A),
    "torch.cholesky": (lambda x: aten.cholesky(_spd(x), True), A),
    "lu": (lambda x: torch.linalg.lu(x)[1:], BATCH),
    "lu tall": (lambda x: torch.linalg.lu(x)[1:], TALL),
    "lu wide": (lambda x: torch.linalg.lu(x)[1:], WIDE),
    "lu_factor tall": (lambda x: torch.linalg.lu_factor(x)[0], TALL),
    "lu_factor wide": (lambda x: torch.linalg.lu_factor(x)[0], WIDE),
    "lu_factor": (lambda x: torch.linalg.lu_factor(x)[0], BATCH),
    "lu_factor_ex": (lambda x: torch.linalg.lu_factor_ex(x)[0], A),
    "lu_unpack": (lambda x: torch.lu_unpack(*torch.linalg.lu_factor(x))[1:], A),
    "lu_solve": (lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), x[:, :2]), A),
    "lu_solve adjoint": (
        lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), B, adjoint=True),
        BATCH,
    ),
    "lu_solve right": (
        lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), B.mT, left=False),
        A,
    ),
    "eigh": (lambda x: _unsigned(*torch.linalg.eigh(_spd(x))), BATCH),
    "eigvalsh": (lambda x: torch.linalg.eigvalsh(_spd(x), UPLO="U"), A),
    "svd": (lambda x: _unsigned(*torch.linalg.svd(x)), A),
    "svd tall": (lambda x: _unsigned(*torch.linalg.svd(x, full_matrices=False)), TALL),
    "svd wide": (lambda x: _unsigned(*torch.linalg.svd(x, full_matrices=False)), WIDE),
    "svdvals": (torch.linalg.svdvals, WIDE),
    "nuclear norm": (lambda x: torch.linalg.matrix_norm(x, "nuc"), TALL),
    "qr": (torch.linalg.qr, BATCH),
    "qr tall": (torch.linalg.qr, TALL),
    "qr wide": (torch.linalg.qr, WIDE),
    "qr r": (lambda x: torch.linalg.qr(x, mode="r")[1], TALL),
    "matrix_power": (lambda x: torch.linalg.matrix_power(x, -3), A),
}

# Torch's own forward mode refuses these; the same function said otherwise.
STAND_INS: dict[str, Function] = {
    "torch.cholesky": lambda x: torch.linalg.cholesky(_spd(x), upper=True),
    "qr r": lambda x: torch.linalg.qr(x)[1],
}


@cache
def _captured(name: str) -> Program:
    function, x = FUNCTIONS[name]
    return capture(function, (x,), {})


@pytest.mark.parametrize(("op", "args", "kwargs"), INVERSES, ids=_name)
def test_inverses_and_solves(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), BY_DIFFERENCE, ids=_name)
def test_what_torch_lacks(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, oracle="difference", **kwargs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    """The first derivative against torch, the second against differences of the first."""
    function, x = FUNCTIONS[name]
    program, x_dot = _captured(name), _t(*x.shape, seed=9)
    constants = [program.constants[slot.name] for slot in program.inputs if slot.kind == "constant"]
    names = [slot.name for slot in program.inputs if slot.kind == "input"]
    first = as_primal(transform(program, names))
    second = transform(first, names)

    def tangents(of: Program, at: Tensor, *dots: Tensor) -> list[Tensor]:
        outs = run(of, *constants, at, *dots)
        kind = "tangent" if of is second else "output"
        named = zip(of.outputs, outs, strict=True)
        return [out for s, out in named if s.kind == kind and s.name.endswith("_dot")]

    _, expected = torch.func.jvp(STAND_INS.get(name, function), (x,), (x_dot,))
    expected = list(expected) if isinstance(expected, tuple) else [expected]
    mine = tangents(first, x, x_dot)
    torch.testing.assert_close(mine, expected, rtol=1e-8, atol=1e-8)

    step = 1e-5 * x_dot
    plus, minus = tangents(first, x + step, x_dot), tangents(first, x - step, x_dot)
    slopes = [(a - b) / 2e-5 for a, b in zip(plus, minus, strict=True)]
    twice = tangents(second, x, x_dot, x_dot)
    torch.testing.assert_close(twice, slopes, rtol=1e-4, atol=1e-5)


def test_a_determinant_of_a_singular_matrix_is_an_error() -> None:
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        fwdcompile.jvp(torch.linalg.det, (torch.zeros(2, 2),), (torch.ones(2, 2),))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.linalg.svd(x)[0], "full_matrices"),
        (lambda x: torch.linalg.qr(x, mode="complete")[0], "complete"),
    ],
)
def test_what_is_not_unique_is_refused(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(fwdcompile.RuleError, match=message):
        fwdcompile.jvp(function, (TALL,), (TALL,))


@pytest.mark.parametrize("function", [torch.linalg.eigh, torch.linalg.svd, torch.linalg.qr])
def test_complex_factorizations_are_refused(function: Callable[..., Any]) -> None:
    x = torch.complex(_spd(A), torch.zeros_like(A))
    with pytest.raises(fwdcompile.RuleError, match="real"):
        fwdcompile.jvp(function, (x,), (x,))


def test_the_tangent_has_its_primals_dtype() -> None:
    for function in (torch.linalg.inv, torch.linalg.cholesky, torch.logdet):
        x = _spd(A).float()
        _, x_dot = fwdcompile.jvp(function, (x,), (x,))
        assert x_dot.dtype == torch.float32


def test_every_row_has_a_sample() -> None:
    tested = {op for op, _, _ in INVERSES + BY_DIFFERENCE}
    for name in FUNCTIONS:
        tested |= {node.target for node in _captured(name).graph.nodes}
    rows = {op for op, row in table.items() if row.where.startswith("rules/factorization.py")}
    assert rows <= tested
