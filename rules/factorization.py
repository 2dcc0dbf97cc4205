"""Determinants, the exponential, and the triangular factorizations: Cholesky and LU.

Rows are written from A = (product of the factors), so that every order of derivative is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..rule import jvp

aten = torch.ops.aten
Call = Callable[..., Any]


# Determinants, of regular matrices: det_dot = det * trace(inv(A) A_dot).
def _log_det(d: Tensor, A: Tensor) -> Tensor:
    ratio: Tensor = torch.linalg.solve(A, d)
    return ratio.diagonal(dim1=-2, dim2=-1).sum(-1)


def _slogdet(d: Tensor, A: Tensor, out: tuple[Tensor, ...]) -> Any:
    """The logarithm moves by its real part, the phase turns by its imaginary one."""
    ratio = _log_det(d, A)
    turn = out[0] * ratio.imag * 1j if A.is_complex() else None
    return turn, ratio.real, kept_lu(_in_rows(d, A), out[2], out[3]), None


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
def lu_dot(rows: Tensor, L: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """The tangents of L and U, for `rows` the tangent of L U."""
    size = L.shape[-1]
    square, solve = L[..., :size, :], torch.linalg.solve_triangular
    by_U = solve(U[..., :size], rows[..., :size], upper=True, left=False)
    by_L = solve(square, rows[..., :size, :], upper=False, unitriangular=True)
    middle = solve(square, by_U[..., :size, :], upper=False, unitriangular=True)
    L_dot = (by_U - L @ middle.triu()).tril(-1)
    return L_dot, (by_L - middle.tril(-1) @ U).triu()


def packed(L: Tensor, U: Tensor) -> Tensor:
    """A strictly lower and an upper trapezoid in one matrix."""
    wide: Tensor = aten.constant_pad_nd(L, [0, U.shape[-1] - L.shape[-1]])
    tall: Tensor = aten.constant_pad_nd(U, [0, 0, 0, L.shape[-2] - U.shape[-2]])
    return wide + tall


def _lu(d: Tensor, pivot: bool, P: Tensor, L: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    return lu_dot(P.mT @ d if pivot else d, L, U)


def kept_lu(d: Tensor, LU: Tensor, pivots: Tensor, pivot: bool = True) -> Tensor:
    """The tangent of an LU in one matrix, asked for or returned beside what is."""
    return packed(*_lu(d, pivot, *torch.lu_unpack(LU, pivots)))


def _in_rows(d: Tensor, A: Tensor) -> Tensor:
    """Determinants keep the LU of A', where A is real and in rows."""
    return d.mT if A.is_contiguous() and not A.is_complex() else d


jvp(
    aten._linalg_det.default,
    A=lambda d, A, out: (out[0] * _log_det(d, A), kept_lu(_in_rows(d, A), out[1], out[2]), None),
)
jvp(aten._linalg_slogdet.default, A=_slogdet)


def _lu_packed(d: Tensor, pivot: bool, out: tuple[Tensor, ...]) -> Any:
    return (kept_lu(d, out[0], out[1], pivot), *[None] * (len(out) - 1))


jvp(aten.linalg_lu.default, A=lambda d, pivot, out: (None, *_lu(d, pivot, *out)))
jvp(aten.linalg_lu_factor.default, A=_lu_packed)
jvp(aten.linalg_lu_factor_ex.default, A=_lu_packed)


def _lu_unpack(d: Tensor, unpack_data: bool) -> Any:
    if not unpack_data:
        return None
    rows, columns = d.shape[-2:]
    return None, d[..., : min(rows, columns)].tril(-1), d[..., : min(rows, columns), :].triu()


jvp(aten.lu_unpack.default, LU_data=_lu_unpack)


# Exponential: exp([[A, A_dot], [0, A]]) has the tangent in its upper right block.
def _matrix_exp(d: Tensor, self: Tensor, call: Call) -> Tensor:
    size = d.shape[-1]
    above, below = torch.cat([self, d], -1), torch.cat([torch.zeros_like(self), self], -1)
    block: Tensor = call(self=torch.cat([above, below], -2))
    return block[..., :size, size:]


jvp(aten.linalg_matrix_exp.default, self=_matrix_exp)
