"""Inverses and solutions of linear systems.

Rows are written from the equation that the output solves, so that every order of derivative is
right. Where torch reads one triangle of a symmetric matrix, its tangent is symmetric too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..rule import joint, jvp, linear, not_implemented, shapes
from .factorization import kept_lu

aten = torch.ops.aten
Call = Callable[..., Any]


# Inverses: from A inv(A) = 1.
def _inverse(d: Tensor, out: Tensor) -> Tensor:
    return -(out @ d @ out)


jvp(aten.linalg_inv.default, A=_inverse)
jvp(aten.linalg_inv_ex.default, A=lambda d, out: (_inverse(d, out[0]), None))


def _pinv(d: Tensor, self: Tensor, out: Tensor) -> Tensor:
    """For a matrix whose rank does not change nearby (Golub and Pereyra, 1973)."""
    seen = out @ out.mH @ d.mH
    grown = d.mH @ out.mH @ out
    return seen - seen @ self @ out + grown - out @ self @ grown - out @ d @ out


def _tensorinv(d: Tensor, ind: int, out: Tensor) -> Tensor:
    inverse = out.flatten(out.ndim - ind).flatten(0, -2)
    return _inverse(d.reshape(inverse.mT.shape), inverse).reshape(out.shape)


jvp(aten.linalg_tensorinv.default, self=_tensorinv)
# The tolerances choose a rank and have no derivative.
jvp(
    aten.linalg_pinv.atol_rtol_tensor,
    self=_pinv,
    atol=lambda d: None,
    rtol=lambda d: None,
)


# Solves: A X = B gives A X_dot = B_dot - A_dot X, one solve for both tangents.
def _residual(d: dict[str, Tensor], A: Tensor, B: Tensor, X: Tensor, left: bool) -> Tensor:
    """B_dot - A_dot X, or B_dot - X A_dot; X is a vector as B is one."""
    if "A" not in d:
        return d["B"]
    vector = B.ndim == 1 or (B.ndim == A.ndim - 1 and B.shape == A.shape[:-1])
    if vector:
        product = (d["A"] @ X.unsqueeze(-1)).squeeze(-1)
    else:
        product = d["A"] @ X if left else X @ d["A"]
    return d["B"] - product if "B" in d else -product


@joint(aten.linalg_solve.default, wrt=("A", "B"))
def _solve(d: dict[str, Tensor], A: Tensor, B: Tensor, left: bool, out: Tensor, call: Call) -> Any:
    return call(B=_residual(d, A, B, out, left))


@joint(aten._linalg_solve_ex.default, wrt=("A", "B"))
def _solve_ex(
    d: dict[str, Tensor],
    A: Tensor,
    B: Tensor,
    left: bool,
    out: tuple[Tensor, ...],
    call: Call,
) -> Any:
    LU = kept_lu(d["A"], out[1], out[2]) if "A" in d else None
    return call(B=_residual(d, A, B, out[0], left))[0], LU, None, None


@joint(aten.linalg_solve_triangular.default, wrt=("self", "B"))
def _solve_triangular(
    d: dict[str, Tensor],
    self: Tensor,
    B: Tensor,
    upper: bool,
    left: bool,
    unitriangular: bool,
    out: Tensor,
    call: Call,
) -> Any:
    dots = {"B": d["B"]} if "B" in d else {}
    if "self" in d:
        skipped = 1 if unitriangular else 0
        dots["A"] = d["self"].triu(skipped) if upper else d["self"].tril(-skipped)
    return call(B=_residual(dots, self, B, out, left))


@joint(aten.triangular_solve.default, wrt=("self", "A"))
def _old_triangular_solve(
    d: dict[str, Tensor],
    A: Tensor,
    upper: bool,
    transpose: bool,
    unitriangular: bool,
    out: tuple[Tensor, Tensor],
    call: Call,
) -> Any:
    dots = {"B": d["self"]} if "self" in d else {}
    if "A" in d:
        skipped = 1 if unitriangular else 0
        A_dot = d["A"].triu(skipped) if upper else d["A"].tril(-skipped)
        dots["A"] = A_dot.mT if transpose else A_dot
    return call(self=_residual(dots, A, out[0], out[0], True))[0], d.get("A")


@joint(aten.cholesky_solve.default, wrt=("self", "input2"))
def _cholesky_solve(
    d: dict[str, Tensor],
    self: Tensor,
    input2: Tensor,
    upper: bool,
    out: Tensor,
    call: Call,
) -> Any:
    dots = {"B": d["self"]} if "self" in d else {}
    if "input2" in d:
        dots["A"] = _gram_dot(d["input2"], input2, upper)
    return call(self=_residual(dots, out, out, out, True))


def _gram_dot(d: Tensor, factor: Tensor, upper: bool) -> Tensor:
    """The tangent of L L' or U' U, of which only the triangle of the factor counts."""
    half = d.triu().mH @ factor.triu() if upper else d.tril() @ factor.tril().mH
    return half + half.mH


jvp(
    aten.cholesky_inverse.default,
    self=lambda d, self, upper, out: _inverse(_gram_dot(d, self, upper), out),
)


@joint(aten.linalg_lu_solve.default, wrt=("LU", "B"))
def _lu_solve(
    d: dict[str, Tensor],
    LU: Tensor,
    pivots: Tensor,
    B: Tensor,
    left: bool,
    adjoint: bool,
    out: Tensor,
    call: Call,
) -> Any:
    dots = {"B": d["B"]} if "B" in d else {}
    if "LU" in d:
        P, L, U = torch.lu_unpack(LU, pivots)
        A_dot = P @ (d["LU"].tril(-1) @ U + L @ d["LU"].triu())
        dots["A"] = A_dot.mH if adjoint else A_dot
    return call(B=_residual(dots, out, out, out, left))


linear(aten.linalg_ldl_solve.default, wrt="B")
for _op in (aten.linalg_ldl_factor.default, aten.linalg_ldl_factor_ex.default):
    not_implemented(
        _op,
        "torch does not unpack its pivoted factors; use torch.linalg.lu_factor, or cholesky",
    )


# Least squares, of a matrix whose rank does not change nearby (Golub and Pereyra, 1973).
@joint(aten.linalg_lstsq.default, wrt=("self", "b"))
def _lstsq(
    d: dict[str, Tensor], self: Tensor, b: Tensor, rcond: float | None, out: tuple[Tensor, ...]
) -> Any:
    """X = pinv(A) B; the residuals, sums of squares of B - A X, do not see the tangent of X."""
    X, B, B_dot = (_matrix(x, self) for x in (out[0], b, d.get("b", torch.zeros_like(b))))
    inverse, error = torch.linalg.pinv(self, rtol=rcond), B - self @ X
    moved = B_dot - d["self"] @ X if "self" in d else B_dot
    X_dot, values_dot = inverse @ moved, None
    if "self" in d:
        across = d["self"].mH @ (inverse.mH @ X)
        turned = inverse @ (inverse.mH @ (d["self"].mH @ error))
        X_dot = X_dot + turned + across - inverse @ (self @ across)
        values_dot = _singular_dot(d["self"], self) if out[3].numel() else None
    squares_dot = 2 * (error.conj() * moved).real.sum(-2) if out[1].numel() else None
    return X_dot.reshape(out[0].shape), squares_dot, None, values_dot


def _matrix(x: Tensor, A: Tensor) -> Tensor:
    """A vector, or a batch of them, as matrices of one column."""
    return x.unsqueeze(-1) if x.ndim < A.ndim else x


def _singular_dot(d: Tensor, A: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    values_dot: Tensor = (U.mH @ d @ Vh.mH).diagonal(dim1=-2, dim2=-1)
    return values_dot.real


def _lstsq_shapes(
    self: Tensor, b: Tensor, rcond: float | None = None, *, driver: str | None = None
) -> tuple[Tensor, ...]:
    """Those of a matrix of full rank; of a lesser one torch returns no residuals."""
    driver = driver or ("gelsy" if self.device.type == "cpu" else "gels")
    *batch, rows, columns = self.shape
    kinds = b.shape[len(batch) + 1 :]
    tall, by_values = rows > columns and driver != "gelsy", driver in ("gelsd", "gelss")
    real = self.dtype.to_real()
    return (
        b.new_empty([*batch, columns, *kinds]),
        b.new_empty([*batch, *(kinds or [1])] if tall else [0], dtype=real),
        b.new_empty([0] if driver == "gels" else batch, dtype=torch.int64),
        b.new_empty([*batch, min(rows, columns)] if by_values else [0], dtype=real),
    )


shapes[aten.linalg_lstsq.default] = _lstsq_shapes
