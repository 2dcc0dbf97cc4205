"""What a model changes of itself by assignment: buffers are written, all else is as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fwdcompile

X = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])


class Mean(nn.Module):
    """Keeps a running mean, in one of the ways that people write it."""

    def __init__(self, way: Callable[[Mean, Tensor], None]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(3))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        self.way(self, self.mean * 0.9 + x.detach().mean(0) * 0.1)
        return x * self.mean


def assigned(module: Mean, mean: Tensor) -> None:
    module.mean = mean


def registered(module: Mean, mean: Tensor) -> None:
    module.register_buffer("mean", mean)


def through_data(module: Mean, mean: Tensor) -> None:
    module.mean.data.copy_(mean)


def lerped(module: Mean, mean: Tensor) -> None:
    module.mean.data.lerp_(mean, 1.0)


@pytest.mark.parametrize("way", [assigned, registered, through_data, lerped])
def test_buffers_are_updated_however_it_is_written(way: Any) -> None:
    model, expected = Mean(way), Mean(way)
    fwd, home = fwdcompile.transform(model), model.mean
    for _ in range(3):
        y, y_dot = fwd(X, tangents={"x": X.cos()})
        torch.testing.assert_close(y, expected(X))
        torch.testing.assert_close(y_dot, X.cos() * expected.mean)
        torch.testing.assert_close(model.mean, expected.mean)
    assert model.mean is home


def test_a_buffer_that_another_shape_is_assigned_to_is_refused() -> None:
    def way(module: Mean, mean: Tensor) -> None:
        module.mean = mean[:1]

    with pytest.raises(fwdcompile.CaptureError, match="buffer 'mean'.*another shape"):
        fwdcompile.transform(Mean(way))(X, tangents={"x": X})


def test_other_memory_for_a_tensor_is_refused() -> None:
    def way(module: Mean, mean: Tensor) -> None:
        module.mean.data = mean

    with pytest.raises(fwdcompile.CaptureError, match=r"(?s)test_state.py:\d+.*\.data =.*copy_"):
        fwdcompile.transform(Mean(way))(X, tangents={"x": X})


class Kept(nn.Module):
    """Reads its parameter and its buffer from a container."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.w, self.mean = nn.Parameter(torch.tensor(2.0)), nn.Buffer(torch.zeros(()))
        names: Any = {"w": self.w, "rest": [self.mean]}
        self.held = names if kind is dict else kind([self.w, [self.mean]])

    def forward(self, x: Tensor) -> Tensor:
        w, (mean,) = self.held.values() if isinstance(self.held, dict) else self.held
        mean.add_(x.detach().mean())
        return x * w


@pytest.mark.parametrize("kind", [list, dict])
def test_parameters_in_lists_and_dicts_have_tangents(kind: type) -> None:
    model = Kept(kind)
    y, y_dot = fwdcompile.transform(model)(X, tangents={"w": torch.tensor(1.0)})
    torch.testing.assert_close((y, y_dot), (2 * X, X), check_stride=False)
    assert float(model.mean) == 3.0
    held = list(model.held.values()) if kind is dict else model.held
    assert held[0] is model.w
    assert held[1][0] is model.mean


def test_parameters_in_tuples_are_refused() -> None:
    with pytest.raises(
        fwdcompile.CaptureError, match="(?s)parameter 'w'.*Read it from the attribute"
    ):
        fwdcompile.transform(Kept(tuple))(X, tangents={"w": torch.tensor(1.0)})


class Shared(nn.Module):
    """Two modules with one list, which forward writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.calls, self.inner = [torch.zeros(1)], 0, nn.Module()
        self.inner.heads = self.heads

    def forward(self, x: Tensor) -> Tensor:
        self.inner.heads[0], self.calls = x.sin(), self.calls + 1
        self.inner.heads.append(x)
        self.met = x
        return x + self.heads[0]


@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export")
def test_attributes_are_as_they_were() -> None:
    model = Shared()
    (head,) = model.heads
    y, _ = fwdcompile.transform(model)(X, tangents={"x": X})
    torch.testing.assert_close(y, X + X.sin())
    assert model.heads is model.inner.heads
    assert len(model.heads) == 1
    assert model.heads[0] is head
    assert model.calls == 0
    assert not hasattr(model, "met")


def test_attributes_are_as_they_were_where_capture_fails() -> None:
    class Failing(Shared):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    model = Failing()
    with pytest.raises(fwdcompile.CaptureError):
        fwdcompile.transform(model)(X, tangents={"x": X})
    assert model.calls == 0


class Making(nn.Module):
    """Makes a part of itself in its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.part: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.part = nn.Tanh()
        return x * self.part(x)


def test_modules_made_in_forward_are_not_kept() -> None:
    model = Making()
    fwdcompile.transform(model)(X, tangents={"x": X})
    assert not list(model.children())
    assert model.part is None


class Stateful(nn.Module):
    """Keeps what it has seen in an attribute that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x
        return x * self.seen


@pytest.mark.filterwarnings("ignore:The tensor attribute .* was assigned during export")
def test_state_in_a_plain_attribute_is_refused() -> None:
    with pytest.raises(fwdcompile.CaptureError, match=r"(?s)attribute 'seen'.*register_buffer"):
        fwdcompile.transform(Stateful())(X, tangents={"x": X})


class Cached(nn.Module):
    """Keeps a part of a constant in an attribute, and reads the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(9.0).view(3, 3)
        self.part = self.table[:2]

    def forward(self, x: Tensor) -> Tensor:
        self.part = self.table[:2]
        return x * self.part


@pytest.mark.filterwarnings("ignore:The tensor attribute .* was assigned during export")
def test_a_part_of_a_constant_in_a_plain_attribute_is_none_of_state() -> None:
    model = Cached()
    y, y_dot = fwdcompile.transform(model)(X, tangents={"x": X})
    torch.testing.assert_close((y, y_dot), (X * model.table[:2], X * model.table[:2]))


class Through(nn.Module):
    """A straight-through gradient where one is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.2, -0.4, 2.6]))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.w
        asked = y.requires_grad and torch.is_grad_enabled()
        return y + (y.round() - y).detach() if asked else y.round()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_what_has_a_tangent_requires_gradients(frozen: bool, grad: bool) -> None:
    model = Through().requires_grad_(not frozen)
    fwd = fwdcompile.transform(model)
    with torch.set_grad_enabled(grad):
        y, y_dot = fwd(X, tangents={"w": torch.ones(3)})
        torch.testing.assert_close(y, (X * model.w).round())
        torch.testing.assert_close(y_dot, X)
        torch.testing.assert_close(fwd(X, tangents={"x": X})[1], X * model.w)
    assert model.w.requires_grad is not frozen
    assert not X.requires_grad


def test_inputs_with_a_tangent_may_be_written_to() -> None:
    def model(x: Tensor) -> Tensor:
        x += 1
        return x * x

    y, y_dot = fwdcompile.jvp(model, (X.clone(),), (X.cos(),))
    torch.testing.assert_close((y, y_dot), ((X + 1) ** 2, 2 * (X + 1) * X.cos()))


def test_views_that_autograd_lets_no_one_write_to_may_be_written_to() -> None:
    def model(x: Tensor) -> Tensor:
        x = x * 2
        first, _ = x.unbind(0)
        first.mul_(3)
        return x.sin()

    found = fwdcompile.jvp(model, (X,), (X.cos(),))
    torch.testing.assert_close(found, torch.func.jvp(model, (X,), (X.cos(),)))


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])
def test_random_numbers_of_python_are_refused(draw: Callable[[], float]) -> None:
    with pytest.raises(fwdcompile.CaptureError, match="Draw them with torch"):
        fwdcompile.jvp(lambda x: x * draw(), (X,), (X,))
