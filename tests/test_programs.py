"""Random programs: fwdcompile against torch.func.jvp, and against itself where it has a choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from oracle import REVIEWED
from program_code import Program
from program_moves import FAMILIES
from programs import LEAST_STEPS, programs
from torch import Tensor

import fwdcompile


def like_torch(program: Program) -> None:
    """Values are those of the program bit by bit, tangents those of torch.func.jvp."""
    inputs, others = program.inputs, program.inputs
    y, y_dot = fwdcompile.transform(program.f)(*inputs, tangents=program.tangents)
    assert_equal(y, program.f(*others))
    assert_equal(inputs, others)
    assert_tangents(program, y_dot, torch_jvp(program.f, program.inputs, program.tangents))


def two_directions_like_one_each(program: Program) -> None:
    fwd = fwdcompile.transform(program.f)
    dots = [program.tangents, program.other_tangents]
    y, both = fwd(*program.inputs, tangents=dots)
    for one, y_dot in zip(dots, both, strict=True):
        alone, alone_dot = fwd(*program.inputs, tangents=one)
        assert_equal(y, alone)
        assert_tangents(program, y_dot, alone_dot)


def batched_like_one_each(program: Program) -> None:
    dots = [program.tangents, program.other_tangents]
    both = {name: torch.stack([one[name] for one in dots]) for name in dots[0]}
    y, y_dot = fwdcompile.transform(program.f, batched=True)(*program.inputs, tangents=both)
    for k, one in enumerate(dots):
        alone, alone_dot = fwdcompile.transform(program.f)(*program.inputs, tangents=one)
        assert_equal(y, alone)
        assert_tangents(program, [d if d is None else d[k] for d in y_dot], alone_dot)


def saved_like_generated(program: Program, folder: Path) -> None:
    fwd = fwdcompile.transform(program.f)
    y, y_dot = fwd(*program.inputs, tangents=program.tangents)
    fwd.save(folder / "program.py")
    again = fwdcompile.load(folder / "program.py")(*program.inputs, tangents=program.tangents)
    assert_equal(again[0], y)
    assert_equal(again[1], y_dot)


def passes_change_nothing(program: Program) -> None:
    y, y_dot = fwdcompile.transform(program.f)(*program.inputs, tangents=program.tangents)
    plain = fwdcompile.transform(program.f, passes=())(*program.inputs, tangents=program.tangents)
    assert_equal(y, plain[0])
    assert_tangents(program, y_dot, plain[1])


def second_like_torch(program: Program) -> None:
    """The second derivative along two directions is that of torch.func.jvp nested."""
    u, v = program.other_tangents, program.tangents
    fwd = fwdcompile.transform(fwdcompile.transform(program.f))
    (y, y_dot), (_, y_ddot) = fwd(*program.inputs, tangents=v, inner=u)

    def first(*inputs: Tensor) -> Sequence[Tensor]:
        return torch_jvp(program.f, inputs, u)

    assert_equal(y, program.f(*program.inputs))
    assert_tangents(program, y_dot, first(*program.inputs))
    try:
        expected = torch_jvp(first, program.inputs, v)
    except RuntimeError as error:
        # torch refuses to write to some tangents that are zero, and has no second derivative of
        # some ops: nothing to compare with
        assume("ZeroTensors are immutable" not in str(error))
        assume("that does not support it" not in str(error))
        raise
    assert_tangents(program, y_ddot, expected)


def torch_jvp(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], dots: dict[str, Tensor]
) -> Sequence[Tensor]:
    """Tangents by torch; inputs without one get zeros, so that the program may write to them."""
    full = tuple(dots.get(f"x{i}", torch.zeros_like(x)) for i, x in enumerate(inputs))
    try:
        tangents: Sequence[Tensor] = torch.func.jvp(function, tuple(inputs), full)[1]
    except NotImplementedError as error:
        assume(REVIEWED or "aminmax that does not support it" not in str(error))
        raise
    return tangents


def assert_equal(mine: Sequence[Any], theirs: Sequence[Any]) -> None:
    for ours, other in zip(mine, theirs, strict=True):
        assert ours is other is None or (ours.dtype == other.dtype and torch.equal(ours, other))


def assert_tangents(program: Program, mine: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Tangents agree, relative to the largest number where that exceeds one."""
    for ours, other in zip(mine, theirs, strict=True):
        if ours is None:
            assert other is None or not other.is_floating_point()
            continue
        size = float(other.abs().max()) if other.numel() else 0.0
        bound = program.tolerance * max(1.0, size)
        torch.testing.assert_close(ours, other, rtol=program.tolerance, atol=bound)


def check_programs(
    check: Callable[[Program], None], count: int, number: int = 0, second_order: bool = False
) -> None:
    """Checks at least `count` programs; one that fails is shrunk and printed as code."""
    passed: dict[Program, int] = {}

    def once(program: Program) -> None:
        if program not in passed:
            check(program)
            passed[program] = len(program.steps)

    def missing() -> int:
        return count - sum(size >= LEAST_STEPS for size in passed.values())

    part = 10 * number
    while missing() > 0:  # some are drawn twice, and some are short: these do not count
        drawn(once, max(10, missing() * 4 // 3), part, second_order)
        part += 1


def drawn(
    check: Callable[[Program], None], count: int, number: int, second_order: bool = False
) -> None:
    """Runs a check on programs as hypothesis draws them from a fixed seed."""

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(program=programs(second_order))
    def of(program: Program) -> None:
        check(program)

    of()


def test_like_torch():
    check_programs(like_torch, 40)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 6))
def test_many_like_torch(number):
    check_programs(like_torch, 400, number)


SIZES = [10, pytest.param(200, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", SIZES)
def test_two_directions(count):
    check_programs(two_directions_like_one_each, count)


@pytest.mark.parametrize("count", SIZES)
def test_batches_of_directions(count):
    check_programs(batched_like_one_each, count)


@pytest.mark.parametrize("count", SIZES)
def test_saved(count, tmp_path):
    check_programs(lambda program: saved_like_generated(program, tmp_path), count)


@pytest.mark.parametrize("count", SIZES)
def test_passes(count):
    check_programs(passes_change_nothing, count)


@pytest.mark.parametrize("count", SIZES)
def test_second_order(count):
    check_programs(second_like_torch, count, second_order=True)


@pytest.mark.slow
def test_every_op_is_drawn():
    """No row of the table is dead: each comes about in a program, with operands that fit."""
    used: set[str] = set()
    drawn(lambda program: used.update(step.op.text for step in program.steps), 1500, number=0)
    rows = [op.text for family in FAMILIES.values() for op in family]
    assert [text for text in rows if text not in used] == []


@pytest.mark.slow
def test_a_failing_program_is_shrunk_and_printed_as_a_script():
    def refuses_products(program: Program) -> None:
        assert not any("@" in step.op.text for step in program.steps)

    with pytest.raises(AssertionError) as raised:
        check_programs(refuses_products, 50)
    notes = "\n".join(raised.value.__notes__)
    script = notes[notes.index("import math") : notes.rindex(",\n)")]
    assert script.count("\n    v") <= LEAST_STEPS
    exec(script, {})
