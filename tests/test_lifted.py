"""Functions written in a loop: one program serves all that differ in the tensors they hold."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fwdcompile
from fwdcompile import kept
from fwdcompile.errors import CaptureError
from fwdcompile.lifted import Lifted, lifted
from fwdcompile.lowering import Lowering

SCALE = 2.0


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    for table in (kept._kept, kept._unlifted):
        table.clear()
    yield
    for table in (kept._kept, kept._unlifted):
        table.clear()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models of which programs were made, in order."""
    models: list[Any] = []
    make = Lowering._made

    def counted(self: Lowering, *args: Any) -> Any:
        models.append(self.base)
        return make(self, *args)

    monkeypatch.setattr(Lowering, "_made", counted)
    return models


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def plain(x: Tensor, y: Tensor) -> Tensor:
    return torch.sin(x) * y


class Owner:
    """Its method writes a function in each call."""

    def __init__(self) -> None:
        self.net = NET

    def function(self, y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: self.net(x) * y


OWNER = Owner()


class Batch(NamedTuple):
    image: Tensor
    label: Tensor


def in_closure(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: NET(x) * y


def with_a_module(y: Tensor, net: nn.Module = NET) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        return net(x) * y

    return function


def by_a_helper(y: Tensor) -> Callable[[Tensor], Tensor]:
    def helper(x: Tensor, power: int = 2) -> Tensor:
        return x**power * y

    def function(x: Tensor) -> Tensor:
        return helper(torch.sin(x)) + helper(x, power=3)

    return function


def in_a_batch(y: Tensor) -> Callable[[Tensor], Tensor]:
    batch = {"y": y, "more": [y + 1, (y - 1, 0.5)], "name": "b"}
    return lambda x: x.sin() * batch["y"] + batch["more"][0] * x * batch["more"][1][1]


def in_defaults(y: Tensor) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor, z: Tensor = y, *, w: Tensor = y + 1) -> Tensor:
        return x.exp() * z + w * x

    return function


def by_functional_call(y: Tensor) -> Callable[[Tensor], Tensor]:
    values = {name: p.detach() * y.mean() for name, p in NET.named_parameters()}
    return lambda x: functional_call(NET, values, (x,))


def decorated(y: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.func.grad(lambda x: (NET(x) * y).square().sum())


WRITTEN: dict[str, Callable[[Tensor], Callable[..., Any]]] = {
    "closure": in_closure,
    "closure and module": with_a_module,
    "helper": by_a_helper,
    "batch": in_a_batch,
    "defaults": in_defaults,
    "partial": lambda y: functools.partial(plain, y=y),
    "partial of a closure": lambda y: functools.partial(lambda x, z: x.sin() * z * y, z=y + 1),
    "method": OWNER.function,
    "functional_call": by_functional_call,
    "grad": decorated,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_one_program_for_all(name: str, made: list[Any]) -> None:
    for _ in range(3):
        function = WRITTEN[name](tensor(3))
        x, v = tensor(2, 3), tensor(2, 3)
        expected = torch.func.jvp(function, (x,), (v,))
        torch.testing.assert_close(fwdcompile.jvp(function, (x,), (v,)), expected)
    assert len(made) == 1


@pytest.mark.parametrize("name", ["closure", "helper", "partial", "grad"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_jacobians(name: str, chunk_size: int | None, made: list[Any]) -> None:
    for _ in range(2):
        function, x = WRITTEN[name](tensor(3)), tensor(3)
        found = fwdcompile.jacfwd(function, chunk_size=chunk_size)(x)
        torch.testing.assert_close(found, torch.func.jacfwd(function)(x))
        programs = len(made)
    assert programs == (1 if chunk_size is None else 2)  # the last chunk is shorter


def test_what_else_differs_is_another_program(made: list[Any]) -> None:
    x, v, y = tensor(3), tensor(3), tensor(3)

    def scaled(scale: float, net: nn.Module, y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: net(x) * y * scale

    other = nn.Linear(3, 3).double()
    for scale, net in ((0.5, NET), (2.0, NET), (0.5, other), (-0.0, NET), (0.0, NET)):
        function = scaled(scale, net, y)
        expected = torch.func.jvp(function, (x,), (v,))
        torch.testing.assert_close(fwdcompile.jvp(function, (x,), (v,)), expected)
    assert len(made) == 5
    fwdcompile.jvp(scaled(2.0, NET, tensor(3)), (x,), (v,))
    assert len(made) == 5


def test_other_shapes_dtypes_and_ties_of_what_is_held(made: list[Any]) -> None:
    def product(y: Tensor, z: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x.sin() * y + x * z

    x, v = tensor(3), tensor(3)
    y, z = tensor(3), tensor(3)
    for pair in ((y, z), (y, y), (z, y), (y[:1], z), (y.float(), z), (z, z)):
        function = product(*pair)
        expected = torch.func.jvp(function, (x,), (v,))
        torch.testing.assert_close(fwdcompile.jvp(function, (x,), (v,)), expected)
    assert len(made) == 4


def test_a_primal_may_be_held_too(made: list[Any]) -> None:
    def product(y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x.sin() * y

    for _ in range(2):
        x, v = tensor(3), tensor(3)
        found = fwdcompile.jvp(product(x), (x,), (v,))
        torch.testing.assert_close(found, (x.sin() * x, x.cos() * x * v))
    assert len(made) == 1


def test_autograd_reaches_what_is_held() -> None:
    y = tensor(3).requires_grad_()
    x, v = tensor(3), tensor(3)
    _, dot = fwdcompile.jvp(lambda x: (x.sin() * y).sum(), (x,), (v,))
    (found,) = torch.autograd.grad(dot, y)
    torch.testing.assert_close(found, x.cos() * v)


def test_what_is_held_may_be_written_to(made: list[Any]) -> None:
    def counting(seen: Tensor) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            seen.add_(x.detach().sum())
            return x.sin()

        return function

    for _ in range(2):
        x, seen = tensor(3), torch.ones((), dtype=torch.float64)
        fwdcompile.jvp(counting(seen), (x,), (x,))
        torch.testing.assert_close(seen, 1 + x.sum())
    assert len(made) == 1


def test_decisions_by_what_is_held(made: list[Any]) -> None:
    def deciding(flag: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x.sin() if flag > 0 else x.exp()

    x, v = tensor(3), tensor(3)
    for number in (1.0, -1.0, 1.0, -1.0):
        function = deciding(torch.tensor(number))
        expected = torch.func.jvp(deciding(torch.tensor(number)), (x,), (v,))
        torch.testing.assert_close(fwdcompile.jvp(function, (x,), (v,)), expected)
    assert all(not isinstance(model, Lifted) for model in made[1:])


def test_errors_are_those_of_the_function_itself() -> None:
    def branching(y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x * y if x.sum() > 0 else x

    for _ in range(2):
        with pytest.raises(CaptureError, match="decides in Python by the value of a tensor"):
            fwdcompile.jvp(branching(tensor(3)), (tensor(3),), (tensor(3),))


def test_state_that_changes_between_rounds_is_seen() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x.sin() * self.scale

    net = Scaled()

    def written(y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: net(x) * y

    for scale in (1.0, 2.0, 1.0):
        net.scale = scale
        x, v, y = tensor(3), tensor(3), tensor(3)
        found = fwdcompile.jvp(written(y), (x,), (v,))
        torch.testing.assert_close(found[1], x.cos() * v * scale * y)


def test_parameters_behind_a_closure_are_read_anew(made: list[Any]) -> None:
    net = nn.Linear(3, 3).double()

    def written(y: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.tanh(net(x)) * y

    for _ in range(2):
        with torch.no_grad():
            net.weight.normal_()
        function, x, v = written(tensor(3)), tensor(3), tensor(3)
        expected = torch.func.jvp(function, (x,), (v,))
        torch.testing.assert_close(fwdcompile.jvp(function, (x,), (v,)), expected)
    assert len(made) == 1


def test_tensors_are_not_kept() -> None:
    y = tensor(3)
    held = weakref.ref(y)
    fwdcompile.jvp(in_closure(y), (tensor(3),), (tensor(3),))
    del y
    gc.collect()
    assert held() is None


def test_a_function_that_no_name_tells_is_captured_by_itself() -> None:
    def early() -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            return x * later if x.ndim else x

        assert lifted(function) is None
        later = torch.ones(3, dtype=torch.float64)
        return function

    x = tensor(3)
    torch.testing.assert_close(fwdcompile.jvp(early(), (x,), (x,))[1], x)

    def power(x: Tensor, n: int = 3) -> Tensor:
        return x * power(x, n - 1) if n else torch.ones_like(x)

    assert lifted(power) is None
    torch.testing.assert_close(fwdcompile.jvp(power, (x,), (x,))[1], 3 * x**3)


def test_many_states_of_one_function_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_PROGRAMS", 3)
    x = tensor(3)
    for size in range(1, 9):
        fwdcompile.jvp(lambda x: x.sin(), (x[:1].expand(size),), (x[:1].expand(size),))
    (forward,) = kept._kept.values()
    assert forward.programs <= 4


def test_keys() -> None:
    def key(function: Any) -> Any:
        found = lifted(function)
        assert found is not None
        assert hash(found.key) == hash(lifted(function).key)  # type: ignore[union-attr]
        return found.key

    def written(thing: Any) -> Callable[[Tensor], Any]:
        return lambda x: (x, thing)

    class Empty:
        pass

    same = Empty()
    alike: list[tuple[Any, Any]] = [
        (tensor(3), tensor(2)),
        ((1, tensor(3)), (1, tensor(2))),
        ([tensor(3)], [tensor(2)]),
        ({"a": tensor(3)}, {"a": tensor(2)}),
        (torch.Size([2]), torch.Size([2])),
        (0.5, 0.5),
        (same, same),
        (NET.forward, NET.forward),
    ]
    for one, other in alike:
        assert key(written(one)) == key(written(other))
    apart: list[tuple[Any, Any]] = [
        (tensor(3), 1.0),
        (1, True),
        (0.0, -0.0),
        ((1, tensor(3)), (2, tensor(3))),
        ([tensor(3)], (tensor(3),)),
        ({"a": tensor(3)}, {"b": tensor(3)}),
        (Empty(), Empty()),
        (NET.forward, OWNER.function),
        (Batch(tensor(1), tensor(2)), Batch(tensor(1), tensor(2))),  # taken as it is
        (lambda x: x, lambda x: x + 1),
    ]
    for one, other in apart:
        assert key(written(one)) != key(written(other))


def test_a_cache_that_capture_fills_is_the_functions_own() -> None:
    def cached() -> Callable[[Tensor], Tensor]:
        places: dict[str, Tensor] = {}

        def function(x: Tensor) -> Tensor:
            if "places" not in places:
                places["places"] = torch.arange(3, dtype=torch.float64)
            return x.sin() * places["places"]

        return function

    function = cached()
    for _ in range(3):
        x = tensor(3)
        _, dot = fwdcompile.jvp(function, (x,), (x,))
        torch.testing.assert_close(dot, x.cos() * x * torch.arange(3.0, dtype=torch.float64))


def test_sparse_tensors_are_held_as_they_are() -> None:
    a = torch.eye(3, dtype=torch.float64).to_sparse()
    found = lifted(lambda x: torch.sparse.mm(a, x))
    assert found is not None and not found.tensors


@pytest.mark.compiled
def test_a_program_of_many_functions_is_compiled_once(made: list[Any]) -> None:
    for _ in range(2):
        y = tensor(3)
        x, v = tensor(2, 3), tensor(2, 3)
        expected = torch.func.jvp(in_closure(y), (x,), (v,))
        found = fwdcompile.jvp(in_closure(y), (x,), (v,), compile=True)
        torch.testing.assert_close(found, expected)
    assert len(made) == 1


def test_a_jvp_kept_out_of_autograd() -> None:
    y = tensor(3).requires_grad_()
    x, v = tensor(3), tensor(3)
    out, dot = fwdcompile.jvp(lambda x: x.sin() * y, (x,), (v,), tracks_grad=False)
    assert out.requires_grad and not dot.requires_grad
    torch.testing.assert_close(dot, x.cos() * v * y.detach())


NUMBERS = np.ones(1)
MANY = dict.fromkeys(range(100), 1.0)


def by_an_array(x: Tensor) -> Tensor:
    return x.sin() * float(NUMBERS[0])


def test_what_is_not_looked_at_is_read_by_each_function_anew(made: list[Any]) -> None:
    def written(y: Tensor, numbers: Any) -> list[Callable[[Tensor], Tensor]]:
        return [
            lambda x: x.sin() * y * float(numbers[0]),
            lambda x: by_an_array(x) * y,
            lambda x: x.sin() * y * MANY[0],
        ]

    for number in (1.0, 2.0, 3.0):
        NUMBERS[0] = MANY[0] = number
        x, v, y = tensor(3), tensor(3), tensor(3)
        for function in written(y, NUMBERS):
            for _ in range(2):
                _, dot = fwdcompile.jvp(function, (x,), (v,))
                torch.testing.assert_close(dot, x.cos() * v * y * number)
    assert len(made) == 9
