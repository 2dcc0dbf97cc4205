"""What Python tells a model is looked at before each call: no program is one of another model."""

from __future__ import annotations

import collections
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import regex
import torch
from oracle import REVIEWED
from torch import Tensor, nn
from torch.nn import functional as F

import fwdcompile
from fwdcompile.views import FARTHEST
from fwdcompile.watch import Watch

close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
SCALE: Any = 2.0


class Net(nn.Module):
    """Reads all that a module can have besides tensors."""

    bias: float = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3).double()
        self.act: nn.Module = nn.Tanh()
        self.drop = nn.Dropout(0.0)
        self.k = 2.0
        self.others = [nn.Dropout(0.0)]  # no submodule
        self.config = SimpleNamespace(power=1, unread=3)
        self.unread = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.others[0](self.scaled(self.drop(self.act(self.linear(x))))) + self.bias

    def scaled(self, x: Tensor) -> Tensor:
        return self.k * SCALE * x**self.config.power


def changed_globally(_: Net) -> None:
    global SCALE
    SCALE = 5.0


CHANGES: dict[str, Callable[[Net], Any]] = {
    "submodule": lambda net: setattr(net, "act", nn.ReLU()),
    "submodule with parameters": lambda net: setattr(net, "linear", nn.Linear(3, 3).double()),
    "attribute": lambda net: setattr(net, "k", 3.0),
    "attribute of another type": lambda net: setattr(net, "k", torch.tensor(3.0)),
    "attribute of torch's": lambda net: setattr(net.drop, "p", 1.0),
    "attribute of the class": lambda net: setattr(Net, "bias", 1.5),
    "attribute in a config": lambda net: setattr(net.config, "power", 3),
    "attribute over the class's": lambda net: setattr(net, "bias", 2.5),
    "global": changed_globally,
    "hook": lambda net: net.linear.register_forward_hook(lambda m, args, out: 0 * out),
    "hook before": lambda net: net.act.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
    "module in a list": lambda net: setattr(net.others[0], "p", 1.0),
    "method": lambda net: setattr(net, "scaled", lambda x: 7 * x),
    "forward": lambda net: setattr(net.act, "forward", torch.sin),
    "class": lambda net: setattr(net.act, "__class__", nn.Sigmoid),
}


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Net, "bias", 0.5)
    monkeypatch.setitem(globals(), "SCALE", 2.0)


@pytest.mark.parametrize("change", CHANGES)
def test_a_program_follows_its_model(change: str) -> None:
    net = Net()
    fwd = fwdcompile.transform(net)
    fgd = fwdcompile.FGD(net, F.mse_loss, lr=1e-12, compile=False)
    outs = []
    for _ in range(2):
        y, y_dot = fwd(X, tangents={"x": X})
        expected = torch.func.jvp(net, (X,), (X,))
        close(y, expected[0])
        close(y_dot, expected[1])
        loss = F.mse_loss(net(X), X)
        close(fgd.step(X, X), loss)
        outs.append(y)
        CHANGES[change](net)
    assert not torch.equal(*outs)


def test_what_was_before_has_its_program_again() -> None:
    net = Net()
    watch = Watch(net)
    first = watch.version()
    net.eval()
    net.k = 3.0
    assert watch.version() != first
    net.train()
    net.k = 2.0
    assert watch.version() == first


def test_what_no_code_reads_makes_no_program() -> None:
    net = Net()
    watch = Watch(net)
    first = watch.version()
    net.unread, net.config.unread, net.new = 1, 2, 3
    assert watch.version() == first


def test_what_capture_itself_changes_makes_no_program() -> None:
    seen: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        seen.append(x)
        return x.sin()

    fwd = fwdcompile.transform(function)
    for _ in range(3):
        fwd(X, tangents={"x": X})
    assert len(seen) == 1


@dataclass
class Called:
    """A callable object, which has no hash."""

    net: nn.Module
    scale: float = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * self.net(x)


def test_objects_that_are_called_and_methods_are_followed() -> None:
    called = Called(nn.Dropout(0.5))
    for model in (called, called.__call__, functools.partial(called)):
        fwd = fwdcompile.transform(model)
        for called.scale in (2.0, 3.0):
            for called.net.training in (True, False):
                y, y_dot = fwd(X, tangents={"x": torch.ones_like(X)})
                assert bool((y_dot == 0).any()) == called.net.training
                if not called.net.training:
                    close(y, called.scale * X)


def test_a_loop_over_batches_and_settings_of_one_function() -> None:
    weight = torch.ones(3, dtype=torch.float64)
    scale = 1.0
    batch, options = X, {"power": 2}

    def loss(w: Tensor) -> Tensor:
        return (scale * (batch @ w) ** options["power"]).mean()

    for number in range(4):
        batch = X + number
        scale, options["power"] = 1.0 + number, 2 + number
        y, y_dot = fwdcompile.jvp(loss, (weight,), (weight,))
        expected = torch.func.jvp(loss, (weight,), (weight,))
        close(y, expected[0])
        close(y_dot, expected[1])


def test_layers_are_frozen_and_thawed_between_steps() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double()
    fgd = fwdcompile.FGD(net, lambda y, _: y.square().mean(), lr=0.1, compile=False)
    grad = fwdcompile.ForwardGradient(net, lambda y, _: y.square().mean(), compile=False)
    for frozen in (False, True, False):
        net[0].requires_grad_(not frozen)
        before = [p.clone() for p in net.parameters()]
        fgd.step(X, X)
        moved = [not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)]
        assert moved == [not frozen] * 2 + [True] * 2
        net.zero_grad()
        grad(X, X)
        assert [p.grad is not None for p in net.parameters()] == moved


def test_a_layer_put_in_the_place_of_another_learns() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double()
    fgd = fwdcompile.FGD(net, lambda y, _: y.square().mean(), lr=0.1, compile=False)
    fgd.step(X, X)
    net[1] = nn.Linear(3, 1).double()
    before = net[1].weight.clone()
    loss = net(X).square().mean()
    close(fgd.step(X, X), loss)
    assert not torch.equal(net[1].weight, before)


def test_one_hears_of_many_programs() -> None:
    net = Net()
    watch = Watch(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for net.k in range(15):
            watch.version()
    net.k = 15
    with pytest.warns(UserWarning, match=r"16 programs .* last Net.k changed. Make it a buffer"):
        watch.version()


def test_things_that_are_gone_are_no_longer_looked_at() -> None:
    net = Net()
    watch = Watch(net)
    first = watch.version()
    del net.k
    assert watch.version() != first
    net.k = 2.0
    assert watch.version() == first


class Link:
    """One of many objects in a row, with methods that load other names."""

    def __init__(self, after: Link | None) -> None:
        self.after, self.scale, self.count = after, 2.0, 0

    def report(self) -> int:
        return self.count


def test_objects_that_a_loss_holds_are_followed_by_attributes_and_not_without_end() -> None:
    first: Link | None = None
    for _ in range(FARTHEST):
        first = Link(first)
    assert first is not None and first.after is not None
    watch = Watch(lambda x: x * first.after.scale)
    version = watch.version()
    first.count = first.after.count = 1
    assert watch.version() == version
    first.after.scale = 3.0
    assert watch.version() != version


class Schedule:
    """Has its number behind one of `WAYS`."""

    _now, calls = 1.0, 0

    def _inner(self) -> float:
        return self._now


WAYS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "value": (lambda self: self._inner(), lambda s: s.value()),
    "scale": (property(lambda self: self._now), lambda s: s.scale),
    "cached": (staticmethod(lambda: SCHEDULE._now), lambda s: SCHEDULE._now),
    "__getitem__": (lambda self, _: self._now, lambda s: s["now"]),
    "__call__": (lambda self: self._now, lambda s: s()),
    "__getattr__": (lambda self, _: self._now, lambda s: s.anything),
    "__rmul__": (lambda self, x: x * self._now, lambda s: s),
    "__iter__": (lambda self: iter([self._now]), lambda s: next(iter(s))),
}
SCHEDULE: Any = None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_global", [True, False])
def test_numbers_behind_an_objects_code_are_followed(way: str, is_global: bool) -> None:
    global SCHEDULE
    method, reading = WAYS[way]
    schedule = SCHEDULE = type("Schedule", (Schedule,), {way: method})()

    def function(x: Tensor) -> Tensor:
        return x.sin() * reading(SCHEDULE if is_global else schedule)

    fwd = fwdcompile.transform(function)
    for schedule._now in (1.0, 3.0, 5.0):
        y, y_dot = fwd(X, tangents={"x": X})
        close(y, X.sin() * schedule._now)
        close(y_dot, X.cos() * X * schedule._now)
        schedule.calls += 1  # which no code reads
    assert len(fwd._cache) == 3


def test_methods_count_for_objects_of_which_they_are_called() -> None:
    class Logger:
        def __init__(self) -> None:
            self.count = 0

        def value(self) -> int:
            return self.count

        def write(self, text: str) -> None:
            self.text = text

    logger, schedule = Logger(), Schedule()

    def logged() -> None:
        logger.write("called")

    def function(x: Tensor) -> Tensor:
        logged()
        return x * schedule._inner()

    fwd = fwdcompile.transform(function)
    for logger.count in range(3):
        fwd(X, tangents={"x": X})
    assert len(fwd._cache) == 1


class Slotted:
    """Has a slot that is empty, and is read otherwise then."""

    __slots__ = ("full", "scale")

    def __init__(self) -> None:
        self.full = 2.0

    def __getattr__(self, name: str) -> float:
        return 3.0


def test_slots_are_followed_once_they_are_filled() -> None:
    slotted = Slotted()
    fwd = fwdcompile.transform(lambda x: x * slotted.full * slotted.scale)
    for _ in range(2):
        close(fwd(X, tangents={"x": X})[0], X * slotted.full * slotted.scale)
        slotted.full, slotted.scale = 5.0, 7.0


def test_numbers_that_a_type_of_c_makes_anew_are_no_change() -> None:
    pattern = regex.compile("[ab]", regex.V0)
    watch = Watch(lambda x: x * pattern.flags)
    assert pattern.flags is not pattern.flags
    watch.version()
    assert not watch._is_another()


@pytest.mark.parametrize("kind", [set, collections.deque, collections.OrderedDict, list])
def test_containers_are_followed(kind: Any) -> None:
    things = kind.fromkeys([1.0]) if kind is collections.OrderedDict else kind([1.0])
    fwd = fwdcompile.transform(lambda x: x * sum(things))
    for number in (2.0, 4.0):
        y, _ = fwd(X, tangents={"x": X})
        close(y, X * sum(things))
        {"list": list.append, "deque": collections.deque.append, "set": set.add}.get(
            kind.__name__, lambda d, n: d.update({n: n})
        )(things, number)
    close(fwd(X, tangents={"x": X})[0], X * 7)


def test_hooks_of_all_modules_and_the_default_dtype_are_followed() -> None:
    net = nn.Sequential(nn.Linear(3, 3)).double()
    fwd = fwdcompile.transform(lambda x: net(x) + torch.tensor(1 / 3))
    fwd(X, tangents={"x": X})
    third = torch.tensor(1 / 3)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: 2 * out if isinstance(module, nn.Linear) else None
    )
    try:
        close(fwd(X, tangents={"x": X})[0], net(X) + third)
    finally:
        handle.remove()
    close(fwd(X, tangents={"x": X})[0], net(X) + third)
    torch.set_default_dtype(torch.float64)
    try:
        close(fwd(X, tangents={"x": X})[0], net(X) + 1 / 3)
    finally:
        torch.set_default_dtype(torch.float32)


class Twins(nn.Module):
    """Layers with weights that may be tied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3, bias=False).double() for _ in range(3))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x.to(self.a.weight)).tanh()).tanh())


def tied_otherwise(net: Twins) -> None:
    net.b.weight, net.c.weight = nn.Parameter(net.b.weight.detach().clone() + 1), net.a.weight


def squared(y: Tensor, _: Tensor) -> Tensor:
    return y.square().mean()


STATES: dict[str, Callable[[Twins], Any]] = {
    "untied": lambda net: setattr(net.b, "weight", nn.Parameter(net.c.weight.detach().clone())),
    "tied otherwise": tied_otherwise,
    "another dtype": lambda net: net.float(),
    "another layout": lambda net: setattr(net.c.weight, "data", net.c.weight.data.T),
    "another shape": lambda net: setattr(net.c, "weight", nn.Parameter(net.c.weight.data[:2])),
}


@pytest.mark.parametrize("change", STATES)
def test_parameters_are_replaced_and_tied_between_steps(change: str) -> None:
    net, rate = Twins(), 0.1
    signs = fwdcompile.Rademacher()
    fwd = fwdcompile.transform(net)
    fgd = fwdcompile.FGD(net, squared, lr=rate, directions=signs, compile=False)
    grad = fwdcompile.ForwardGradient(net, squared, directions=signs, compile=False)
    for _ in range(2):
        x = X.to(net.a.weight)
        torch.testing.assert_close(fwd(x, tangents={"x": x}), torch.func.jvp(net, (x,), (x,)))
        net.zero_grad()
        torch.testing.assert_close(grad(x, x), squared(net(x), x))
        assert all(p.grad is not None for p in net.parameters())
        before = [p.detach().clone() for p in net.parameters()]
        loss = squared(net(x), x)
        exact = torch.autograd.grad(loss, [*net.parameters()])
        torch.testing.assert_close(fgd.step(x, x), loss)
        moves = [p.detach() - old for p, old in zip(net.parameters(), before, strict=True)]
        # signs s move by m = -rate (g.s) s: g.m is -rate (g.s)^2, and each number of m^2 -rate g.m
        slope = sum(float((g * move).sum()) for g, move in zip(exact, moves, strict=True))
        for move in moves:
            squares = torch.full_like(move, -rate * slope)
            torch.testing.assert_close(move.square(), squares, rtol=1e-3, atol=1e-9)
        STATES[change](net)


NANS = pytest.param(
    (math.nan, math.nan),
    marks=pytest.mark.skipif(not REVIEWED, reason="torch 2.11 exports for no NaN"),
)


@pytest.mark.parametrize("numbers", [(0.0, -0.0), NANS])
def test_plain_numbers_are_told_apart_by_what_they_do(numbers: tuple[float, float]) -> None:
    def function(x: Tensor, s: float) -> Tensor:
        return torch.atan2(0 * x, torch.full_like(x, 2.0 if math.isnan(s) else s))

    fwd = fwdcompile.transform(function)
    for number in numbers:
        y, _ = fwd(X.abs(), number, tangents={"x": X})
        close(y, function(X.abs(), number))
    assert len(fwd._cache) == len({*map(repr, numbers)})


def in_a_helper(net: nn.Module) -> Callable[[Tensor], Any]:
    def helper(x: Tensor) -> Any:
        return net(x)

    return lambda x: helper(x) * 2


def in_a_list(net: nn.Module) -> Callable[[Tensor], Any]:
    layers = [net]
    return lambda x: layers[0](x)


def in_a_dict(net: nn.Module) -> Callable[[Tensor], Any]:
    layers = {"first": net}
    return lambda x: layers["first"](x)


def in_an_object(net: nn.Module) -> Callable[[Tensor], Any]:
    holder = SimpleNamespace(layer=net)
    return lambda x: holder.layer(x)


def by_a_partial(net: nn.Module) -> Callable[[Tensor], Any]:
    return functools.partial(lambda layer, x: layer(x), net)


REACHED = [in_a_helper, in_a_list, in_a_dict, in_an_object, by_a_partial]


@pytest.mark.parametrize("hold", REACHED)
def test_parameters_that_are_constants_may_be_replaced(hold: Any) -> None:
    layer = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval()).double()
    function = hold(layer)
    fwd = fwdcompile.transform(function)
    old = layer[0].weight
    for turn in range(4):
        if turn == 1:
            layer[0].weight = nn.Parameter(-old.detach())
        if turn == 2:
            layer[1].running_mean = torch.ones(3, dtype=torch.float64)
        if turn == 3:
            layer[0].weight = old
        expected = torch.func.jvp(function, (X,), (X,))
        close(fwd(X, tangents={"x": X}), expected)
        assert fwd.programs <= turn + 1
    with torch.no_grad():
        old.mul_(2)
    close(fwd(X, tangents={"x": X})[0], function(X))
    assert fwd.programs <= 4


def test_a_partial_of_a_module_has_its_parameters() -> None:
    net = nn.Bilinear(3, 3, 2).double()
    fwd = fwdcompile.transform(functools.partial(net, X))
    v = torch.randn_like(net.weight)
    for _ in range(2):
        net.weight = nn.Parameter(torch.randn_like(net.weight))
        y, y_dot = fwd(X, tangents={"weight": v})
        close(y, net(X, X))
        close(y_dot, F.bilinear(X, X, v))
    assert fwd.programs == 1
