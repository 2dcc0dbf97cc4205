"""Products with an axis of directions, as equations and in numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from batches import MAKERS, Maker, check
from torch import Tensor

import fwdcompile

F64 = torch.float64
A, B = torch.randn(2, 3, 4, dtype=F64), torch.randn(2, 4, 5, dtype=F64)
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mm": lambda a, b: torch.mm(a[0], b[0]),
    "bmm": torch.bmm,
    "matmul": torch.matmul,
    "broadcast": lambda a, b: a[:, None] @ b,
    "weight": lambda a, b: a @ b[0],
    "weighed": lambda a, b: a[0] @ b,
    "vectors": lambda a, b: a[0] @ b[0, :, 0],
    "linear of a vector": lambda a, b: torch.nn.functional.linear(a, b[0, :, 0]),
    "linear": lambda a, b: torch.nn.functional.linear(a, b[0].T, b[0, 0]),
    "einsum": lambda a, b: torch.einsum("b z k,...kc->b...zc", a, b),
    "implicit": lambda a, b: torch.einsum("bik,bkc", a, b),
    "three": lambda a, b: torch.einsum("bik,bkc,bkc->ic", a, b, b),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("moving", ["a", "b", "ab"])
def test_products(maker: Maker, name: str, moving: str) -> None:
    shapes = {"a": A.shape, "b": B.shape}
    dots = {x: torch.randn(3, *shapes[x], dtype=F64) for x in moving}
    product = PRODUCTS[name]
    check(maker, lambda a, b: product(a, b).sin(), (A, B), dots)
    check(maker, lambda a, b: product(a.sin(), b.exp()), (A, B), dots)


def equations(maker: Maker, model: Callable[..., Tensor], *names: str) -> str:
    fwd = maker(model, batched=True)
    tangents = [names] if maker is fwdcompile.laplacian else names
    return fwd.lower(A, B, tangents=tangents, directions=3).code


def test_directions_become_rows() -> None:
    text = equations(fwdcompile.transform, lambda a, b: torch.bmm(a, b), "a", "b")
    assert '"zbij,bjk->zbik"' in text and '"bij,zbjk->zbik"' in text


def test_a_sum_over_directions_is_contracted() -> None:
    text = equations(fwdcompile.laplacian, lambda a, b: a @ b, "a", "b")
    assert '"z...ij,z...jk->...ik"' in text and "aten.sum" not in text


def test_products_of_a_weight_stay_as_they_are() -> None:
    text = equations(fwdcompile.transform, lambda a, b: a @ b[0], "a")
    assert "einsum" not in text and "a_dot @" in text
