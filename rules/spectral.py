"""Eigenvalues and singular values, where they are distinct.

Their vectors are unique up to a sign or a phase, which does not move with the matrix; the further
vectors of a full svd are unique up to a turn among themselves, and do not turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..rule import jvp

aten = torch.ops.aten
Call = Callable[..., Any]


def _over_gaps(x: Tensor, values: Tensor) -> Tensor:
    """x[i, j] / (values[j] - values[i]), and zero on the diagonal."""
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1) + torch.ones_like(values).diag_embed()
    return (x.tril(-1) + x.triu(1)) / gaps


def _diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1)


def _eigh(d: Tensor, compute_v: bool, out: tuple[Tensor, Tensor], call: Call) -> Any:
    values, vectors = out if compute_v else call(compute_v=True)
    middle = vectors.mH @ d @ vectors
    vectors_dot = vectors @ _over_gaps(middle, values) if compute_v else None
    return _diagonal(middle).real, vectors_dot


jvp(aten._linalg_eigh.default, A=_eigh)


def _eig(d: Tensor, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """As torch: a vector keeps its length of one, and its phase is that of the formula."""
    values, vectors = out
    middle = torch.linalg.solve(vectors, d.to(vectors.dtype) @ vectors)
    moved = vectors @ _over_gaps(middle, values)
    along = (vectors.conj() * moved).sum(-2, keepdim=True).real
    return _diagonal(middle), moved - vectors * along


jvp(aten.linalg_eig.default, self=_eig)


def _svd(
    d: Tensor,
    full_matrices: bool,
    compute_uv: bool,
    out: tuple[Tensor, Tensor, Tensor],
    call: Call,
) -> Any:
    """Of A = U S V': U' A_dot V = (U' U_dot) S + S_dot + S (V_dot' V), with skew outer factors."""
    left, S, right = out if compute_uv else call(full_matrices=False, compute_uv=True)
    size = S.shape[-1]
    U, V = left[..., :size], right.mH[..., :size]
    middle = U.mH @ d @ V
    S_dot = _diagonal(middle).real
    if not compute_uv:
        return None, S_dot, None
    scaled, crossed = middle * S.unsqueeze(-2), middle * S.unsqueeze(-1)
    U_dot = U @ _over_gaps(scaled + scaled.mH, S * S)
    V_dot = V @ _over_gaps(crossed + crossed.mH, S * S)
    if d.is_complex():
        turn = (_diagonal(middle).imag * 0.5j / S).unsqueeze(-2)
        U_dot, V_dot = U_dot + U * turn, V_dot - V * turn
    if d.shape[-2] > size:
        U_dot = U_dot + (d @ V - U @ middle) / S.unsqueeze(-2)
    if d.shape[-1] > size:
        V_dot = V_dot + (d.mH @ U - V @ middle.mH) / S.unsqueeze(-2)
    if full_matrices:
        U_dot, V_dot = _completed(U_dot, left), _completed(V_dot, right.mH)
    return U_dot, S_dot, V_dot.mH


def _completed(d: Tensor, basis: Tensor) -> Tensor:
    """Adds the tangents of the columns that complete a basis: they stay orthogonal to the first."""
    first, others = basis[..., : d.shape[-1]], basis[..., d.shape[-1] :]
    return torch.cat([d, -first @ (d.mH @ others)], -1) if others.shape[-1] else d


jvp(aten._linalg_svd.default, A=_svd)
