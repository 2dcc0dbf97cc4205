"""Rows of rules/activation.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import check, jvp_by_rule
from torch import Tensor

aten = torch.ops.aten


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y, EMPTY, SCALAR = _t(3, 4), _t(3, 4, seed=2), _t(0, 4), _t(seed=6)
WIDE = X * 5
NUMBERS = [-7.0, -6.0, -3.0, -1.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 1.0, 3.0, 6.0, 7.0, 25.0]
SPECIAL = torch.tensor(NUMBERS, dtype=torch.float64)

ROWS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.relu.default, (), {}),
    (aten.relu6.default, (), {}),
    (aten.hardtanh.default, (), {}),
    (aten.hardtanh.default, (-0.5, 3), {}),
    (aten.threshold.default, (0.5, 2.0), {}),
    (aten.hardshrink.default, (), {}),
    (aten.hardshrink.default, (1.0,), {}),
    (aten.softshrink.default, (), {}),
    (aten.softshrink.default, (1.0,), {}),
    (aten.leaky_relu.default, (), {}),
    (aten.leaky_relu.default, (0.3,), {}),
    (aten._prelu_kernel.default, (torch.tensor([0.25], dtype=torch.float64),), {}),
    (aten.elu.default, (), {}),
    (aten.elu.default, (0.7, 1.3, 0.5), {}),
    (aten.celu.default, (), {}),
    (aten.selu.default, (), {}),
    (aten.gelu.default, (), {}),
    (aten.gelu.default, (), {"approximate": "tanh"}),
    (aten.silu.default, (), {}),
    (aten.mish.default, (), {}),
    (aten.softplus.default, (), {}),
    (aten.softplus.default, (2.0, 1.0), {}),
    (aten.log_sigmoid.default, (), {}),
    (aten.hardswish.default, (), {}),
]


@pytest.mark.parametrize("x", [X, WIDE, SCALAR, EMPTY], ids=["unit", "wide", "scalar", "empty"])
@pytest.mark.parametrize(("op", "args", "kwargs"), ROWS)
def test_row(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> None:
    check(op, x, *args, **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), ROWS)
def test_kink_follows_torch(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, SPECIAL, *args, second=False, **kwargs)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.relu.default, ()),
        (aten.relu6.default, ()),
        (aten.hardtanh.default, ()),
        (aten.hardsigmoid.default, ()),
        (aten.threshold.default, (0.0, 0.0)),
        (aten.clamp.default, (-1.0, 1.0)),
        (aten.nan_to_num.default, ()),
    ],
)
def test_flat_part_stops_an_infinite_tangent(op: Any, args: tuple[Any, ...]) -> None:
    x = torch.tensor([-torch.inf], dtype=torch.float64)
    _, (tangent,) = jvp_by_rule(op, (x, *args), {}, {0: -x})
    assert tangent is not None and tangent.item() == 0


@pytest.mark.parametrize("x", [X, WIDE, SCALAR, EMPTY], ids=["unit", "wide", "scalar", "empty"])
def test_row_that_torch_rounds_to_float32(x: Tensor) -> None:
    check(aten.hardsigmoid.default, x, oracle="difference")
    check(aten.celu.default, x, 0.6, oracle="difference")


def test_hardsigmoid_kink_follows_torch() -> None:
    check(aten.hardsigmoid.default, SPECIAL, second=False, rtol=1e-6)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_backward(approximate: str) -> None:
    check(aten.gelu_backward.default, X, Y, approximate=approximate, oracle="difference")
    check(aten.gelu_backward.default, SPECIAL, SPECIAL, approximate=approximate,
          oracle="difference")  # fmt: skip


def test_prelu_of_a_weight_for_each_channel() -> None:
    check(aten._prelu_kernel.default, X, _t(4, seed=3))
    check(aten._prelu_kernel.default, _t(2, 3, 4), _t(3, 1, seed=3))


@pytest.mark.parametrize(("x", "dim"), [(X, -1), (X, 0), (_t(2, 4, 3), 1), (EMPTY, 1)])
def test_glu(x: Tensor, dim: int) -> None:
    check(aten.glu.default, x.repeat_interleave(2, dim), dim)


SOFTMAX = [
    (op, args)
    for op in (aten.softmax.int, aten.log_softmax.int, aten._safe_softmax.default)
    for args in ((X, -1), (X, 0), (_t(2, 3, 4), 1), (EMPTY, 1), (SCALAR, 0), (WIDE * 20, 1))
]
SOFTMAX += [
    (op, args)
    for op in (aten._softmax.default, aten._log_softmax.default)
    for args in ((X, -1, False), (_t(2, 3, 4), 1, False), (SCALAR, 0, False))
]
SOFTMAX += [(op, (X, 1, torch.float64)) for op in (aten.softmax.int, aten.log_softmax.int)]


@pytest.mark.parametrize(("op", "args"), SOFTMAX)
def test_softmax(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args)


def test_safe_softmax_of_a_row_without_any_choice() -> None:
    x = X.clone()
    x[1] = -torch.inf
    _, (tangent,) = jvp_by_rule(aten._safe_softmax.default, (x, 1), {}, {0: Y})
    assert tangent is not None and tangent.isfinite().all() and not tangent[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    x, d = X.to(dtype), Y.to(dtype)
    for op, args in (
        (aten.gelu.default, (x,)),
        (aten.elu.default, (x, 0.7, 1.3)),
        (aten.softmax.int, (x, 1, torch.float32)),
    ):
        (out,), (tangent,) = jvp_by_rule(op, args, {}, {0: d})
        _, (exact,) = jvp_by_rule(op, (x.double(), *args[1:2]), {}, {0: d.double()})
        assert tangent is not None and exact is not None and tangent.dtype == out.dtype
        if op is not aten.elu.default:
            torch.testing.assert_close(tangent.double(), exact, rtol=2e-2, atol=1e-2)
