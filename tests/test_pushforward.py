"""The derivative of a torch.autograd.Function is its own, by its jvp or its backward transposed."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import custom_functions as zoo
import pytest
import torch
from test_reassociate import made
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd import forward_ad as fwAD

import fwdcompile

X = torch.linspace(-2.2, 2.4, 12, dtype=torch.float64).view(3, 4)
W = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)
B = torch.tensor([0.3, -0.2], dtype=torch.float64)
IMAGE = torch.linspace(-1, 1, 50, dtype=torch.float64).sin().view(1, 2, 5, 5)
KERNEL = torch.linspace(-1, 1, 54, dtype=torch.float64).cos().view(3, 2, 3, 3)

BOUND = zoo.RoundThrough.apply  # as models keep it

CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "lying": (lambda x: zoo.Lying.apply(x.sin()) * x, (X,)),
    "rectified": (lambda x: zoo.Rectified.apply(x * 2).sum(0), (X,)),
    "through": (lambda x: zoo.RoundThrough.apply(x * 3) ** 2, (X,)),
    "bound": (lambda x: BOUND(x * 3) * x, (X,)),
    "reversed": (lambda x: zoo.Reversed.apply(x, 0.5) * x, (X,)),
    "linear": (lambda x, w, b: zoo.Linear.apply(x, w, b).tanh(), (X, W, B)),
    "linear without bias": (lambda x, w: zoo.Linear.apply(x, w).tanh(), (X, W)),
    "softmax": (lambda x: zoo.Softmax.apply(x) * x, (X,)),
    "sorted": (lambda x: zoo.Sorted.apply(x.cos())[0].cumsum(-1), (X,)),
    "cube": (lambda x: [y * x for y in zoo.Cube.apply(x, 2.0)], (X,)),
    "products": (lambda x, y: zoo.Products.apply(x.sin(), y), (X, X.flip(0))),
    "one product": (lambda x, y: zoo.Products.apply(x.sin(), y)[1], (X, X.flip(0))),
    "convolved": (lambda x, w: zoo.Convolved.apply(x, w).tanh(), (IMAGE, KERNEL)),
    "sigmoid": (lambda x: zoo.Sigmoid.apply(x * x), (X,)),
    "modulus": (lambda x: zoo.Modulus.apply(torch.complex(x, x.sin())), (X,)),
    "spread": (lambda x: zoo.Spread.apply(x).tanh(), (B,)),
    "pullback": (lambda x: zoo.Pullback.apply(x * 2), (X,)),
}


def along(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape).cos()


def listed(y: Any) -> list[Tensor]:
    return list(y) if isinstance(y, tuple | list) else [y]


def oracle(function: Callable[..., Any], x: tuple[Tensor, ...], dots: list[Tensor | None]) -> Any:
    """J x_dot from torch's reverse mode, row by row."""

    rows = torch.autograd.functional.jacobian(lambda *x: tuple(listed(function(*x))), x)
    return [
        sum((part.flatten(-d.ndim) @ d.flatten() for part, d in zip(of, dots, strict=True)
             if d is not None), torch.zeros(()))
        for of in rows
    ]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tangents_are_those_of_its_own_derivative(case: str) -> None:
    function, x = CASES[case]
    dots = list(map(along, x))
    y, y_dot = fwdcompile.jvp(function, x, tuple(dots))
    torch.testing.assert_close(y, function(*x))
    torch.testing.assert_close(listed(y_dot), oracle(function, x, dots), atol=1e-9, rtol=1e-9)


def test_torch_has_no_forward_derivative_of_a_backward() -> None:
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(*CASES["through"], (along(X),))
    with fwAD.dual_level(), pytest.raises(RuntimeError, match="implement the jvp function"):
        CASES["through"][0](fwAD.make_dual(X, along(X)))


@pytest.mark.parametrize("case", [case for case, (_, x) in CASES.items() if len(x) > 1])
def test_a_tangent_may_be_absent(case: str) -> None:
    function, x = CASES[case]
    named = dict(zip(["x", "y" if "product" in case else "w", "b"], x, strict=False))
    forward = fwdcompile.transform(function)
    for i, name in enumerate(named):
        dots = [along(part) if i == k else None for k, part in enumerate(x)]
        _, y_dot = forward(*x, tangents={name: along(x[i])})
        torch.testing.assert_close(listed(y_dot), oracle(function, x, dots), atol=1e-9, rtol=1e-9)


def twice(function: Callable[..., Any], x: tuple[Tensor, ...]) -> list[Tensor]:
    dots = tuple(map(along, x))
    forward = fwdcompile.transform(fwdcompile.transform(function))
    names = inspect.signature(function).parameters
    (_, first), (_, second) = forward(*x, tangents=dict(zip(names, dots, strict=True)))
    torch.testing.assert_close(first, fwdcompile.jvp(function, x, dots)[1])
    return listed(second)


FALSE = ["lying", "through", "bound", "reversed"]


@pytest.mark.parametrize("case", [case for case in CASES if case not in (*FALSE, "sigmoid")])
def test_second_derivatives(case: str) -> None:
    function, x = CASES[case]
    dots, step = tuple(map(along, x)), 1e-5

    def first(by: float) -> list[Tensor]:
        moved = tuple(p + by * d for p, d in zip(x, dots, strict=True))
        return listed(fwdcompile.jvp(function, moved, dots)[1])

    differences = [(a - b) / (2 * step) for a, b in zip(first(step), first(-step), strict=True)]
    torch.testing.assert_close(twice(function, x), differences, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", FALSE)
def test_second_derivatives_of_what_the_first_one_is_said_to_be(case: str) -> None:
    function, x = CASES[case]
    _, product = torch.autograd.functional.hvp(lambda x: function(x).sum(), x, tuple(map(along, x)))
    curvature = sum((p * along(part)).sum() for p, part in zip(product, x, strict=True))
    torch.testing.assert_close(sum(part.sum() for part in twice(function, x)), curvature)


def test_a_second_derivative_through_what_was_saved_on_the_way_is_refused() -> None:
    with pytest.raises(fwdcompile.MissingRuleError, match="has saved it, and it is neither"):
        twice(*CASES["sigmoid"])


def sine(backward: Callable[[Any, Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """A Function that says of the sine what its derivative is."""

    class Sine(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            ctx.slope = x.cos()
            return x.sin()

    Sine.backward = staticmethod(backward)
    return lambda x: Sine.apply(x)


def clipped_in_place(ctx: Any, g: Tensor) -> Tensor:
    g[ctx.saved_tensors[0] < 0] = 0
    return g


def row_by_row(ctx: Any, g: Tensor) -> Tensor:
    out = torch.empty_like(g)
    out[0] = g[1]
    out[1:].copy_(2 * g[:2])
    return out


@pytest.mark.parametrize(
    "backward",
    [
        clipped_in_place,
        row_by_row,
        lambda ctx, g: g.mul_(ctx.saved_tensors[0].cos()),
        lambda ctx, g: g.mean().expand_as(g) + torch.zeros_like(g).add_(g),
        lambda ctx, g: torch.full_like(g, 2.0) * g + g.new_ones(4) * g,
        lambda ctx, g: torch.where(ctx.saved_tensors[0] > 0, g, torch.zeros_like(g)),
    ],
)
def test_backwards_of_many_kinds(backward: Any) -> None:
    function, dot = sine(backward), along(X)
    (theirs,) = oracle(function, (X,), [dot])
    torch.testing.assert_close(fwdcompile.jvp(function, (X,), (dot,)), (X.sin(), theirs))


def test_a_backward_that_writes_to_what_it_saved() -> None:
    function = sine(lambda ctx, g: ctx.slope.mul_(g))
    torch.testing.assert_close(fwdcompile.jvp(function, (X,), (X,))[1], X.cos() * X)


def test_no_gradient_is_no_tangent() -> None:
    function = sine(lambda ctx, g: None)
    y, y_dot = fwdcompile.jvp(lambda x: function(x) + x, (X,), (along(X),))
    torch.testing.assert_close((y, y_dot), (X.sin() + X, along(X)))


SCALE = torch.tensor(2.0)
_library = torch.library.Library("fwdtest_plain", "DEF")
_library.define("doubled(Tensor x) -> Tensor")
_library.impl("doubled", lambda x: x * 2, "CPU")
torch.library.register_fake("fwdtest_plain::doubled", torch.empty_like, lib=_library)


@pytest.mark.parametrize(
    ("backward", "reason"),
    [
        (lambda ctx, g: g.clamp(-1, 1), "the slope of clamp depends on it"),
        (lambda ctx, g: g * g.abs().mean(), "the slope of abs_1 depends on it"),
        (lambda ctx, g: g / g.norm(), "depends on it"),
        (lambda ctx, g: g.sign(), "sign has no slope"),
        (lambda ctx, g: torch.where(g > 0, ctx.saved_tensors[0], 0.0), "where has no slope"),
        (lambda ctx, g: (g > 0).to(g.dtype), "to_copy has no slope"),
        (lambda ctx, g: g + 0.1 * ctx.saved_tensors[0], "it adds something"),
        (lambda ctx, g: torch.ones_like(g), "it adds something"),
        (lambda ctx, g: g + torch.randn_like(g), "randn_like draws random numbers"),
        (lambda ctx, g: torch.full_like(g, 1.0) * g.round(), "round has no slope"),
        (lambda ctx, g: g + 0.1 * torch.relu(ctx.saved_tensors[0] - 9), "it adds something"),
    ],
)
def test_a_backward_that_is_no_transpose_is_refused(backward: Any, reason: str) -> None:
    function = sine(backward)
    with pytest.raises(
        fwdcompile.RuleError, match=rf"(?s)test_pushforward.py:\d+.*Sine is not linear.*{reason}"
    ):
        fwdcompile.jvp(function, (X,), (along(X),))
    fwdcompile.jvp(lambda x: x * function(x.detach()), (X,), (along(X),))


def on_a_path(ctx: Any, g: Tensor) -> Tensor:
    return g + torch.ops.fwdtest_plain.doubled(g)


def in_a_branch(ctx: Any, g: Tensor) -> Tensor:
    return torch.cond(ctx.slope.sum() > 0, lambda g: g * 2, lambda g: g * 3, (g,))


@pytest.mark.parametrize(
    ("backward", "reason"),
    [
        (lambda ctx, g: g if float(g.sum()) > 0 else -g, "decides in Python by the value"),
        (lambda ctx, g: g * ctx.slope.max().item(), "reads a number from a tensor"),
        (lambda ctx, g: torch.full_like(g, g.mean().item()), "reads a number from a tensor"),
        (lambda ctx, g: g * SCALE, "reads a tensor that is no argument"),
        (lambda ctx, g: g * SCALE.clone(), "reads a tensor that is no argument"),
        (lambda ctx, g: g * torch.tensor(2.0).clone(), None),
        (lambda ctx, g: (g, None), None),
        (lambda ctx, g: (), "0 gradients for 1 inputs"),
        (in_a_branch, "has control flow"),
        (on_a_path, r"calls fwdtest_plain\.doubled\.default, which torch has no derivative of"),
    ],
)
def test_a_backward_that_cannot_be_had_is_told_where_a_tangent_needs_it(
    backward: Any, reason: str | None
) -> None:
    function = sine(backward)
    with mock.patch.dict(fwdcompile.rule.table):
        fwdcompile.rule.linear(torch.ops.fwdtest_plain.doubled.default, wrt="x")
        fwdcompile.jvp(lambda x: x * function(x.detach()), (X,), (along(X),))
        if reason:
            with pytest.raises(fwdcompile.RuleError, match=rf"(?s)test_pushforward.*{reason}"):
                fwdcompile.jvp(function, (X,), (along(X),))


class Level(enum.IntEnum):
    LOW, HIGH = 1, 2

    def __repr__(self) -> str:
        return "Level"


def test_calls_that_print_alike_have_pushforwards_of_their_own() -> None:
    def function(x: Tensor) -> Tensor:
        return zoo.Reversed.apply(x, Level.LOW) + 10 * zoo.Reversed.apply(x, Level.HIGH)

    _, y_dot = fwdcompile.jvp(function, (X,), (along(X),))
    torch.testing.assert_close(y_dot, -21 * along(X))


def test_what_is_detached_is_constant_for_the_second_derivative() -> None:
    function = sine(lambda ctx, g: g * ctx.saved_tensors[0].detach().cos())
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad((function(x) * x).sum(), x, create_graph=True)
    (product,) = torch.autograd.grad((first * along(X)).sum(), x)
    (second,) = twice(lambda x: function(x) * x, (X,))
    torch.testing.assert_close(second, product * along(X))


def test_a_second_derivative_through_a_function_in_a_derivative_is_refused() -> None:
    function = sine(lambda ctx, g: g * zoo.RoundThrough.apply(ctx.saved_tensors[0]))
    _, y_dot = fwdcompile.jvp(function, (X,), (along(X),))
    torch.testing.assert_close(y_dot, along(X) * X.round())
    with pytest.raises(fwdcompile.MissingRuleError, match="makes it by another Function"):
        twice(function, (X,))


def test_a_function_without_a_derivative() -> None:
    class Nothing(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sin()

    with pytest.raises(fwdcompile.RuleError, match="must implement either the backward or vjp"):
        fwdcompile.jvp(lambda x: Nothing.apply(x), (X,), (along(X),))


class Quantized(nn.Module):
    """A layer that trains through rounded weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = zoo.RoundThrough.apply(self.fc1.weight * 8) / 8
        hidden = torch.relu(nn.functional.linear(x, weight, self.fc1.bias))
        return zoo.Linear.apply(hidden, self.fc2.weight, self.fc2.bias)


def test_rank_one_tangents_go_through_as_factors() -> None:
    forward, model = fwdcompile.transform(Quantized()), Quantized()
    forward.lower(torch.ones(16, 4), rank_one=True)
    shapes = {model.fc1.weight.shape, model.fc2.weight.shape}
    found = made(forward, shapes)
    assert found and not [name for name in found if name.endswith("_dot")]


@pytest.mark.parametrize("rank_one", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_steps_train_through_functions(rank_one: bool, samples: int) -> None:
    torch.manual_seed(0)
    model, x, target = Quantized(), torch.randn(16, 4), torch.randint(2, (16,))
    loss_fn = nn.functional.cross_entropy
    directions = fwdcompile.Rademacher(rank_one=rank_one)
    grad = fwdcompile.ForwardGradient(
        model, loss_fn, directions=directions, samples=samples, compile=False
    )
    slopes = []
    for _ in range(400 // samples):
        grad(x, target)
        slopes.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    loss_fn(model(x), target).backward()
    true = torch.cat([p.grad.flatten() for p in model.parameters()])
    mean = torch.stack(slopes).mean(0)
    assert torch.nn.functional.cosine_similarity(mean, true, dim=0) > 0.8
