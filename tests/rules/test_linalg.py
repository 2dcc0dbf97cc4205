"""Rows of rules/linalg.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import check, jvp_by_rule
from torch import Tensor
from torch._ops import OpOverload

import fwdcompile

aten = torch.ops.aten
Sample = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _name(x: object) -> str:
    return str(x) if isinstance(x, OpOverload) else ""


A, B, U, V = _t(3, 4), _t(4, 2, seed=2), _t(3, seed=3), _t(4, seed=4)
BATCH, OTHER = _t(2, 3, 4, seed=5), _t(2, 4, 3, seed=6)
SCALES = ({}, {"alpha": 2.5}, {"beta": -1, "alpha": -1}, {"beta": 0.5, "alpha": 0})

PRODUCTS: list[Sample] = [
    (aten.mm.default, (A, B), {}),
    (aten.mm.default, (A[:, :0], B[:0]), {}),
    (aten.bmm.default, (BATCH, OTHER), {}),
    (aten.mv.default, (A, V), {}),
    (aten.dot.default, (U, U + 1), {}),
    (aten.vdot.default, (U, U + 1), {}),
    (aten.vdot.default, (torch.complex(U, U * 2), torch.complex(U + 1, -U)), {}),
    (aten.outer.default, (U, V), {}),
    (aten.inner.default, (A, BATCH), {}),
    (aten.kron.default, (A, U), {}),
    (aten.tensordot.default, (BATCH, OTHER, [0, 2], [0, 1]), {}),
    (aten.linalg_vecdot.default, (A, V), {}),
    (aten.linalg_vecdot.default, (A, A + 1), {"dim": 0}),
    (aten.linalg_cross.default, (A, A + 1), {"dim": 0}),
    (aten._trilinear.default, (A, _t(5, 4, 2), _t(3, 2), [1, 3], [0], [1, 2], [2, 3]), {}),
    *((aten.matmul.default, pair, {}) for pair in ((A, B), (A, V), (U, A), (BATCH, B), (U, U + 1))),
]

LISTS: list[Sample] = [
    (aten.einsum.default, ("ij,kj->ik", [A, A + 1]), {}),
    (aten.einsum.default, ("bij,bjk,kl->bl", [BATCH, OTHER, A]), {}),
    (aten.einsum.default, ("...ii->...", [_t(2, 3, 3)]), {}),
    (aten.linalg_multi_dot.default, ([U, A, B],), {}),
]

AFFINE: list[Sample] = [
    (aten.linear.default, (BATCH, _t(5, 4), _t(5)), {}),
    (aten.linear.default, (V, _t(5, 4)), {}),
    (aten.linear.default, (A, V), {}),
    (aten.bilinear.default, (A, _t(3, 2), _t(5, 4, 2), _t(5)), {}),
    (aten.bilinear.default, (A, _t(3, 2), _t(5, 4, 2)), {}),
    *(
        (aten.addmm.default, (bias, A, B), kw)
        for bias in (_t(3, 2), _t(2), _t(3, 1))
        for kw in SCALES
    ),
    *((aten.addmv.default, (U, A, V), kw) for kw in SCALES),
    *((aten.addr.default, (A, U, V), kw) for kw in SCALES),
    *((aten.baddbmm.default, (_t(3), BATCH, OTHER), kw) for kw in SCALES),
    *((aten.addbmm.default, (_t(3, 3), BATCH, OTHER), kw) for kw in SCALES),
]

DISTANCES: list[Sample] = [
    *(
        (aten._cdist_forward.default, (x, _t(5, 4, seed=9), p, None), {})
        for x in (A, BATCH)
        for p in (0.0, 1.0, 1.5, 2.0, 3.0, float("inf"))
    ),
    (aten._euclidean_dist.default, (A, _t(5, 4)), {}),
    (aten._euclidean_dist.default, (BATCH, _t(2, 5, 4)), {}),
    *((aten._pdist_forward.default, (_t(4, 3), p), {}) for p in (0.0, 1.0, 1.5, 2.0, 3.0)),
]


@pytest.mark.parametrize(("op", "args", "kwargs"), PRODUCTS, ids=_name)
def test_products(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), LISTS, ids=_name)
def test_products_of_lists(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), AFFINE, ids=_name)
def test_products_plus_a_bias(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), DISTANCES, ids=_name)
def test_distances(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, oracle="difference", **kwargs)


@pytest.mark.parametrize("op", [aten._cdist_forward.default, aten._euclidean_dist.default])
def test_the_distance_of_coinciding_rows_has_no_tangent(op: Any) -> None:
    x = torch.eye(3, dtype=torch.float64)
    args = (x, x.clone(), 2.0, None) if op is aten._cdist_forward.default else (x, x.clone())
    _, dots = jvp_by_rule(op, args, {}, {0: _t(3, 3)})
    assert dots[0] is not None
    assert dots[0].isfinite().all()
    assert (dots[0].diagonal() == 0).all()


def test_the_bias_tangent_rides_along() -> None:
    lowered = fwdcompile.transform(torch.nn.Linear(4, 2), compile=False).lower(
        torch.zeros(3, 4), tangents=["weight", "bias", "input"]
    )
    targets = [node.target for node in lowered.program.graph.nodes if node.op == "call_function"]
    assert targets == [aten.linear.default] * 3 + [aten.add.Tensor]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tangent_has_its_primals_dtype(dtype: torch.dtype) -> None:
    x, w, b = A.to(dtype), _t(5, 4).to(dtype), _t(5).to(dtype)
    _, dots = jvp_by_rule(aten.linear.default, (x, w, b), {}, {0: x, 1: w, 2: b})
    assert dots[0] is not None
    assert dots[0].dtype == dtype
    _, dots = jvp_by_rule(aten.einsum.default, ("ij,kj->ik", [x, w]), {}, {0: x, 1: w})
    assert dots[0] is not None
    assert dots[0].dtype == dtype


ENDS = torch.tensor([3, 3, 10, 16], dtype=torch.int32)  # of each group's rows
ROWS, EXPERTS, COLUMNS = _t(16, 8), _t(4, 8, 24), _t(8, 16)


@pytest.mark.parametrize(
    ("x", "w", "ends"),
    [(ROWS, EXPERTS, ENDS), (ROWS, EXPERTS.mT.contiguous().mT, ENDS), (EXPERTS.mT, COLUMNS, ENDS),
     (COLUMNS, ROWS, ENDS), (_t(4, 16, 8), EXPERTS, None)],
)  # fmt: skip
def test_grouped_products(x: Tensor, w: Tensor, ends: Tensor | None) -> None:
    def parts(x: Tensor) -> list[Tensor]:  # torch has no derivative of its own, nor float64
        return list(torch.tensor_split(x, ENDS[:-1].tolist(), -2)) if x.ndim == 2 else list(x)

    def product(x: Tensor, w: Tensor) -> Tensor:
        if ends is None or x.ndim == w.ndim == 2:
            pairs = zip(parts(x.mT) if x.ndim == 2 else x, parts(w), strict=True)
            return torch.stack([(a.mT if x.ndim == 2 else a) @ b for a, b in pairs])
        pairs = zip(parts(x), parts(w if w.ndim == 3 else w.mT), strict=True)
        return torch.cat([a @ (b if w.ndim == 3 else b.mT) for a, b in pairs], w.ndim - 3)

    x, w = x.bfloat16(), w.bfloat16()
    x_dot, w_dot = x.cos(), w.new_ones(()).expand(w.shape)
    fwd = fwdcompile.transform(lambda x, w: torch._grouped_mm(x, w * 1, offs=ends))
    y, y_dot = fwd(x, w, tangents={"x": x_dot, "w": w_dot})
    wide = [t.double() for t in (x, w, x_dot, w_dot)]
    expected, expected_dot = torch.func.jvp(product, tuple(wide[:2]), tuple(wide[2:]))
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(y_dot.double(), expected_dot, rtol=2e-2, atol=5e-2)
