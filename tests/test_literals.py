"""Models decide by tensors that they make of numbers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

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


CHANGING: list[Callable[[Tensor], Tensor]] = [
    values_of_an_input,
    values_in_a_view,
    lambda x: x if torch.bernoulli(torch.full((3,), 0.5)).sum() > 1 else -x,
    lambda x: x if torch.zeros(3).normal_().sum() > 1 else -x,
]


@pytest.mark.parametrize("model", CHANGING)
def test_decisions_by_what_can_change_are_refused(model: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(fwdcompile.CaptureError, match="decides in Python"):
        fwdcompile.jvp(model, (X,), (X,))


class Pooled(nn.Module):
    """Sums over groups, whose number it reads from their names, as layers of graph networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.scales = torch.tensor([0, 2]), torch.tensor([0.5, 2.0])

    def forward(self, x: Tensor) -> Tensor:
        sums = x.new_zeros(int(self.groups.max()) + 1, 3).index_add(0, self.groups, x.sin())
        return sums * self.scales.sum() if bool((self.scales > 1).any()) else sums.cos()


def expected(model: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    return torch.func.jvp(model, (X,), (X.cos(),))


def test_decisions_by_tensors_that_a_model_closes_over() -> None:
    model = Pooled()
    fwd = fwdcompile.transform(model)
    twice = fwdcompile.transform(fwd)

    def check() -> None:
        torch.testing.assert_close(fwd(X, tangents={"x": X.cos()}), expected(model))
        (_, slope), (_, second) = twice(X, tangents={"x": X.cos()})
        torch.testing.assert_close(slope, expected(model)[1])
        wanted = torch.func.jvp(
            lambda x: torch.func.jvp(model, (x,), (X.cos(),))[1], (X,), (X.cos(),)
        )
        torch.testing.assert_close(second, wanted[1])

    check()
    first = fwd.code
    check()
    assert fwd.code is first
    model.groups[1] = 4
    check()
    assert fwd.code != first
    model.scales.fill_(0.25)
    check()


def test_programs_for_all_sizes_notice_that_what_decides_has_changed() -> None:
    scale = torch.tensor([1, 1])
    fwd = fwdcompile.transform(lambda x: x.sin() * int(scale.sum()), dynamic=True)
    for rows in (2, 3, 4):
        x = torch.ones(rows, 2)
        for last in (1, 5):
            scale[0] = last
            _, x_dot = fwd(x, tangents={"x": x})
            torch.testing.assert_close(x_dot, x.cos() * int(scale.sum()))


def test_steps_notice_that_what_decides_has_changed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Pooled())
    fgd = fwdcompile.FGD(model, lambda out, y: (out + y).square().sum(), lr=1e-3, compile=False)
    for last in (2, 5):
        model[1].groups[1] = last
        wanted = (model(X.float()) + 1).square().sum()
        torch.testing.assert_close(fgd.step(X.float(), torch.ones(())), wanted.detach())


def test_a_transform_within_a_model_decides_by_no_tensor() -> None:
    fwd = fwdcompile.transform(Pooled())
    with pytest.raises(fwdcompile.CaptureError, match="the numbers of a tensor decide"):
        fwdcompile.jvp(lambda x: fwd(x, tangents={"x": x})[1], (X,), (X,))


def test_tensors_without_a_version_decide_nothing() -> None:
    with torch.inference_mode():
        scale = torch.ones(3)
    with pytest.raises(fwdcompile.DecisionError):
        fwdcompile.jvp(lambda x: x if scale.sum() > 1 else -x, (X,), (X,))


def test_large_tensors_are_not_made() -> None:
    def model(x: Tensor) -> Tensor:
        return x * torch.zeros(10**15, 1, 1)[:1]

    captured = fwdcompile.transform(model).lower(X, tangents=["x"]).stages["capture"]
    sizes = [node.meta["val"].numel() for node in captured.nodes if "val" in node.meta]
    assert max(sizes) == 10**15
