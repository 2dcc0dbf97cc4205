"""Rows of rules/spectral.py."""

from __future__ import annotations

import pytest
import torch
from functions import Function, check_function, normal
from torch import Tensor

A, BATCH = normal(3, 3), normal(2, 3, 3, seed=2)
TALL, WIDE = normal(4, 3, seed=3), normal(2, 3, 4, seed=4)
COMPLEX = normal(2, 3, 3, seed=5, dtype=torch.complex128)
COMPLEX_TALL = normal(4, 3, seed=6, dtype=torch.complex128)


def _hermitian(x: Tensor) -> Tensor:
    return x + x.mH


def _unsigned(*factors: Tensor) -> tuple[Tensor, ...]:
    """Vectors are unique up to a sign or phase: what does not see it."""
    return tuple((f * f.conj()).real if f.ndim > 1 else f for f in factors)


FUNCTIONS: dict[str, tuple[Function, Tensor]] = {
    "eigh": (lambda x: torch.linalg.eigh(_hermitian(x)), BATCH),
    "eigvalsh": (lambda x: torch.linalg.eigvalsh(_hermitian(x), UPLO="U"), A),
    "eigvals": (torch.linalg.eigvals, A),
    "svd": (torch.linalg.svd, A),
    "svd tall": (lambda x: torch.linalg.svd(x, full_matrices=False), TALL),
    "svd wide": (lambda x: torch.linalg.svd(x, full_matrices=False), WIDE),
    "svdvals": (torch.linalg.svdvals, WIDE),
    "nuclear norm": (lambda x: torch.linalg.matrix_norm(x, "nuc"), TALL),
    "complex nuclear norm": (lambda x: torch.linalg.matrix_norm(x, "nuc"), COMPLEX),
    "cond": (lambda x: torch.linalg.cond(x, 2), COMPLEX),
}


# Their phase is LAPACK's choice: the second derivative is that of what does not see it.
PHASED: dict[str, tuple[Function, Tensor]] = {
    "eigh complex": (lambda x: torch.linalg.eigh(_hermitian(x)), COMPLEX),
    "eig": (torch.linalg.eig, BATCH),
    "eig complex": (torch.linalg.eig, COMPLEX),
    "svd complex": (torch.linalg.svd, COMPLEX),
    "svd complex tall": (lambda x: torch.linalg.svd(x, full_matrices=False), COMPLEX_TALL),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    function, x = FUNCTIONS[name]
    check_function(function, x)


@pytest.mark.parametrize("name", PHASED)
def test_vectors_with_a_phase(name: str) -> None:
    function, x = PHASED[name]
    check_function(function, x, second=False)
    check_function(lambda y: _unsigned(*function(y)), x)


@pytest.mark.parametrize("x", [A, BATCH, COMPLEX])
def test_eigenvalues_by_differences(x: Tensor) -> None:
    check_function(torch.linalg.eigvals, x, oracle="difference", second=False)
    check_function(
        lambda y: _unsigned(*torch.linalg.eigh(_hermitian(y))), x, oracle="difference", second=False
    )


@pytest.mark.parametrize("x", [TALL, WIDE, COMPLEX_TALL, COMPLEX_TALL.mH])
def test_the_null_space_of_a_full_svd_moves(x: Tensor) -> None:
    """Its basis is free, its projector is not."""

    def projectors(y: Tensor) -> tuple[Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(y)
        left, right = U[..., S.shape[-1] :], Vh[..., S.shape[-1] :, :]
        return left @ left.mH, right.mH @ right

    check_function(projectors, x, oracle="difference")
