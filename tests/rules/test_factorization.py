"""Rows of rules/factorization.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from check import check
from functions import Function, check_function, normal
from torch import Tensor

import fwdcompile
from fwdcompile.rule import table

aten = torch.ops.aten

A = normal(3, 3) + 2 * torch.eye(3, dtype=torch.float64)
BATCH = normal(2, 3, 3, seed=2) + 2 * torch.eye(3, dtype=torch.float64)
TALL, WIDE = normal(4, 3, seed=3), normal(3, 4, seed=4)
COMPLEX = normal(2, 3, 3, seed=8, dtype=torch.complex128)


def _spd(x: Tensor) -> Tensor:
    return x @ x.mH + torch.eye(x.shape[-1], dtype=x.dtype)


FUNCTIONS: dict[str, tuple[Function, Tensor]] = {
    "det": (torch.linalg.det, BATCH),
    "det complex": (torch.linalg.det, COMPLEX),
    "slogdet": (lambda x: torch.linalg.slogdet(x)[1], BATCH),
    "slogdet complex": (torch.linalg.slogdet, COMPLEX),
    "logdet": (lambda x: torch.logdet(_spd(x)), A),
    "cholesky": (lambda x: torch.linalg.cholesky(_spd(x)), BATCH),
    "cholesky complex": (lambda x: torch.linalg.cholesky(_spd(x), upper=True), COMPLEX),
    "cholesky upper": (lambda x: torch.linalg.cholesky(_spd(x), upper=True), A),
    "cholesky_ex": (lambda x: torch.linalg.cholesky_ex(_spd(x))[0], A),
    "torch.cholesky": (lambda x: aten.cholesky(_spd(x), True), A),
    "lu": (lambda x: torch.linalg.lu(x)[1:], BATCH),
    "lu complex": (lambda x: torch.linalg.lu(x)[1:], COMPLEX),
    "lu tall": (lambda x: torch.linalg.lu(x)[1:], TALL),
    "lu wide": (lambda x: torch.linalg.lu(x)[1:], WIDE),
    "lu_factor tall": (lambda x: torch.linalg.lu_factor(x)[0], TALL),
    "lu_factor wide": (lambda x: torch.linalg.lu_factor(x)[0], WIDE),
    "lu_factor": (lambda x: torch.linalg.lu_factor(x)[0], BATCH),
    "lu_factor_ex": (lambda x: torch.linalg.lu_factor_ex(x)[0], A),
    "lu_unpack": (lambda x: torch.lu_unpack(*torch.linalg.lu_factor(x))[1:], A),
    "matrix_power": (lambda x: torch.linalg.matrix_power(x, -3), A),
}

# Torch's own forward mode refuses these; the same function said otherwise.
STAND_INS: dict[str, Function] = {
    "torch.cholesky": lambda x: torch.linalg.cholesky(_spd(x), upper=True),
}


@cache
def _checked(name: str) -> set[Any]:
    function, x = FUNCTIONS[name]
    return check_function(function, x, same=STAND_INS.get(name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    _checked(name)


@pytest.mark.parametrize("x", [A / 3, BATCH / 3, COMPLEX / 3])
def test_matrix_exp(x: Tensor) -> None:
    check(aten.linalg_matrix_exp.default, x)


def test_a_determinant_of_a_singular_matrix_is_an_error() -> None:
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        fwdcompile.jvp(torch.linalg.det, (torch.zeros(2, 2),), (torch.ones(2, 2),))


def test_the_tangent_has_its_primals_dtype() -> None:
    for function in (torch.linalg.inv, torch.linalg.cholesky, torch.logdet):
        x = _spd(A).float()
        _, x_dot = fwdcompile.jvp(function, (x,), (x,))
        assert x_dot.dtype == torch.float32


def test_functions_reach_every_row() -> None:
    tested = {aten.linalg_matrix_exp.default}.union(*map(_checked, FUNCTIONS))
    rows = {op for op, row in table.items() if row.where.startswith("rules/factorization.py")}
    assert rows <= tested


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("function", ["det", "slogdet", "solve"])
def test_what_reads_the_kept_lu_has_its_tangent(function: str, layout: str) -> None:
    of = {
        "det": lambda x: torch.linalg.det(x),
        "slogdet": lambda x: torch.linalg.slogdet(x)[1],
        "solve": lambda x: torch.linalg.solve(x, x[..., 0] * 2 + 1).sum(-1),
    }[function]
    x = BATCH.mT.contiguous().mT if layout == "columns" else BATCH
    dot, step = normal(*x.shape, seed=9), 1e-5

    def gradient(x: Tensor) -> Tensor:
        y, vjp = torch.func.vjp(of, x)
        return vjp(torch.ones_like(y))[0]

    with torch.no_grad():  # torch's formulas then reuse the LU
        found = fwdcompile.jvp(gradient, (x,), (dot,))
        difference = (gradient(x + step * dot) - gradient(x - step * dot)) / (2 * step)
    torch.testing.assert_close(found, (gradient(x), difference), rtol=1e-6, atol=1e-7)
