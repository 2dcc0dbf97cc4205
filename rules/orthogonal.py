"""QR and Householder reflections.

A product of reflections is 1 - V W, where the columns of V are the vectors and W solves
(1 + triu(G V, 1)) W = G for G = diag(tau) V' (Puglisi, 1992).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..rule import jvp
from .factorization import lu_dot, packed

aten = torch.ops.aten
Call = Callable[..., Any]


def _vectors(input: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V, G and W."""
    rows, size = input.shape[-2], tau.shape[-1]
    ones = torch.eye(rows, size, dtype=input.dtype, device=input.device)
    V = input[..., :size].tril(-1) + ones
    G = tau.unsqueeze(-1) * V.mH
    return V, G, _solve(G @ V, G)


def _solve(A: Tensor, B: Tensor) -> Tensor:
    X: Tensor = torch.linalg.solve_triangular(A, B, upper=True, unitriangular=True)
    return X


def _turn(
    x: Tensor, input: Tensor, tau: Tensor, adjoint: bool, V_dot: Any = None, tau_dot: Any = None
) -> Tensor:
    """The tangent of (1 - V W) x, or of its adjoint times x, by that of V or of tau."""
    V, G, W = _vectors(input, tau)
    if V_dot is None:
        G_dot = tau_dot.unsqueeze(-1) * V.mH
        moved = G_dot @ V
    else:
        G_dot = tau.unsqueeze(-1) * V_dot.mH
        moved = G_dot @ V + G @ V_dot
    W_dot = _solve(G @ V, G_dot - moved.triu(1) @ W)
    turned = _product(V, W_dot, x, adjoint)
    return -turned if V_dot is None else -turned - _product(V_dot, W, x, adjoint)


def _product(A: Tensor, B: Tensor, x: Tensor, adjoint: bool) -> Tensor:
    return B.mH @ (A.mH @ x) if adjoint else A @ (B @ x)


def _strict(d: Tensor, tau: Tensor) -> Tensor:
    """The tangent of V: what lies below the diagonal."""
    return d[..., : tau.shape[-1]].tril(-1)


def _columns(input: Tensor) -> Tensor:
    return torch.eye(*input.shape[-2:], dtype=input.dtype, device=input.device)


jvp(
    aten.linalg_householder_product.default,
    input=lambda d, input, tau: _turn(_columns(input), input, tau, False, V_dot=_strict(d, tau)),
    tau=lambda d, input, tau: _turn(_columns(input), input, tau, False, tau_dot=d),
)


def _ormqr(
    self: Tensor, input2: Tensor, input3: Tensor, left: bool, transpose: bool, **dots: Tensor
) -> Tensor:
    """X Q is the adjoint of Q' X'."""
    if left:
        return _turn(input3, self, input2, transpose, **dots)
    return _turn(input3.mH, self, input2, not transpose, **dots).mH


jvp(
    aten.ormqr.default,
    self=lambda d, self, input2, input3, left, transpose: _ormqr(
        self, input2, input3, left, transpose, V_dot=_strict(d, input2)
    ),
    input2=lambda d, self, input2, input3, left, transpose: _ormqr(
        self, input2, input3, left, transpose, tau_dot=d
    ),
    input3=lambda d, call: call(input3=d),
)


# QR: Q' Q_dot is skew and R_dot upper with a real diagonal, so Q' A_dot inv(R) tells both.
def _qr_dot(d: Tensor, Q: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    size = min(d.shape[-2:])
    ratio = torch.linalg.solve_triangular(R[..., :size], d[..., :size], upper=True, left=False)
    turned = Q.mH @ ratio
    skew = turned.tril(-1) - turned.tril(-1).mH
    if d.is_complex():
        skew = skew + (turned.diagonal(dim1=-2, dim2=-1).imag * 1j).diag_embed()
    return ratio - Q @ (turned - skew), (Q.mH @ d - skew @ R).triu()


def _qr(d: Tensor, A: Tensor, mode: str, out: tuple[Tensor, Tensor], call: Call) -> Any:
    if mode == "complete" and d.shape[-2] > d.shape[-1]:
        return _complete_qr(d, A)
    Q, R = out if mode != "r" else call(mode="reduced")
    Q_dot, R_dot = _qr_dot(d, Q, R)
    return Q_dot if mode != "r" else None, R_dot


def _complete_qr(d: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that complete Q move as the reflections that LAPACK makes them of."""
    a, tau = torch.geqrf(A)
    a_dot, tau_dot = _geqrf(d, (a, tau))
    whole = torch.eye(d.shape[-2], dtype=d.dtype, device=d.device)
    by_V = _turn(whole, a, tau, False, V_dot=_strict(a_dot, tau))
    return by_V + _turn(whole, a, tau, False, tau_dot=tau_dot), a_dot.triu()


def _geqrf(d: Tensor, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """1 - Q = V W is an LU factorization, with tau on the diagonal of W (Ballard et al., 2014)."""
    a, tau = out
    size = tau.shape[-1]
    Q_dot, R_dot = _qr_dot(
        d, torch.linalg.householder_product(a[..., :size], tau), a[..., :size, :].triu()
    )
    V, _, W = _vectors(a, tau)
    # The last reflection of a real matrix that is not tall is none: its tau stays zero.
    count = size if d.shape[-2] > size or d.is_complex() else size - 1
    V_dot, W_dot = lu_dot(-Q_dot[..., :count], V[..., :count], W[..., :count, :count])
    tau_dot = W_dot.diagonal(dim1=-2, dim2=-1)
    return packed(V_dot, R_dot), aten.constant_pad_nd(tau_dot, [0, size - count])


jvp(aten.geqrf.default, self=_geqrf)
jvp(aten.linalg_qr.default, A=_qr)
