"""Rows of rules/complex.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import check, jvp_by_rule
from torch import Tensor

aten = torch.ops.aten


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y, COLUMN = _t(3, 4), _t(3, 4, seed=2), _t(3, 1, seed=5)
C, EMPTY = torch.complex(X, Y), _t(0, 4)

ROWS: list[tuple[Any, tuple[Any, ...]]] = [
    *((op.default, (x,)) for op in (aten.abs, aten.sgn, aten.angle) for x in (X, C, EMPTY)),
    (aten.view_as_real.default, (C,)),
    (aten.view_as_complex.default, (_t(3, 2),)),
    (aten._conj_physical.default, (C,)),
    (aten.complex.default, (X, Y)),
    (aten.complex.default, (X, COLUMN)),
    (aten.polar.default, (X.abs(), Y)),
    (aten.polar.default, (X.abs(), COLUMN)),
]


@pytest.mark.parametrize(("op", "args"), ROWS)
def test_row(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args)


def test_conj() -> None:
    _, (tangent,) = jvp_by_rule(aten._conj.default, (C,), {}, {0: C * 2j})
    assert tangent is not None
    torch.testing.assert_close(tangent.resolve_conj(), (C * 2j).conj().resolve_conj())


@pytest.mark.parametrize("op", [aten.abs.default, aten.sgn.default, aten.angle.default])
def test_kink_follows_torch(op: Any) -> None:
    check(op, torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64), second=False)
    check(op, torch.tensor([1j, 0, 2, -3], dtype=torch.complex128), second=False)
