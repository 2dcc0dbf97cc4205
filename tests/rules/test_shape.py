"""Rows of rules/shape.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import check, jvp_by_rule
from oracle import REVIEWED
from torch import Tensor
from torch._ops import OpOverload

import fwdcompile

aten = torch.ops.aten


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y, CUBE, SCALAR, EMPTY = _t(3, 4), _t(3, 4, seed=2), _t(2, 3, 4), _t(), _t(0, 4)
COLUMN, IMAGE, VOLUME = _t(3, 1, 1), _t(1, 4, 5, 6), _t(1, 2, 3, 4, 3)
INT = torch.arange(12).view(3, 4)

VIEWS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    *((op, (X, [2, -1]), {}) for op in (aten.view.default, aten.reshape.default)),
    (aten.view_copy.default, (X, [12]), {}),
    (aten._unsafe_view.default, (X, [4, 3]), {}),
    (aten.reshape.default, (X.t(), [12]), {}),
    (aten.view.default, (SCALAR, [1, 1]), {}),
    (aten.view.default, (EMPTY, [2, 0]), {}),
    *((op, (COLUMN, [2, 3, -1, 4]), {}) for op in (aten.expand.default, aten.expand_copy.default)),
    (aten.expand.default, (SCALAR, [2, 2]), {}),
    *((op, (CUBE, [2, 0, -2]), {}) for op in (aten.permute.default, aten.permute_copy.default)),
    *((op, (CUBE, 0, -1), {}) for op in (aten.transpose.int, aten.transpose_copy.int)),
    *((op, (X,), {}) for op in (aten.t.default, aten.t_copy.default)),
    (aten.t.default, (X[0],), {}),
    *((op, (COLUMN,), {}) for op in (aten.squeeze.default, aten.squeeze_copy.default)),
    *((op, (COLUMN, -1), {}) for op in (aten.squeeze.dim, aten.squeeze_copy.dim)),
    (aten.squeeze.dim, (COLUMN, 0), {}),
    *((op, (COLUMN, [0, 2]), {}) for op in (aten.squeeze.dims, aten.squeeze_copy.dims)),
    *((op, (X, -1), {}) for op in (aten.unsqueeze.default, aten.unsqueeze_copy.default)),
    *((op, (X, 1, 0, 9, 2), {}) for op in (aten.slice.Tensor, aten.slice_copy.Tensor)),
    (aten.slice.Tensor, (X, -1, -2), {}),
    (aten.narrow_copy.default, (X, -1, 1, 2), {}),
    *((op, (X, -1, -3), {}) for op in (aten.select.int, aten.select_copy.int)),
    *(
        (op, (X, 3, 1), {})
        for op in (aten.split.Tensor, aten.split_copy.Tensor, aten.unsafe_split.Tensor)
    ),
    *(
        (op, (X, [1, 3], -1), {})
        for op in (
            aten.split_with_sizes.default,
            aten.split_with_sizes_copy.default,
            aten.unsafe_split_with_sizes.default,
        )
    ),
    *((op, (X, -1), {}) for op in (aten.unbind.int, aten.unbind_copy.int)),
    *((op, (CUBE, 1, 0, -1), {}) for op in (aten.diagonal.default, aten.diagonal_copy.default)),
    *((op, (X, 1, 2, 1), {}) for op in (aten.unfold.default, aten.unfold_copy.default)),
]

MOVES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.flip.default, (X, [0, -1]), {}),
    (aten.roll.default, (X, [1, -2], [0, 1]), {}),
    (aten.roll.default, (X, [5]), {}),
    (aten.rot90.default, (CUBE, 3, [1, 2]), {}),
    (aten.repeat.default, (X, [2, 1, 3]), {}),
    (aten.tile.default, (CUBE, [2]), {}),
    (aten.repeat_interleave.self_int, (X, 2, 1), {}),
    (aten.diag_embed.default, (X, -1, 0, -1), {}),
    *((op, (CUBE, -1), {}) for op in (aten.tril.default, aten.triu.default)),
    (aten.constant_pad_nd.default, (X, [1, -2, 0, 3]), {}),
    (aten.constant_pad_nd.default, (X, [1, 1], 7.5), {}),
    (aten._pad_circular.default, (CUBE, [1, 2]), {}),
    *(
        (op, (CUBE, [2, 1]), {})
        for op in (aten.reflection_pad1d.default, aten.replication_pad1d.default)
    ),
    *(
        (op, (CUBE, [2, 1, 0, 2]), {})
        for op in (aten.reflection_pad2d.default, aten.replication_pad2d.default)
    ),
    *(
        (op, (VOLUME, [1, 0, 2, 1, 0, 1]), {})
        for op in (aten.reflection_pad3d.default, aten.replication_pad3d.default)
    ),
    (aten.pixel_shuffle.default, (IMAGE, 2), {}),
    (aten.pixel_unshuffle.default, (IMAGE[:, :, :4], 2), {}),
    (aten.channel_shuffle.default, (IMAGE, 2), {}),
    (aten.im2col.default, (IMAGE, [2, 3], [1, 2], [1, 0], [2, 1]), {}),
    (aten.col2im.default, (_t(2, 8, 12), [4, 5], [2, 2], [1, 1], [0, 0], [1, 1]), {}),
]

JOINS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    *((op, ([X, Y, X * 2], -1), {}) for op in (aten.cat.default, aten.stack.default)),
    (aten.cat.default, ([EMPTY, X], 0), {}),
    (aten.cat.default, ([X, INT], 0), {}),
    *(
        (op, ([X, Y],), {})
        for op in (
            aten.hstack.default,
            aten.vstack.default,
            aten.dstack.default,
            aten.column_stack.default,
        )
    ),
    (aten.block_diag.default, ([X, SCALAR, Y[0]],), {}),
    (aten.select_scatter.default, (X, Y[0], 0, -1), {}),
    (aten.slice_scatter.default, (X, Y[:, :2], 1, 0, 4, 2), {}),
    (aten.diagonal_scatter.default, (X, Y[0, :3]), {}),
]


def _name(x: object) -> str:
    return str(x) if isinstance(x, OpOverload) else ""


@pytest.mark.parametrize(("op", "args", "kwargs"), VIEWS, ids=_name)
def test_views(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if op is aten.narrow_copy.default and not REVIEWED:
        pytest.skip("torch 2.11 has no tangent of it to compare with")
    check(op, *args, **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), MOVES, ids=_name)
def test_moves(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


@pytest.mark.parametrize(("op", "args", "kwargs"), JOINS, ids=_name)
def test_joins(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    check(op, *args, **kwargs)


def test_a_view_of_a_tangent_with_other_strides() -> None:
    x_dot = _t(4, 3).t()
    _, dots = jvp_by_rule(aten.view.default, (X, [2, 6]), {}, {0: x_dot})
    torch.testing.assert_close(dots[0], x_dot.reshape(2, 6), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tangent_has_its_primals_dtype(dtype: torch.dtype) -> None:
    outs, dots = jvp_by_rule(aten.cat.default, ([X.to(dtype), Y], 0), {}, {0: X.to(dtype), 1: Y})
    assert dots[0] is not None
    assert dots[0].dtype == outs[0].dtype == torch.float64
    outs, dots = jvp_by_rule(aten.roll.default, (X.to(dtype), [1], [0]), {}, {0: X.to(dtype)})
    assert dots[0] is not None
    assert dots[0].dtype == outs[0].dtype == dtype


def test_views_of_raw_bits_are_refused() -> None:
    with pytest.raises(fwdcompile.MissingRuleError, match="bits"):
        fwdcompile.jvp(lambda x: x.view(torch.float32), (X,), (Y,))
