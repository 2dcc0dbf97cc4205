"""Models decide by tensors that they make of numbers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import fwdcompile

X = torch.linspace(-1.5, 1.7, 6, dtype=torch.float64).view(2, 3)


def solved(x: Tensor) -> Tensor:
    """Euler's method as solvers write it, whose steps are checked, compared and looped over."""
    times = torch.linspace(0, 1, 6)
    assert bool((times[1:] > times[:-1]).all())
    for t, after in pairwise(times):
        x = x + (after - t) * (x.sin() if t < 0.5 else x.cos())
    return x


def scheduled(x: Tensor) -> Tensor:
    levels = torch.tensor([0.9, 0.5, 0.2]).cumprod(0)
    for level in levels.flip(0).tolist():
        x = x * level + x.square()
    return x


def counted(x: Tensor) -> Tensor:
    mask = torch.eye(3, dtype=torch.bool)
    mask[0, 1] = True
    rows, columns = mask.nonzero().unbind(1)
    return x[:, rows].exp() * x[:, columns] * int(mask.sum())


def indexed(x: Tensor) -> Tensor:
    places = torch.arange(3)
    return torch.stack([x[:, int(i)] * (int(i) + 1) for i in places[places != 1]])


def written(x: Tensor) -> Tensor:
    scale = torch.ones(3)
    scale[1:] += 2
    return x * scale if bool(scale.max() > 2.5) else -x


@pytest.mark.parametrize("model", [solved, scheduled, counted, indexed, written])
def test_decisions_by_numbers(model: Callable[[Tensor], Tensor]) -> None:
    found = fwdcompile.jvp(model, (X,), (X.cos(),))
    torch.testing.assert_close(found, torch.func.jvp(model, (X,), (X.cos(),)))


def values_of_an_input(x: Tensor) -> Tensor:
    scale = torch.ones(2, 3, dtype=x.dtype)
    scale += x
    return x if bool(scale.max() > 1) else -x


def values_in_a_view(x: Tensor) -> Tensor:
    scale = torch.zeros(2, 3, dtype=x.dtype)
    part = scale[1:].view(-1)
    part += x[1]
    return x if bool(scale.max() > 1) else -x


TABLE = torch.arange(3.0)
CHANGING: list[Callable[[Tensor], Tensor]] = [
    values_of_an_input,
    values_in_a_view,
    lambda x: x if TABLE.sum() > 1 else -x,
    lambda x: x if torch.bernoulli(torch.full((3,), 0.5)).sum() > 1 else -x,
    lambda x: x if torch.zeros(3).normal_().sum() > 1 else -x,
]


@pytest.mark.parametrize("model", CHANGING)
def test_decisions_by_what_can_change_are_refused(model: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(fwdcompile.CaptureError, match="decides in Python"):
        fwdcompile.jvp(model, (X,), (X,))


def test_large_tensors_are_not_made() -> None:
    def model(x: Tensor) -> Tensor:
        return x * torch.zeros(10**15, 1, 1)[:1]

    captured = fwdcompile.transform(model).lower(X, tangents=["x"]).stages["capture"]
    sizes = [node.meta["val"].numel() for node in captured.nodes if "val" in node.meta]
    assert max(sizes) == 10**15
