"""Verdicts of benchmarks/beyond_torch.py, on answers whose worth is known."""

from __future__ import annotations

import beyond_torch
import opinfo
import pytest
import torch
from beyond_torch import five_points, judge, relative
from torch import Tensor

X, V = torch.tensor([0.3, -1.1], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)


def cube(x: Tensor) -> list[Tensor]:
    return [x**3]


TRUE = [3 * X**2 * V]


def test_differences_by_five_points_have_a_small_error() -> None:
    assert relative(five_points(lambda x: [x.exp()], [X], [V], 1e-3), [X.exp() * V]) < 1e-11


def test_nans_must_be_at_the_same_places() -> None:
    gap = torch.tensor([float("nan"), 1.0])
    assert relative([gap], [gap]) == 0
    assert relative([gap], [torch.ones(2)]) == float("inf")


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        (TRUE, "right"),
        ([0 * X], "wrong: zero"),
        ([1.1 * TRUE[0]], "wrong by 9e-02"),
        ("raises: no", "raises: no"),
    ],
)
def test_verdicts(theirs: list[Tensor] | str, verdict: str) -> None:
    said, error = judge(TRUE, theirs, cube, [X], [V])
    assert said == verdict
    assert error is None if verdict == "right" else error < 1e-9


def test_no_verdict_is_given_against_what_differences_do_not_show() -> None:
    assert judge([2 * TRUE[0]], [3 * TRUE[0]], cube, [X], [V])[0] == "another convention"


def test_a_sample_of_the_database() -> None:
    (case,) = opinfo.cases(opinfo.entries()["sinh"], limit=1)
    found = beyond_torch.compare(case)
    assert (found["first"], found["second"]) == ("right", "right")
