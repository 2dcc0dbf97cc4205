"""The row of rules/attention.py.

Torch's fused kernels have no forward mode, so the oracle is central differences, and torch's
own mathematical path where that is wanted to 1e-9.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import check, jvp_by_rule
from fwdcompile.rules import attention
from torch import Tensor

import fwdcompile
from fwdcompile.program import value

aten = torch.ops.aten
OP = aten.scaled_dot_product_attention.default


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


Q, K, V = _t(2, 4, 5, 3), _t(2, 4, 6, 3, seed=2), _t(2, 4, 6, 2, seed=3)
SEEN = torch.rand(5, 6, generator=torch.Generator().manual_seed(4)) > 0.4
SEEN[2] = False
ADDED = _t(2, 1, 5, 6).masked_fill(~SEEN, -torch.inf)

CASES: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((Q, K, V), {}),
    ((Q, K, V), {"scale": 0.3}),
    ((Q, K, V, None, 0.0, True), {}),
    ((K, Q, V[:, :, :5], None, 0.0, True), {"scale": 2.0}),
    ((Q[0], K[0], V[0]), {}),
    ((Q[0, 0], K[0, 0], V[0, 0]), {}),
    ((Q, K, V, SEEN), {}),
    ((Q, K, V, SEEN.expand(2, 4, 5, 6), 0.0, False), {"scale": 1.5}),
    ((Q, K, V, _t(5, 6, seed=5)), {}),
    ((Q, K, V, _t(2, 1, 5, 6, seed=5)), {"scale": 0.5}),
    ((Q, K[:, :2], V[:, :2]), {"enable_gqa": True}),
    ((Q, K[:, :1], V[:, :1], None, 0.0, True), {"enable_gqa": True}),
    ((Q[:0], K[:0], V[:0]), {}),
]


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *rest: Any, **kwargs: Any) -> Tensor:
    """Torch's unfused path, which has a forward mode but knows additive masks only."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return aten._scaled_dot_product_attention_math.default(q, k, v, mask, *rest, **kwargs)[0]


@pytest.mark.parametrize(("args", "kwargs"), CASES)
def test_row(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(OP, *args, oracle="difference", **kwargs)


@pytest.mark.parametrize("block", [2, attention.BLOCK])
@pytest.mark.parametrize(("args", "kwargs"), CASES)
def test_against_the_unfused_path(
    args: tuple[Any, ...], kwargs: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    qkv = args[:3]
    dots = tuple(_t(*x.shape, seed=i + 7) for i, x in enumerate(qkv))
    expected = torch.func.jvp(lambda q, k, v: _math(q, k, v, *args[3:], **kwargs), qkv, dots)[1]
    (got,) = jvp_by_rule(OP, args, kwargs, dict(enumerate(dots)))[1]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("args", "kwargs"), [CASES[i] for i in (0, 2, 3, 6, 9, 11)])
def test_blocks_of_queries_to_second_order(
    args: tuple[Any, ...], kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", 2)
    check(OP, *args, oracle="difference", **kwargs)


@pytest.mark.parametrize("causal", [False, True])
def test_no_scores_are_kept_whole(causal: bool) -> None:
    length, heads = 2048, 2

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    inner = fwdcompile.transform(model)
    for fwd in (inner, fwdcompile.transform(inner)):
        x = torch.empty(1, heads, length, 4)
        graph = fwd.lower(x, x.clone(), x.clone(), tangents="inputs").program.graph
        sizes = [t.numel() for n in graph.nodes if isinstance(t := value(n), Tensor)]
        assert max(sizes) == heads * attention.BLOCK * length


@pytest.mark.parametrize("mask", [SEEN, ADDED])
def test_a_row_masked_everywhere_has_a_zero_tangent(mask: Tensor) -> None:
    dots = {0: torch.ones_like(Q), 1: torch.ones_like(K)}
    (out,), (out_dot,) = jvp_by_rule(OP, (Q, K, V, mask), {}, dots)
    assert out_dot is not None
    assert not out[:, :, 2].any()
    assert not out_dot[:, :, 2].any()
    assert out_dot.isfinite().all()
    assert out_dot.any()


def test_additive_mask_of_minus_infinity() -> None:
    check(OP, Q, K, V, ADDED, wrt=(0, 1, 2), oracle="difference")


def test_value_alone_runs_the_fused_kernel() -> None:
    program = fwdcompile.transform(
        lambda v: torch.nn.functional.scaled_dot_product_attention(Q, K, v)
    ).lower(V, tangents=("v",))
    assert "softmax" not in program.code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(dtype: torch.dtype) -> None:
    args = tuple(x.to(dtype) for x in (Q, K, V))
    (got,) = jvp_by_rule(OP, args, {}, {0: args[0], 1: args[1], 2: args[2]})[1]
    expected = torch.func.jvp(_math, (Q, K, V), (Q, K, V))[1]
    assert got is not None
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
