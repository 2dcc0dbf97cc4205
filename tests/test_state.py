"""What a model changes of itself by assignment: buffers are written, all else is as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fwdcompile
from fwdcompile import CaptureError

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


class Past(nn.Module):
    """Keeps what it was given before, in one of the ways that people write it."""

    def __init__(self, way: Callable[[Past, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(3, 3), way
        for number, name in enumerate("cab"):  # written in another order than read
            self.register_buffer(name, torch.full((3,), float(number)))

    def forward(self, x: Tensor) -> Any:
        y = (self.linear(x) * self.a + self.b).sum()
        return y, self.way(self, x.detach()[0])


def copied(past: Past, x: Tensor) -> Tensor:
    past.c.copy_(past.b)
    past.b.copy_(past.a.detach())
    past.a.copy_(x)
    return past.c


def moved_on(past: Past, x: Tensor) -> Tensor:
    old = past.a
    past.c, past.b = past.b, past.a
    past.a = x * 2
    return old


def rotated(past: Past, x: Tensor) -> Tensor:
    past.a, past.b, past.c = past.b, past.c, past.a
    return past.a.view(3, 1)


def swapped(past: Past, x: Tensor) -> Tensor:
    t = past.a.clone()
    past.a.copy_(past.b)
    past.b.copy_(t)
    return past.b[1:]


def mixed(past: Past, x: Tensor) -> Tensor:
    past.b[:2].copy_(past.a[1:])
    past.a = past.c.sin()
    past.c.add_(1)
    return past.b


@pytest.mark.parametrize("way", [copied, moved_on, rotated, swapped, mixed])
def test_buffers_take_the_old_values_of_others(way: Any, tmp_path: Path) -> None:
    def loss(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x)[0]

    by_call, by_step, by_file, expected = models = [Past(way) for _ in range(4)]
    for model in models:
        model.load_state_dict(expected.state_dict())
    fwd = fwdcompile.transform(by_call)
    fgd = fwdcompile.FGD(loss(by_step), lr=1e-12, compile=False)
    for number in range(3):
        x = X + number
        wanted = [t.detach().clone() for t in expected(x)]
        outs, dots = fwd(x, tangents={"x": X})
        torch.testing.assert_close([*outs], wanted)
        torch.testing.assert_close(fgd.step(x), wanted[0])
        if not number:
            fwd.save(tmp_path / "past.py")
            saved = fwdcompile.load(tmp_path / "past.py", by_file)
        outs, again = saved(x, tangents={"x": X})
        torch.testing.assert_close([*outs], wanted)
        torch.testing.assert_close(again, dots)
        for model in (by_call, by_step, by_file):
            torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()))


def test_inputs_take_the_old_values_of_others() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        t = a.clone()
        a.copy_(b)
        b.copy_(t)
        return a + 2 * b

    ones, twos = torch.ones(2), torch.full((2,), 2.0)
    a, b = ones.clone(), twos.clone()
    y, y_dot = fwdcompile.transform(function)(a, b, tangents={"a": ones})
    torch.testing.assert_close((a, b, y, y_dot), (twos, ones, 2 * twos, twos))


def shares_an_input(x: Tensor, y: Tensor) -> Tensor:
    x.mul_(2)
    return (x.sum() + y).sum()


@pytest.mark.parametrize("other", [lambda x: x, lambda x: x[:1], lambda x: x.T[1:]])
def test_a_write_to_what_another_input_shows_is_refused(other: Any) -> None:
    x = X.clone()
    fwd = fwdcompile.transform(shares_an_input)
    fwd(x, X, tangents={"x": X})  # has a program
    x = X.clone()
    for function in (fwd, fwdcompile.transform(shares_an_input)):
        with pytest.raises(fwdcompile.TangentError, match="'x', which shares memory with 'y'"):
            function(x, other(x), tangents={"x": X})
        torch.testing.assert_close(x, X)
    y, _ = fwd(x[:1], x[1:], tangents={"x": X[:1]})  # apart in one memory
    torch.testing.assert_close(y, 36 + X[1:].sum())


def test_a_write_to_what_the_model_closes_over_as_well_is_refused() -> None:
    x = X.clone()
    first = x[:1]
    fwd = fwdcompile.transform(lambda x: x.mul_(2) + first)
    y, _ = fwd(X.clone(), tangents={"x": X})
    torch.testing.assert_close(y, 2 * X + X[:1])
    with pytest.raises(fwdcompile.TangentError, match="'x', which shares memory with 'constant"):
        fwd(x, tangents={"x": X})
    torch.testing.assert_close(x, X)


def test_a_write_to_a_buffer_that_is_given_as_well_is_refused() -> None:
    model = Mean(assigned)
    x = torch.ones(1, 3)
    linear = nn.Linear(3, 1)

    def loss(x: Tensor) -> Tensor:
        return linear(model(x)).mean()

    fgd = fwdcompile.FGD(loss, lr=0.1, compile=False)
    fgd.step(x)
    weight = linear.weight.clone()
    with pytest.raises(fwdcompile.TangentError, match="'model.mean', which shares memory with 'x'"):
        fgd.step(model.mean.view(1, 3))
    torch.testing.assert_close(linear.weight, weight)


def test_one_tensor_twice_is_two_inputs_where_none_is_written_to() -> None:
    fwd = fwdcompile.transform(lambda x, y: x * y[:1])
    y, y_dot = fwd(X, X, tangents={"x": X})
    torch.testing.assert_close((y, y_dot), (X * X[:1], X * X[:1]))
    y, _ = fwd(X, X[:1].expand(2, 3), tangents={"x": X})
    torch.testing.assert_close(y, X * X[:1])


class Annealed(nn.Module):
    """Divides by a number that falls with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.temperature *= 0.5
        return x / self.temperature


class Initialized(nn.Module):
    """Takes a mean from its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.is_set = False
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_set:
            self.mean.copy_(x.mean(0))
            self.is_set = True
        return x - self.mean


class Counted(nn.Module):
    """Counts its calls, and computes nothing by that."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.sin()


@pytest.mark.parametrize("kind", [Annealed, Initialized])
def test_numbers_that_a_call_changes_and_computes_by_are_refused(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.ones(4, 3)
    with pytest.raises(CaptureError, match=f"changes {kind.__name__}.* and computes by it"):
        fwdcompile.transform(model)(x, tangents={"x": x})
    assert vars(model).get("temperature", 1.0) == 1.0 and not vars(model).get("is_set")


def test_numbers_that_a_first_call_changes_alone() -> None:
    model, x = Initialized(), torch.randn(4, 3)
    model(x)
    y, _ = fwdcompile.transform(model)(2 * x, tangents={"x": x})
    torch.testing.assert_close(y, 2 * x - x.mean(0))


def test_numbers_that_a_call_changes_for_others_to_read() -> None:
    model, x = Counted(), torch.ones(3)
    fwd = fwdcompile.transform(model)
    for _ in range(2):
        fwd(x, tangents={"x": x})
    assert fwd.programs == 1 and model.calls == 0


def test_a_parameter_that_a_call_replaces_is_refused() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            self.w = nn.Parameter(2 * self.w.detach())
            return x * self.w

    x = torch.ones(3)
    with pytest.raises(CaptureError, match="replaces its parameter 'w'"):
        fwdcompile.transform(Doubling())(x, tangents={"x": x})


def test_setting_the_generator_and_inference_mode_are_refused() -> None:
    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return x * torch.rand(3)

    def forked(x: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return x * torch.rand(3)

    def inferring(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return x.sin()

    @torch.inference_mode()
    def decorated(x: Tensor) -> Tensor:
        return x.sin()

    x = torch.ones(3)
    before = torch.get_rng_state()
    for model, message in (
        (lambda x: decorated(x), "enters torch.inference_mode"),
        (seeded, "sets the random number generator"),
        (forked, "sets the random number generator"),
        (inferring, "enters torch.inference_mode"),
    ):
        with pytest.raises(CaptureError, match=message) as met:
            fwdcompile.transform(model)(x, tangents={"x": x})
        assert "test_state.py" in str(met.value)
    assert torch.equal(torch.get_rng_state(), before)


def test_programs_of_inference_mode_are_its_own() -> None:
    w = nn.Parameter(torch.ones(3))

    def asking(x: Tensor) -> Tensor:
        return x.sin() if (x * w).requires_grad else x.exp()

    fwd, x = fwdcompile.transform(asking), torch.ones(3)
    with torch.inference_mode():
        y = fwd(x, tangents={"x": x})[0].clone()
    torch.testing.assert_close(y, x.exp())
    torch.testing.assert_close(fwd(x, tangents={"x": x})[0], x.sin())
