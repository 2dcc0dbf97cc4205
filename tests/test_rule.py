from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fwdcompile
from fwdcompile import rule

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _table() -> Iterator[None]:
    with mock.patch.dict(rule.table):
        yield


@torch.library.custom_op("fwdtest::cube", mutates_args=())
def cube(x: Tensor, scale: float) -> Tensor:
    return x * x * x * scale


@cube.register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


CUBE = torch.ops.fwdtest.cube.default


def test_a_custom_op_without_a_row_is_an_error() -> None:
    with pytest.raises(fwdcompile.MissingRuleError) as error:
        fwdcompile.jvp(lambda x: cube(x, 2.0), (torch.ones(2),), (torch.ones(2),))
    message = str(error.value)
    assert "fwdtest.cube.default" in message
    assert "test_rule.py" in message
    assert "fwdcompile.rule.jvp(torch.ops.fwdtest.cube.default" in message


def test_a_custom_op_with_a_row() -> None:
    rule.jvp(CUBE, x=lambda d, x, scale: 3 * scale * x * x * d)
    x, v = torch.randn(3), torch.randn(3)
    y, y_dot = fwdcompile.jvp(lambda x: cube(x, 2.0), (x,), (v,))
    torch.testing.assert_close(y, 2 * x**3)
    torch.testing.assert_close(y_dot, 6 * x * x * v)


def test_refusal_gives_the_reason() -> None:
    rule.not_implemented(CUBE, "cubes are secret")
    with pytest.raises(fwdcompile.MissingRuleError, match="cubes are secret"):
        fwdcompile.jvp(lambda x: cube(x, 2.0), (torch.ones(2),), (torch.ones(2),))


WRONG: list[tuple[Any, str]] = [
    (lambda: rule.linear(CUBE, wrt="y"), "no argument 'y'"),
    (lambda: rule.linear(CUBE, wrt=()), "names no argument"),
    (lambda: rule.jvp(CUBE, x=lambda d, y: d), "'y' is no argument"),
    (lambda: rule.linear(aten.mm.default, wrt="self"), "has a row already, at linalg"),
    (lambda: rule.linear(aten.mm, wrt="self"), "not an operator overload"),
]


@pytest.mark.parametrize(("declare", "message"), WRONG)
def test_malformed_rows_are_refused(declare: Any, message: str) -> None:
    with pytest.raises(fwdcompile.RuleError, match=message.replace("linalg", ".*linalg")):
        declare()


def test_a_row_that_raises_is_named() -> None:
    rule.jvp(CUBE, x=lambda d: d / len(d.nothing))
    with pytest.raises(fwdcompile.RuleError, match=r"test_rule.py:\d+") as error:
        fwdcompile.jvp(lambda x: cube(x, 2.0), (torch.ones(2),), (torch.ones(2),))
    assert "nothing" in str(error.value)


BAD_TERMS: list[tuple[Any, str]] = [
    (lambda d: 1.0, "not a tensor"),
    (lambda d: d + torch.tensor([1.0, 2.0]), "Python data"),
    (lambda d: d.mul_(2), "in place"),
    (lambda d: torch.complex(d, d), "complex"),
]


@pytest.mark.parametrize(("term", "message"), BAD_TERMS)
def test_terms_that_cannot_be_right(term: Any, message: str) -> None:
    rule.jvp(CUBE, x=term)
    with pytest.raises(fwdcompile.RuleError, match=message):
        fwdcompile.jvp(lambda x: cube(x, 2.0), (torch.ones(2),), (torch.ones(2),))


def test_an_argument_without_a_term_is_an_error() -> None:
    del rule.table[aten.mul.Tensor]
    rule.jvp(aten.mul.Tensor, self=lambda d, other: d * other)
    x = torch.ones(2)
    with pytest.raises(fwdcompile.MissingRuleError, match="no term for argument 'other'"):
        fwdcompile.jvp(lambda a, b: a * b, (x, x), (x, x))
