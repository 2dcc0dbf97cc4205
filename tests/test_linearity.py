"""A program is taken for linear where it is, and where it is not it never is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fwdcompile.capture import capture
from fwdcompile.linearity import not_linear, paths, place_of
from fwdcompile.program import Program

G = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
X = G.exp()


def zeroed(g: Tensor) -> Tensor:
    """Writes zeros over a row, a column and where something holds."""
    g = g.clone()
    g[0] = 0
    g[:, 1:2].fill_(0.0)
    g[X > 2] = 0
    return g


def filled(g: Tensor) -> Tensor:
    g = g.clone()
    g[0] = 1
    return g


LINEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scaled": lambda g, x: -2 * g * x / x.sum(),
    "differences": lambda g, x: g - x * (g * x).sum(-1, keepdim=True),
    "masked": lambda g, x: torch.where(x > 1, g, 0) + g.masked_fill(x < 0.5, 0),
    "looked up": lambda g, x: g.cumsum(0)[x.argsort(0)[:, 0]].flip(1),
    "multiplied": lambda g, x: torch.einsum("ij,kj->ik", g, x) @ x,
    "summed": lambda g, x: torch.cat([g.mean(0), x.new_zeros(2), torch.zeros_like(g[0])]),
    "transformed": lambda g, x: torch.fft.fft(g, dim=1).real.tril(),
    "cast": lambda g, x: g.float().view(4, 3).double(),
    "partly zeroed": lambda g, x: zeroed(g) + torch.zeros_like(x).copy_(g),
    "convolved": lambda g, x: torch.nn.functional.conv1d(g[None], x[:, :3, None]),
}
OTHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "magnitude": lambda g, x: g.abs(),
    "sign": lambda g, x: g.sign(),
    "clipped": lambda g, x: g.clamp(-0.5, 0.5),
    "filled": lambda g, x: filled(g),
    "squared": lambda g, x: g * g.mean(),
    "shifted": lambda g, x: g + 1e-3 * x,
    "normalised": lambda g, x: g / g.norm(),
    "rounded": lambda g, x: g.round(),
    "compared": lambda g, x: torch.where(g > 0, x, 0.0),
    "chosen": lambda g, x: x.gather(1, g.argmax(1, keepdim=True)).expand(3, 4),
    "random": lambda g, x: torch.nn.functional.dropout(g),
    "finite alone": lambda g, x: g.nan_to_num(),
}


def program_of(function: Callable[[Tensor, Tensor], Any]) -> Program:
    def grouped(gs: list[Tensor], saved: list[Tensor]) -> list[Tensor]:
        return [function(gs[0], saved[0])]

    return capture(grouped, ([G], [X]), {})


@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str) -> None:
    assert not_linear(program_of(LINEAR[name]), "gs") == ""


@pytest.mark.parametrize("name", OTHER)
def test_not_linear(name: str) -> None:
    assert not_linear(program_of(OTHER[name]), "gs")


SAME = [
    lambda g: g * 3,
    lambda g: g.flip(0).cumsum(1),
    lambda g: g @ (torch.eye(4, dtype=g.dtype) * 2 + 1),
    lambda g: g.t().reshape(3, 4),
    lambda g: g.clone().index_copy_(0, torch.arange(3), g),
]


@settings(max_examples=20)
@given(st.lists(st.sampled_from(SAME), max_size=3), st.sampled_from(sorted(OTHER)), st.data())
def test_one_op_that_is_not_linear_is_enough(ops: Any, name: str, data: Any) -> None:
    place = data.draw(st.integers(0, len(ops)))

    def function(g: Tensor, x: Tensor) -> Tensor:
        for op in ops[:place]:
            g = op(g)
        g = OTHER[name](g, x)
        for op in ops[place:]:
            g = op(g)
        return g

    assert not_linear(program_of(function), "gs")


def test_paths_are_of_values_and_not_of_shapes() -> None:
    def function(gs: list[Tensor], x: Tensor) -> list[Tensor]:
        return [gs[0] * x, x.expand_as(gs[1]) + torch.zeros_like(gs[1]), gs[0] + gs[1], gs[1]]

    assert paths(capture(function, ([G, G + 1], X), {}), "gs") == {(0, 0), (0, 2), (1, 2), (1, 3)}
    assert place_of("gs.12") == 12
