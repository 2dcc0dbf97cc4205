"""`jvp` beside torch.func.jvp, and what it keeps of the functions that it was called with."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import fwdcompile
from fwdcompile import TangentError

X = torch.linspace(-1, 1, 3, dtype=torch.float64)


def both(x: Tensor) -> Any:
    return {"y": x.sin()}, [x.floor(), x.long()]


def test_auxiliary_outputs_come_behind() -> None:
    mine = fwdcompile.jvp(both, (X,), (X,), has_aux=True)
    theirs = torch.func.jvp(both, (X,), (X,), has_aux=True)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("out", [lambda x: 2 * x, lambda x: [x, x], lambda x: (x, x, x)])
def test_auxiliary_outputs_are_the_second_of_two(out: Any) -> None:
    with pytest.raises(TangentError, match=r"must return a tuple \(output, aux\), not a "):
        fwdcompile.jvp(out, (X,), (X,), has_aux=True)
    with pytest.raises(TangentError, match=r"must return a tuple \(output, aux\), not a "):
        fwdcompile.jacfwd(out, has_aux=True)(X)


@pytest.mark.parametrize("given", [(X, (X,)), ((X,), X)])
def test_primals_and_tangents_are_tuples(given: Any) -> None:
    with pytest.raises(TangentError, match=r"must be a tuple, not Tensor: write \(x,\)"):
        fwdcompile.jvp(torch.sin, *given)


def test_strict_asks_of_outputs_and_not_of_what_comes_beside() -> None:
    y, _, _ = fwdcompile.jvp(both, (X,), (X,), strict=True, has_aux=True)
    torch.testing.assert_close(y["y"], X.sin())
    with pytest.raises(TangentError, match="strict=True: out.1.0 does not depend on the primals"):
        fwdcompile.jvp(both, (X,), (X,), strict=True)


@dataclass
class Power:
    """Has no hash, as a dataclass that can be changed."""

    of: int

    def __call__(self, x: Tensor) -> Tensor:
        return x**self.of


def test_a_function_without_a_hash() -> None:
    for power in (Power(2), Power(3)):
        _, y_dot = fwdcompile.jvp(power, (X,), (torch.ones_like(X),))
        torch.testing.assert_close(y_dot, power.of * X ** (power.of - 1))
        torch.testing.assert_close(fwdcompile.jacfwd(power)(X), y_dot.diag())


@dataclass(frozen=True)
class Scaled:
    """Equal to any other."""

    by: Tensor = field(compare=False)

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.by


def test_equal_functions_may_compute_something_else() -> None:
    for by in (2 * torch.ones(3), 3 * torch.ones(3)):
        _, y_dot = fwdcompile.jvp(Scaled(by), (X.float(),), (torch.ones(3),))
        torch.testing.assert_close(y_dot, by)


def test_an_object_that_no_weak_reference_finds() -> None:
    class Doubled:
        __slots__ = ("factor",)

        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, x: Tensor) -> Tensor:
            return x * self.factor

    for factor in (2.0, 3.0):
        _, y_dot = fwdcompile.jvp(Doubled(factor), (X,), (X,))
        torch.testing.assert_close(y_dot, factor * X)


def test_a_bound_method_is_captured_once() -> None:
    class Counts:
        calls = 0

        def __call__(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x.sin()

    counts = Counts()
    for _ in range(3):
        fwdcompile.jvp(counts.__call__, (X,), (X,))
    assert counts.calls == 1


def test_functions_of_long_ago_are_forgotten() -> None:
    def ask() -> weakref.ref[Tensor]:
        scaled = Scaled(torch.ones(3, dtype=torch.float64))
        fwdcompile.jvp(lambda x: scaled(x), (X,), (X,))
        return weakref.ref(scaled.by)

    held = [ask() for _ in range(40)]
    gc.collect()
    assert 1 <= sum(ref() is not None for ref in held) <= 32
