"""Rows of rules/segment.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import check, jvp_by_rule
from functions import normal

aten = torch.ops.aten

# The second has no element: without an initial value it is infinite or no number.
LENGTHS = torch.tensor([2, 0, 3, 1])
OFFSETS = torch.tensor([0, 2, 2, 5, 6])
FULL = torch.tensor([2, 3, 1])
DATA = normal(6, 2)
# Two zeros in one segment: the second derivative is not zero.
ZEROS = DATA * torch.tensor([1, 0, 0, 0, 1, 1]).unsqueeze(-1)
REDUCTIONS = ["sum", "mean", "max", "min", "prod"]
KINDS: list[dict[str, Any]] = [
    {"lengths": FULL},
    {"offsets": torch.tensor([0, 2, 5, 6])},
    {"offsets": OFFSETS, "initial": -1},
    {"lengths": LENGTHS, "initial": 2},
    {"lengths": LENGTHS, "initial": 0.1, "unsafe": True},
]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_segments(reduce: str, kind: dict[str, Any]) -> None:
    check(aten.segment_reduce.default, DATA, reduce, wrt=(0,), oracle="difference", **kind)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("ends", [{"lengths": LENGTHS}, {"offsets": OFFSETS}])
def test_each_row_has_its_own_segments(reduce: str, ends: dict[str, Any]) -> None:
    key, first = next(iter(ends.items()))
    other = torch.tensor([1, 1, 4, 0]) if key == "lengths" else torch.tensor([0, 1, 2, 6, 6])
    kwargs: dict[str, Any] = {key: torch.stack([first, other]), "axis": 1, "initial": 0.5}
    for data in (normal(2, 6), normal(2, 6, 3)):
        check(aten.segment_reduce.default, data, reduce, wrt=(0,), oracle="difference", **kwargs)


def test_products_with_zeros() -> None:
    for ends in ({"lengths": LENGTHS}, {"offsets": OFFSETS}):
        check(aten.segment_reduce.default, ZEROS, "prod", wrt=(0,), oracle="difference", **ends)


@pytest.mark.parametrize("reduce", ["max", "min"])
def test_ties_share_evenly(reduce: str) -> None:
    data = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    dot = torch.tensor([3.0, 5.0, 7.0, 11.0], dtype=torch.float64)
    lengths = torch.tensor([2, 0, 2])
    kwargs = {"lengths": lengths, "initial": 1.0 if reduce == "max" else 2.0}
    _, (out_dot,) = jvp_by_rule(aten.segment_reduce.default, (data, reduce), kwargs, {0: dot})
    assert out_dot is not None
    last = 11.0 if reduce == "max" else 7.0
    torch.testing.assert_close(out_dot, torch.tensor([4.0, 0, last], dtype=torch.float64))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_segments_without_elements(reduce: str) -> None:
    """Their values do not depend on the data."""
    _, (out_dot,) = jvp_by_rule(
        aten.segment_reduce.default, (DATA, reduce), {"lengths": LENGTHS}, {0: DATA}
    )
    assert out_dot is not None
    assert not out_dot[1].any()
    empty, lengths = torch.zeros(0, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    _, (out_dot,) = jvp_by_rule(
        aten.segment_reduce.default, (empty, reduce), {"lengths": lengths, "initial": 1}, {0: empty}
    )
    assert out_dot is None or not out_dot.any()


X, Y = normal(3, 4), normal(3, 4, seed=2)
ROWS, COLUMNS = torch.tensor([2, 0, 2]), torch.tensor([[0, 1, 1, 3], [2, 0, 2, 1], [1, 1, 0, 0]])
# Two zeros go to one place, one to another, and one place has a zero already.
X_ZEROS, Y_ZEROS = X.clone(), Y.clone()
X_ZEROS[1, 1] = Y_ZEROS[0, 1] = Y_ZEROS[0, 2] = Y_ZEROS[2, 0] = 0
TIES = torch.tensor([[1.0, 2.0, 2.0], [3.0, 0.0, 3.0]], dtype=torch.float64)
REDUCES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.scatter_reduce.two, (X, 1, COLUMNS, Y, reduce), {"include_self": include_self})
    for reduce in ("sum", "mean", "amax", "amin", "prod")
    for include_self in (True, False)
]
INDEX_REDUCES = [
    (aten.index_reduce.default, (X, dim, index, source, reduce), {"include_self": include_self})
    for dim, index, source in ((0, ROWS, Y), (-1, torch.tensor([3, 3]), Y[:, :2]))
    for reduce in ("mean", "amax", "amin", "prod")
    for include_self in (True, False)
]


@pytest.mark.parametrize(("op", "args", "kwargs"), REDUCES)
def test_scatter_reduces(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, oracle="difference" if "prod" in args else "jvp", **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), INDEX_REDUCES)
def test_index_reduces(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, oracle="difference", **kwargs)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
def test_scattered_products_of_zeros(dim: int, include_self: bool) -> None:
    args = (X_ZEROS, dim, COLUMNS[:2, :3] % 3, Y_ZEROS, "prod")
    check(aten.scatter_reduce.two, *args, oracle="difference", include_self=include_self)


def test_scattered_product_of_numbers() -> None:
    args = (normal(), 0, torch.tensor(0), normal(seed=2), "prod")
    check(aten.scatter_reduce.two, *args, oracle="difference")


@pytest.mark.parametrize("reduce", ["amax", "amin"])
def test_ties_of_a_scatter_are_shared_as_in_torch(reduce: str) -> None:
    index, src = torch.tensor([[0, 0, 1], [2, 2, 2]]), TIES.clone()
    check(aten.scatter_reduce.two, TIES, 1, index, src, reduce, second=False)
