"""Ops run for all directions, each in the way that fits it."""

from __future__ import annotations

import pytest
import torch
from batches import check, rows
from torch import Tensor

import fwdcompile

F64 = torch.float64
DOTS = torch.randn(3, 4, dtype=F64)


def test_ops_that_torch_cannot_batch_run_one_by_one() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.column_stack([x, x.index_fill(0, torch.tensor([1]), 2.0)]).exp()

    fwd = check(fwdcompile.transform, function, (DOTS[0],), {"x": DOTS})
    assert fwd.code.count("aten.column_stack") == 1 + 3
    assert fwd.code.count("aten.stack") == 2


def test_ops_of_several_results() -> None:
    def function(x: Tensor) -> Tensor:
        values, places = x.exp().sort()
        q, r = torch.linalg.qr(x.outer(x) + torch.eye(4, dtype=F64))
        return values * places + q @ r.sum(0)

    check(fwdcompile.laplacian, function, (DOTS[0],), {"x": DOTS})


@pytest.mark.parametrize("order", ["xy", "yx"])
def test_a_scalar_has_the_weaker_dtype(order: str) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([x * y, x + y, torch.where(y > 0, x, y)]).sum(0)

    x, y = torch.tensor(2.0, dtype=F64), torch.randn(3)
    inputs, names = ((x, y), ("x", "y")) if order == "xy" else ((y, x), ("x", "y"))
    dots = {
        name: torch.randn(2, *value.shape, dtype=value.dtype)
        for name, value in zip(names, inputs, strict=True)
    }
    y_dot = fwdcompile.transform(function, batched=True)(*inputs, tangents=dots)[1]
    each = fwdcompile.transform(function)
    torch.testing.assert_close(y_dot, torch.stack(each(*inputs, tangents=rows(dots))[1]))
    assert y_dot.dtype == torch.float32


def test_slopes_are_computed_once() -> None:
    gelu = torch.nn.GELU()
    fwd = check(fwdcompile.transform, gelu, (DOTS[0],), {"input": DOTS})
    (slope,) = fwd.program.graph.find_nodes(
        op="call_function", target=torch.ops.aten.gelu_backward.default
    )
    assert slope.meta["val"].shape == (4,)
    check(fwdcompile.laplacian, gelu, (DOTS[0],), {"input": DOTS})


def test_operands_of_other_ranks_are_lined_up() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x * y + x.maximum(y)).sin()

    x, y = DOTS[0], torch.randn(2, 4, dtype=F64)
    check(fwdcompile.laplacian, function, (x, y), {"x": DOTS})
    check(fwdcompile.laplacian, function, (x, y), {"x": DOTS, "y": torch.randn(3, 2, 4).double()})
