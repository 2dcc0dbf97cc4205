"""An op of a library without a row has the tangent that its registered backward says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import custom_functions as zoo
import pytest
import torch
from torch import Tensor
from torch.library import custom_op

import fwdcompile

X = torch.linspace(-2.2, 2.4, 12, dtype=torch.float64).view(3, 4)
W = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


@custom_op("registered::gate", mutates_args=())
def gate(x: Tensor, w: Tensor, slope: float = 1.0) -> Tensor:
    return x * torch.sigmoid(slope * w)


def plain_gate(x: Tensor, w: Tensor, slope: float = 1.0) -> Tensor:
    return x * torch.sigmoid(slope * w)


def keep_gate(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, w, slope = inputs
    ctx.save_for_backward(torch.sigmoid(slope * w), output)
    ctx.slope = slope


def gate_backward(ctx: Any, g: Tensor) -> Any:
    s, out = ctx.saved_tensors
    return g * s if ctx.needs_input_grad[0] else None, g * out * (1 - s) * ctx.slope, None


@custom_op("registered::halves", mutates_args=())
def halves(xs: list[Tensor], *, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    a, b = xs
    return a * b * scale, (a > b).long(), a.exp() - b


def plain_halves(xs: list[Tensor], *, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    a, b = xs
    return a * b * scale, (a > b).long(), a.exp() - b


def keep_halves(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ((a, b),) = inputs
    ctx.save_for_backward(a, b)
    ctx.scale = keyword_only_inputs["scale"]


def halves_backward(ctx: Any, g: Tensor, integers: Any, h: Tensor) -> Any:
    a, b = ctx.saved_tensors
    assert ctx.needs_input_grad == ([True, True],)
    return [g * b * ctx.scale + h * a.exp(), g * a * ctx.scale - h]


@custom_op("registered::parts", mutates_args=())
def parts(x: Tensor, count: int) -> list[Tensor]:
    return [x.sin() * (i + 1) for i in range(count)]


def parts_backward(ctx: Any, gs: list[Tensor]) -> Any:
    return sum(g * (i + 1) for i, g in enumerate(gs)) * ctx.saved_tensors[0].cos(), None


@custom_op("registered::signed", mutates_args=())
def signed(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * x, x.sign()


def keep_signed(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def signed_backward(ctx: Any, g: Tensor, of_sign: None) -> Tensor:
    assert of_sign is None
    return g * 2 * ctx.saved_tensors[0]


def keep_first(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])


LIBRARY = torch.library.Library("registered", "FRAGMENT")
LIBRARY.define("cubed(Tensor x) -> Tensor")
LIBRARY.impl("cubed", lambda x: x**3, "CompositeExplicitAutograd")
LIBRARY.define("clipped(Tensor x) -> Tensor")
LIBRARY.impl("clipped", torch.sin, "CompositeExplicitAutograd")
LIBRARY.define("opaque(Tensor x) -> Tensor")
LIBRARY.impl("opaque", torch.sin, "CompositeExplicitAutograd")
LIBRARY.define("opaque_backward(Tensor g, Tensor x) -> Tensor")
LIBRARY.impl("opaque_backward", lambda g, x: g * x.cos(), "CompositeExplicitAutograd")
LIBRARY.define("outer(Tensor x) -> Tensor")
LIBRARY.impl("outer", lambda x: OPS.cubed(x) * 2, "Autograd")
LIBRARY.impl("outer", lambda x: x**3 * 2, "CompositeExplicitAutograd")
LIBRARY.define("called(Tensor x) -> Tensor")
LIBRARY.impl("called", torch.sin, "CompositeExplicitAutograd")
LIBRARY.define("bare(Tensor x) -> Tensor")
LIBRARY.impl("bare", torch.sin, "CompositeExplicitAutograd")
OPS = torch.ops.registered


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    gate.register_fake(lambda x, w, slope=1.0: torch.empty_like(x))
    gate.register_autograd(gate_backward, setup_context=keep_gate)
    halves.register_fake(
        lambda xs, *, scale: (
            torch.empty_like(xs[0]), torch.empty_like(xs[0], dtype=torch.long),
            torch.empty_like(xs[0]),
        )
    )  # fmt: skip
    halves.register_autograd(halves_backward, setup_context=keep_halves)
    parts.register_fake(lambda x, count: [torch.empty_like(x) for _ in range(count)])
    parts.register_autograd(parts_backward, setup_context=keep_first)
    signed.register_fake(lambda x: (torch.empty_like(x), torch.empty_like(x)))
    signed.register_autograd(signed_backward, setup_context=keep_signed)
    for name in ("cubed", "clipped", "opaque", "called", "outer", "bare"):
        torch.library.register_fake(f"registered::{name}", torch.empty_like)
    torch.library.register_fake("registered::opaque_backward", lambda g, x: torch.empty_like(x))
    backwards = {
        "cubed": lambda ctx, g: g * 3 * ctx.saved_tensors[0] ** 2,
        "clipped": lambda ctx, g: g.clamp(-1, 1) * ctx.saved_tensors[0].cos(),
        "called": lambda ctx, g: g * zoo.RoundThrough.apply(*ctx.saved_tensors),
        "opaque": lambda ctx, g: OPS.opaque_backward(g, *ctx.saved_tensors),
    }
    for name, backward in backwards.items():
        torch.library.register_autograd(f"registered::{name}", backward, setup_context=keep_first)


Case = tuple[Callable[..., Any], Callable[..., Any], int]
CASES: dict[str, Case] = {
    "saved in between": (
        lambda x, w: gate(x.sin(), w, 1.5).cos(),
        lambda x, w: plain_gate(x.sin(), w, 1.5).cos(), 2,
    ),
    "default argument": (lambda x: gate(x, W) * x, lambda x: plain_gate(x, W) * x, 1),
    "one tensor twice": (lambda x: gate(x, x), lambda x: plain_gate(x, x), 1),
    "of a library": (lambda x: OPS.cubed(x.sin()), lambda x: x.sin() ** 3, 1),
    "lists, keywords, integers": (
        lambda x, w: torch.where(halves([x, w], scale=2.0)[1] > 0, *halves([w, x], scale=2.0)[::2]),
        lambda x, w: torch.where(x > w, *plain_halves([w, x], scale=2.0)[::2]), 2,
    ),
    "list of results": (
        lambda x: sum(y**2 for y in parts(x, 3)),
        lambda x: sum((x.sin() * (i + 1)) ** 2 for i in range(3)), 1,
    ),
    "non-differentiable": (
        lambda x: signed(x)[0] * signed(x)[1], lambda x: x * x * x.sign(), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tangents(case: str) -> None:
    function, plain, count = CASES[case]
    x, dots = (X, W)[:count], (X.cos(), W.sin())[:count]
    found = fwdcompile.jvp(function, x, dots)
    torch.testing.assert_close(found, torch.func.jvp(plain, x, dots))


def test_torch_takes_the_tangent_of_an_op_for_zero() -> None:
    y, y_dot = torch.func.jvp(lambda x: OPS.cubed(x), (X,), (W,))
    torch.testing.assert_close(y, X**3)
    assert not y_dot.any()


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives(case: str) -> None:
    function, plain, count = CASES[case]
    dots = {"x": X.cos(), "w": W.sin()}
    names = list(dots)[:count]
    twice = fwdcompile.transform(fwdcompile.transform(function))
    found = twice(*(X, W)[:count], tangents={name: dots[name] for name in names})

    def once(*x: Tensor) -> Tensor:
        return torch.func.jvp(plain, x, tuple(dots[name] for name in names))[1]

    expected = torch.func.jvp(once, (X, W)[:count], tuple(dots[name] for name in names))[1]
    torch.testing.assert_close(found[1][1], expected)


def test_one_argument_may_have_no_tangent() -> None:
    fwd = fwdcompile.transform(CASES["saved in between"][0])
    _, found = fwd(X, W, tangents={"w": W.sin()})
    expected = torch.func.jvp(lambda w: plain_gate(X.sin(), w, 1.5).cos(), (W,), (W.sin(),))[1]
    torch.testing.assert_close(found, expected)


def test_several_directions_and_a_branch() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        return torch.cond(w.sum() > -9, lambda x, w: gate(x, w), lambda x, w: x * w, (x, w))

    fwd = fwdcompile.transform(model)
    dots = [{"x": X.cos(), "w": W.sin()}, {"x": X.sin(), "w": W.cos()}]
    _, found = fwd(X, W, tangents=dots)
    for dot, y_dot in zip(dots, found, strict=True):
        expected = torch.func.jvp(plain_gate, (X, W), (dot["x"], dot["w"]))[1]
        torch.testing.assert_close(y_dot, expected)


def test_autograd_goes_through_the_program() -> None:
    x = X.clone().requires_grad_()
    y, y_dot = fwdcompile.jvp(lambda x: gate(x, x), (x,), (W,))
    expected = torch.func.jvp(lambda x: plain_gate(x, x), (x,), (W,))
    found, wanted = (a.sum() + (b * W).sum() for a, b in ((y, y_dot), expected))
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(wanted, x))


def test_calls_that_differ_in_nothing_share_one_derivative() -> None:
    calls = 0

    def counted(ctx: Any, g: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return gate_backward(ctx, g)

    gate.register_autograd(counted, setup_context=keep_gate)
    fwdcompile.jvp(lambda x, w: gate(gate(gate(x, w), w), w), (X, W), (W, X))
    assert calls == 1
    fwdcompile.jvp(lambda x, w: gate(x, w, 2.0), (X, W), (W, X))
    assert calls == 2
    gate.register_autograd(gate_backward, setup_context=keep_gate)


def test_training_goes_through_an_op() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4).double()
    fgd = fwdcompile.FGD(lambda x, y: ((gate(model(x), x) - y) ** 2).mean(), lr=0.03, compile=False)
    losses = [float(fgd.step(X, W)) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]


REFUSED = {
    "clipped": r"registered\.clipped\.default is not linear.*fwdcompile\.rule\.jvp",
    "called": r"calls a torch\.autograd\.Function.*fwdcompile\.rule\.jvp",
    "opaque": r"calls registered\.opaque_backward\.default.*fwdcompile\.rule\.jvp",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_derivative_is_refused(name: str) -> None:
    message = rf"(?s)test_registered.py:\d+: .*{REFUSED[name]}"
    with pytest.raises(fwdcompile.RuleError, match=message):
        fwdcompile.jvp(lambda x: getattr(OPS, name)(x), (X,), (W,))


def test_a_failing_backward_is_told() -> None:
    gate.register_autograd(lambda ctx, g: 1 / 0, setup_context=keep_gate)
    with pytest.raises(fwdcompile.RuleError, match=r"(?s)test_registered.py:\d+.*division by zero"):
        fwdcompile.jvp(lambda x: gate(x, x, 3.0), (X,), (W,))
    gate.register_autograd(gate_backward, setup_context=keep_gate)


def test_open_sizes_are_refused() -> None:
    fwd = fwdcompile.transform(lambda x: gate(x, x), dynamic=True)
    with pytest.raises(fwdcompile.RuleError, match=r"(?s)registered.gate.*dynamic=True"):
        fwd(X, tangents={"x": W})


def test_an_op_without_a_backward_needs_a_row() -> None:
    with pytest.raises(fwdcompile.MissingRuleError, match=r"fwdcompile\.rule\.jvp\(torch\.ops"):
        fwdcompile.jvp(lambda x: OPS.bare(x), (X,), (W,))


def test_an_op_that_calls_another_does_not_take_its_backward() -> None:
    _, y_dot = fwdcompile.jvp(lambda x: OPS.outer(x), (X,), (W,))
    torch.testing.assert_close(y_dot, 6 * X**2 * W)


def test_a_row_comes_first() -> None:
    with mock.patch.dict(fwdcompile.rule.table):
        fwdcompile.rule.jvp(OPS.cubed.default, x=lambda d: d * 7)
        torch.testing.assert_close(fwdcompile.jvp(lambda x: OPS.cubed(x), (X,), (W,))[1], W * 7)
