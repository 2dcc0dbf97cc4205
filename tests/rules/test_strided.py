"""Lowerings of rules/strided.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from functions import normal
from torch import Tensor

import fwdcompile

X = normal(4, 6)


def _memory(x: Tensor) -> Tensor:
    """Every third element in the order of memory, with overlaps."""
    return torch.as_strided(x, (5, 3), (3, 2), 1)


def _written(x: Tensor) -> Tensor:
    return torch.as_strided_scatter(x, x.flatten()[:6].view(2, 3).exp(), (2, 3), (7, 2), 3)


def _in_place(x: Tensor) -> Tensor:
    y = x * x
    y.as_strided((2, 2), (6, 1), 4).mul_(3)
    return y


@pytest.mark.parametrize("function", [_memory, _written, _in_place])
@pytest.mark.parametrize("x", [X, X.t(), X.view(2, 3, 4).permute(2, 0, 1)])
def test_strides(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x_dot = normal(*x.shape, seed=5)  # another layout than that of x
    out, out_dot = fwdcompile.jvp(lambda x: function(x).sin(), (x,), (x_dot,))
    plus, minus = (function(_like(x, x + step * x_dot)).sin() for step in (1e-6, -1e-6))
    torch.testing.assert_close(out, function(x).sin())
    torch.testing.assert_close(out_dot, (plus - minus) / 2e-6, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("src", [X, X[0], X[:, :1], X.T.clone().T, X.float(), X[:1, :1]])
@pytest.mark.parametrize("like", [X, X.T.clone().T, X[:, None].expand(4, 3, 6)[:, 1]])
def test_copies_have_the_layout_of_what_they_are_copied_to(like: Tensor, src: Tensor) -> None:
    copy = torch.ops.aten.copy.default
    (y, z), (y_dot, z_dot) = fwdcompile.jvp(
        lambda x: (copy(like, x), copy(like, x).T.sin()), (src,), (src.cos(),)
    )
    expected = torch.empty_like(like).copy_(src)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, check_stride=True)
    moved = torch.empty_like(like).copy_(src.cos())
    torch.testing.assert_close((z, y_dot, z_dot), (y.T.sin(), moved, expected.T.cos() * moved.T))


@pytest.mark.parametrize("x", [X[1:], X[:, ::2], X[:1].expand(4, 6), X[:2]])
def test_memory_that_is_not_the_tensors_own_is_refused(x: Tensor) -> None:
    with pytest.raises(fwdcompile.MissingRuleError, match="lead out of its tensor's own memory"):
        fwdcompile.jvp(_memory, (x,), (normal(*x.shape),))


def _like(x: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(values)
