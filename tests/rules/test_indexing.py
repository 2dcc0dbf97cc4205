"""Rows of rules/indexing.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import check, jvp_by_rule
from torch import Tensor
from torch._ops import OpOverload

import fwdcompile

aten = torch.ops.aten


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _i(*numbers: Any) -> Tensor:
    return torch.tensor(numbers)


X, Y, CUBE, SCALAR = _t(3, 4), _t(3, 4, seed=2), _t(2, 3, 4), _t()
MASK = _t(3, 4, seed=3) > 0
ROWS, COLUMNS = _i(2, 0, 2), _i([0, 1, 1, 3], [2, 0, 2, 1], [1, 1, 0, 0])

READS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.embedding.default, (X, COLUMNS[:, :2] % 3), {}),
    (aten.embedding.default, (X, ROWS, 2), {}),
    (aten.embedding.default, (X, torch.empty(0, dtype=torch.int64)), {}),
    *((op, (X, [ROWS, None]), {}) for op in (aten.index.Tensor, aten._unsafe_index.Tensor)),
    (aten.index.Tensor, (CUBE, [None, ROWS[:2], _i(-1, 0)]), {}),
    (aten.index.Tensor, (CUBE, [_i(1, 0), None, _i([1], [3])]), {}),
    (aten.index_select.default, (X, -1, ROWS), {}),
    (aten.gather.default, (X, 1, COLUMNS), {}),
    (aten.gather.default, (SCALAR, 0, _i(0)), {}),
    (aten.take.default, (X, _i([11, -1], [0, 5])), {}),
    (aten.take_along_dim.default, (X, COLUMNS, 1), {}),
    (aten.take_along_dim.default, (X, _i([1], [0], [3]), -1), {}),
    (aten.repeat_interleave.self_Tensor, (X, _i(1, 0, 2), 0), {"output_size": 3}),
    (aten._unsafe_masked_index.default, (X, MASK, [_i([0], [1], [2]), _i(0, 1, 2, 3)], 5.0), {}),
]

WRITES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.scatter.src, (X, 1, _i([0, 2], [1, 3], [3, 0]), Y), {}),
    (aten.scatter.value, (X, -1, COLUMNS, 3.0), {}),
    (aten.scatter_add.default, (X, 1, COLUMNS, Y), {}),
    *(
        (op, (X, [ROWS[:2], None], _t(4)), {})
        for op in (aten.index_put.default, aten._unsafe_index_put.default)
    ),
    (aten.index_put.default, (X, [ROWS, _i(1, 2, 1)], _t(3), True), {}),
    (aten.index_put.default, (X, [MASK], SCALAR), {}),
    (aten.index_add.default, (X, 0, ROWS, Y), {}),
    (aten.index_add.default, (X, -1, _i(3, 3), Y[:, :2]), {"alpha": -2}),
    (aten.index_copy.default, (X, 1, _i(3, 0), Y[:, :2]), {}),
    (aten.index_fill.int_Scalar, (X, 1, _i(0, 2), 4.0), {}),
    (aten.index_fill.int_Tensor, (X, -1, _i(0, 2), SCALAR), {}),
    (aten.masked_fill.Scalar, (X, MASK, 2.0), {}),
    (aten.masked_fill.Scalar, (X, MASK[0], -float("inf")), {}),
    (aten.masked_fill.Tensor, (X, MASK, SCALAR), {}),
    (aten.masked_fill.Tensor, (X[:, :1], MASK, SCALAR), {}),
    (aten.masked_scatter.default, (X, MASK, Y), {}),
    (aten.put.default, (X, _i(1, 7), Y[0, :2]), {}),
    (aten.put.default, (X, _i(1, 1), Y[0, :2], True), {}),
    (
        aten._unsafe_masked_index_put_accumulate.default,
        (X, MASK, [_i([0], [1], [2]), _i(0, 1, 2, 3)], Y),
        {},
    ),
]


def _name(x: object) -> str:
    return str(x) if isinstance(x, OpOverload) else ""


@pytest.mark.parametrize(("op", "args", "kwargs"), READS, ids=_name)
def test_reads(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), WRITES, ids=_name)
def test_writes(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


BAGS = (_i(1, 2, 2, 0, 1), _i(0, 2, 2))


@pytest.mark.parametrize(
    "op", [aten._embedding_bag.default, aten._embedding_bag_forward_only.default]
)
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("padding", [-1, 2])
def test_embedding_bags_with_an_empty_bag(op: Any, mode: int, padding: int) -> None:
    args = (X, *BAGS, False, mode, False, None, False, padding)
    check(op, *args, oracle="difference")


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_embedding_bags_with_a_last_offset(mode: int) -> None:
    offsets = torch.tensor([0, 2, 5])

    def bags(weight: Tensor) -> Tensor:
        name = ("sum", "mean", "max")[mode]
        return torch.nn.functional.embedding_bag(
            BAGS[0], weight, offsets, mode=name, include_last_offset=True
        )

    out, out_dot = fwdcompile.jvp(bags, (X,), (Y,))
    torch.testing.assert_close(out, bags(X))
    difference = (bags(X + 1e-6 * Y) - bags(X - 1e-6 * Y)) / 2e-6
    torch.testing.assert_close(out_dot, difference, rtol=1e-6, atol=1e-8)


def test_weighted_embedding_bag() -> None:
    args = (X, *BAGS, False, 0, False, _t(5, seed=4))
    check(aten._embedding_bag.default, *args, oracle="difference", wrt=(0, 3))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.masked_select(x, MASK).exp(),
        lambda x: (x[x > 0] * 3).sum(),
        lambda x: torch.repeat_interleave(x, _i(1, 0, 2), 0).sin(),
    ],
)
def test_shapes_that_depend_on_values(function: Any) -> None:
    expected = torch.func.jvp(function, (X,), (Y,))
    torch.testing.assert_close(fwdcompile.jvp(function, (X,), (Y,)), expected)


def _squared_in_place(x: Tensor, mask: Tensor) -> Tensor:
    y = x * 1
    y[mask] = x[mask] * x[mask]
    return y


@pytest.mark.parametrize(
    "function",
    [
        lambda x, mask: x[mask].square().sum(),
        lambda x, mask: x[mask] * x[mask].sin(),
        lambda x, mask: x[:, mask[0]],
        lambda x, mask: x[mask[:, 1], _i(2)],
        _squared_in_place,
    ],
)
def test_a_mask_may_choose_another_number_at_every_call(function: Any) -> None:
    fwd = fwdcompile.transform(function)
    for mask in (MASK, ~MASK, MASK & False, MASK | True):
        y, y_dot = fwd(X, mask, tangents={"x": Y})
        expected = torch.func.jvp(lambda x, mask=mask: function(x, mask), (X,), (Y,))
        torch.testing.assert_close((y, y_dot), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tangent_has_its_primals_dtype(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    for op, args in (
        (aten.scatter.value, (x, 1, COLUMNS, 3.0)),
        (aten.embedding.default, (x, ROWS)),
    ):
        _, dots = jvp_by_rule(op, args, {}, {0: x})
        assert dots[0] is not None
        assert dots[0].dtype == dtype
