"""Inverses, solves, determinants and matrix factorizations.

Rows are written from A = (product of the factors), so that every order of derivative is right.
Where torch reads one triangle of a symmetric matrix, its tangent is taken to be symmetric too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import RuleError
from ..rule import joint, jvp

aten = torch.ops.aten
Call = Callable[..., Any]


def _real(x: Tensor) -> None:
    if x.is_complex():
        raise RuleError("this factorization has a row for real matrices alone")


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
    return call(B=_residual(d, A, B, out[0], left))[0], None, None, None


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


# Determinants, of regular matrices: det_dot = det * trace(inv(A) A_dot).
def _log_det(d: Tensor, A: Tensor) -> Tensor:
    ratio: Tensor = torch.linalg.solve(A, d)
    return ratio.diagonal(dim1=-2, dim2=-1).sum(-1)


def _slogdet(d: Tensor, A: Tensor) -> Any:
    _real(A)
    return None, _log_det(d, A), None, None


jvp(aten._linalg_det.default, A=lambda d, A, out: (out[0] * _log_det(d, A), None, None))
jvp(aten._linalg_slogdet.default, A=_slogdet)


# Cholesky: L_dot = L F where F, lower, has F + F' = inv(L) A_dot inv(L').
def _cholesky(d: Tensor, upper: bool, out: Tensor) -> Tensor:
    lower = out.mH if upper else out
    middle: Tensor = torch.linalg.solve_triangular(lower, d, upper=False)
    middle = torch.linalg.solve_triangular(lower.mH, middle, upper=True, left=False)
    half = lower @ ((middle.tril() + middle.tril(-1)) / 2)
    return half.mH if upper else half


jvp(aten.linalg_cholesky.default, self=_cholesky)
jvp(aten.cholesky.default, self=_cholesky)
jvp(
    aten.linalg_cholesky_ex.default,
    self=lambda d, upper, out: (_cholesky(d, upper, out[0]), None),
)


# LU: A = P L U; inv(L) P' A_dot inv(U) = inv(L) L_dot + U_dot inv(U) splits into its triangles.
def _lu(d: Tensor, pivot: bool, P: Tensor, L: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    size = L.shape[-1]
    rows = P.mT @ d if pivot else d
    square, solve = L[..., :size, :], torch.linalg.solve_triangular
    by_U = solve(U[..., :size], rows[..., :size], upper=True, left=False)
    by_L = solve(square, rows[..., :size, :], upper=False, unitriangular=True)
    middle = solve(square, by_U[..., :size, :], upper=False, unitriangular=True)
    L_dot = (by_U - L @ middle.triu()).tril(-1)
    return L_dot, (by_L - middle.tril(-1) @ U).triu()


def _lu_packed(d: Tensor, pivot: bool, out: tuple[Tensor, ...]) -> Any:
    L_dot, U_dot = _lu(d, pivot, *torch.lu_unpack(out[0], out[1]))
    rows, columns = d.shape[-2:]
    size = min(rows, columns)
    wide = aten.constant_pad_nd(L_dot, [0, columns - size])
    tall = aten.constant_pad_nd(U_dot, [0, 0, 0, rows - size])
    return (wide + tall, *[None] * (len(out) - 1))


jvp(aten.linalg_lu.default, A=lambda d, pivot, out: (None, *_lu(d, pivot, *out)))
jvp(aten.linalg_lu_factor.default, A=_lu_packed)
jvp(aten.linalg_lu_factor_ex.default, A=_lu_packed)


def _lu_unpack(d: Tensor, unpack_data: bool) -> Any:
    if not unpack_data:
        return None
    rows, columns = d.shape[-2:]
    return None, d[..., : min(rows, columns)].tril(-1), d[..., : min(rows, columns), :].triu()


jvp(aten.lu_unpack.default, LU_data=_lu_unpack)


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


# Exponential: exp([[A, A_dot], [0, A]]) has the tangent in its upper right block.
def _matrix_exp(d: Tensor, self: Tensor, call: Call) -> Tensor:
    size = d.shape[-1]
    above, below = torch.cat([self, d], -1), torch.cat([torch.zeros_like(self), self], -1)
    block: Tensor = call(self=torch.cat([above, below], -2))
    return block[..., :size, size:]


jvp(aten.linalg_matrix_exp.default, self=_matrix_exp)


# Spectral: with distinct eigenvalues; each column's phase is the one that moves least.
def _over_gaps(x: Tensor, values: Tensor) -> Tensor:
    """x[i, j] / (values[j] - values[i]), and zero on the diagonal."""
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1) + torch.ones_like(values).diag_embed()
    return (x.tril(-1) + x.triu(1)) / gaps


def _eigh(d: Tensor, compute_v: bool, out: tuple[Tensor, Tensor], call: Call) -> Any:
    values, vectors = out if compute_v else call(compute_v=True)
    _real(vectors)
    middle = vectors.mT @ d @ vectors
    values_dot = middle.diagonal(dim1=-2, dim2=-1)
    return values_dot, vectors @ _over_gaps(middle, values) if compute_v else None


jvp(aten._linalg_eigh.default, A=_eigh)


def _svd(
    d: Tensor,
    full_matrices: bool,
    compute_uv: bool,
    out: tuple[Tensor, Tensor, Tensor],
    call: Call,
) -> Any:
    _real(d)
    if full_matrices and compute_uv and d.shape[-1] != d.shape[-2]:
        raise RuleError("the full svd of a rectangular matrix is not unique; full_matrices=False")
    U, S, Vh = out if compute_uv else call(full_matrices=False, compute_uv=True)
    middle = U.mT @ d @ Vh.mT
    S_dot = middle.diagonal(dim1=-2, dim2=-1)
    if not compute_uv:
        return None, S_dot, None
    scaled = middle * S.unsqueeze(-2)
    crossed = middle * S.unsqueeze(-1)
    U_dot = U @ _over_gaps(scaled + scaled.mT, S * S)
    V_dot = Vh.mT @ _over_gaps(crossed + crossed.mT, S * S)
    if d.shape[-2] > S.shape[-1]:
        U_dot = U_dot + (d @ Vh.mT - U @ middle) / S.unsqueeze(-2)
    if d.shape[-1] > S.shape[-1]:
        V_dot = V_dot + (d.mT @ U - Vh.mT @ middle.mT) / S.unsqueeze(-2)
    return U_dot, S_dot, V_dot.mT


jvp(aten._linalg_svd.default, A=_svd)


# QR: Q' Q_dot is skew and R_dot upper, so the lower part of Q' A_dot inv(R) tells Q' Q_dot.
def _qr(d: Tensor, mode: str, out: tuple[Tensor, Tensor], call: Call) -> Any:
    _real(d)
    if mode == "complete" and d.shape[-2] > d.shape[-1]:
        raise RuleError("the complete qr of a tall matrix is not unique; use mode='reduced'")
    Q, R = out if mode != "r" else call(mode="reduced")
    size = min(d.shape[-2:])
    ratio = torch.linalg.solve_triangular(R[..., :size], d[..., :size], upper=True, left=False)
    turned = Q.mT @ ratio
    skew = turned.tril(-1) - turned.tril(-1).mT
    Q_dot = ratio - Q @ (turned - skew)
    R_dot = (Q.mT @ d - skew @ R).triu()
    return Q_dot if mode != "r" else None, R_dot


jvp(aten.linalg_qr.default, A=_qr)
