"""Routes: later calls of a kind skip the checks of the first, and give what it would give."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fwdcompile
from fwdcompile.forward import Forward
from fwdcompile.route import Given, flatten


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@contextmanager
def only_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No call may look for its route."""
    with monkeypatch.context() as patch:
        patch.setattr(Forward, "_lowered", None)
        yield


@dataclass
class Pair:
    left: Tensor
    right: Tensor


def mixed(x: Tensor, more: dict[str, Any], *, scale: float, pair: Pair) -> dict[str, Any]:
    return {"sum": (x * more["y"]).sum() * scale + pair.left.sin(), "flag": scale, "n": pair.right}


def mixed_call() -> tuple[tuple[Any, ...], dict[str, Any]]:
    pair = Pair(tensor(2), tensor(3))
    return (tensor(4), {"y": tensor(4), "z": None}), {"scale": 2.0, "pair": pair}


def test_arguments_of_any_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    fwd = fwdcompile.transform(mixed)

    def check() -> None:
        (x, more), named = mixed_call()
        x_dot, left_dot = tensor(4), tensor(2)
        y, y_dot = fwd(x, more, **named, tangents={"x": x_dot, "pair.left": left_dot})
        pair = named["pair"]
        torch.testing.assert_close(y, mixed(x, more, **named))
        slope = (x_dot * more["y"]).sum() * 2 + pair.left.cos() * left_dot
        torch.testing.assert_close(y_dot["sum"], slope)
        assert y_dot["flag"] is None and not y_dot["n"].any()

    check()
    with only_known(monkeypatch):
        check()


def test_the_order_of_names_is_a_part_of_the_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    fwd = fwdcompile.transform(lambda x, y: x.sin() * y)
    for _ in range(2):
        x, y, x_dot, y_dot = (tensor(3) for _ in range(4))
        expected = x.cos() * y * x_dot + x.sin() * y_dot
        for tangents in ({"x": x_dot, "y": y_dot}, {"y": y_dot, "x": x_dot}):
            torch.testing.assert_close(fwd(x, y, tangents=tangents)[1], expected)
            torch.testing.assert_close(fwd(y=y, x=x, tangents=tangents)[1], expected)


def test_a_tensor_given_twice_is_no_rule_for_later_calls() -> None:
    fwd = fwdcompile.transform(lambda x, y: x.sin() * y)
    x, y, v, w = (tensor(3) for _ in range(4))
    fwd(x, x, tangents={"x": v, "y": v})
    found = fwd(x, y, tangents={"x": v, "y": w})
    torch.testing.assert_close(found, torch.func.jvp(lambda x, y: x.sin() * y, (x, y), (v, w)))


KINDS: dict[str, Callable[[nn.Module, Tensor, list[Tensor]], tuple[Any, Any]]] = {
    "one": lambda net, x, v: (fwdcompile.transform(net), {"tangents": {"weight": v[0]}}),
    "several": lambda net, x, v: (
        fwdcompile.transform(net),
        {"tangents": [{"weight": v[0]}, {"weight": v[1]}]},
    ),
    "rank-one": lambda net, x, v: (
        fwdcompile.transform(net),
        {"tangents": {"weight": fwdcompile.RankOne(v[0][:, 0].clone(), v[1][0].clone())}},
    ),
    "batched": lambda net, x, v: (
        fwdcompile.transform(net, batched=True),
        {"tangents": {"weight": torch.stack(v)}},
    ),
    "second": lambda net, x, v: (
        fwdcompile.transform(fwdcompile.transform(net)),
        {"tangents": {"weight": v[0]}},
    ),
    "second, inner": lambda net, x, v: (
        fwdcompile.transform(fwdcompile.transform(net)),
        {"tangents": {"weight": v[0]}, "inner": {"weight": v[1]}},
    ),
    "third": lambda net, x, v: (
        fwdcompile.transform(fwdcompile.transform(fwdcompile.transform(net))),
        {"tangents": {"weight": v[0]}},
    ),
    "laplacian": lambda net, x, v: (
        fwdcompile.laplacian(net),
        {"tangents": [{"weight": v[0]}], "first": [{"weight": v[1]}]},
    ),
}


class Net(nn.Module):
    """Its weight is curved; it counts its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensor(3, 2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(x @ self.weight.mT).exp()


@pytest.mark.parametrize("kind", KINDS)
def test_later_calls_are_as_first_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    run = None
    for turn in range(3):
        x, v = tensor(4, 2), [tensor(3, 2), tensor(3, 2)]
        fresh, given = KINDS[kind](net, x, v)
        run = run or fresh
        net.weight = nn.Parameter(tensor(3, 2))
        calls = float(net.calls)
        expected = fresh(x, **given)
        net.calls.fill_(calls)
        if turn:
            with only_known(monkeypatch):
                found = run(x, **given)
        else:
            found = run(x, **given)
        assert float(net.calls) == calls + 1
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_jvp_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor, more: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return x * more["y"], more["y"].exp()

    for known in (False, True):
        primals, tangents = ((tensor(3), {"y": tensor(3)}) for _ in range(2))
        expected = torch.func.jvp(function, primals, tangents)
        if known:
            with only_known(monkeypatch):
                found = fwdcompile.jvp(function, primals, tangents)
        else:
            found = fwdcompile.jvp(function, primals, tangents)
        torch.testing.assert_close(found, expected)


def test_what_does_not_fit_is_refused_after_what_fits() -> None:
    fwd = fwdcompile.transform(lambda x, weight: x @ weight.mT)
    x, w = tensor(4, 2), tensor(3, 2)
    fwd(x, w, tangents={"weight": w})
    for wrong in (w.mT, w.float(), 1.0, fwdcompile.RankOne(w[0], w[0])):
        with pytest.raises(fwdcompile.TangentError):
            fwd(x, w, tangents={"weight": wrong})
    with pytest.raises(fwdcompile.TangentError, match="nothing is called"):
        fwd(x, w, tangents={"wait": w})
    with pytest.raises(fwdcompile.TangentError, match="by name"):
        fwd(x, w, tangents=w)
    with pytest.raises(fwdcompile.TangentError, match="no tangent given"):
        fwd(x, w, tangents={})


def test_tangents_of_another_layout_are_laid_out_each_time() -> None:
    fwd = fwdcompile.transform(lambda x: x.flatten().sin())
    for _ in range(2):
        x, x_dot = tensor(3, 2), tensor(2, 3).mT
        torch.testing.assert_close(fwd(x, tangents={"x": x_dot})[1], (x.cos() * x_dot).flatten())


def test_tied_parameters_by_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    net[2].weight = net[0].weight
    fwd = fwdcompile.transform(net)
    for name in ("0.weight", "2.weight"):
        for known in (False, True):
            x, v = tensor(3, 2), tensor(2, 2)

            def function(w: Tensor, x: Tensor = x) -> Any:
                return functional_call(net, {"0.weight": w, "2.weight": w}, (x,))

            expected = torch.func.jvp(function, (net[0].weight,), (v,))
            if known:
                with only_known(monkeypatch):
                    found = fwd(x, tangents={name: v})
            else:
                found = fwd(x, tangents={name: v})
            torch.testing.assert_close(found, expected)


def test_replaced_modules_are_not_kept() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()
    fwd = fwdcompile.transform(net)
    x = tensor(3, 2)
    fwd(x, tangents={"input": x})
    old = weakref.ref(net[0].weight)
    net[0] = nn.Linear(2, 2).double()
    y, _ = fwd(x, tangents={"input": x})
    torch.testing.assert_close(y, net(x))
    gc.collect()
    assert old() is None


def test_plain_tensors_are_leaves_as_they_are() -> None:
    x, y = tensor(2), tensor(2)
    assert flatten((x, y), {}) == ([x, y], 2)
    leaves, spec = flatten((x, 1.5), {"pair": Pair(x, y)})
    assert leaves == [x, 1.5, x, y] and spec == flatten((y, 2.5), {"pair": Pair(y, y)})[1]


def test_kinds_of_calls() -> None:
    x, y = tensor(2), tensor(2)

    def kind(*args: Any, tangents: Any, inner: Any = None, **kwargs: Any) -> Any:
        return Given.of(args, kwargs, tangents, inner).kind

    alike = kind(x, tangents={"x": y})
    assert alike == kind(y, tangents={"x": x})
    assert hash(alike) == hash(kind(y, tangents={"x": x}))
    others = [
        kind(x, tangents={"y": y}),
        kind(x, tangents=[{"x": y}]),
        kind(x, tangents={"x": y}, inner={"x": y}),
        kind(x=x, tangents={"x": y}),
        kind([x], tangents={"x": y}),
        kind(x, tangents={"x": fwdcompile.RankOne(y, y)}),
        kind(x.float(), tangents={"x": y}),
        kind(x, tangents={"x": y[:1]}),
        kind(x, 0.0, tangents={"x": y}),
        kind(x, -0.0, tangents={"x": y}),
    ]
    assert len({alike, *others}) == len(others) + 1
