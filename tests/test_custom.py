"""A captured program keeps the torch.autograd.Functions that it calls, or says why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import custom_functions as zoo
import pytest
import torch
from torch import Tensor
from torch.autograd import Function

import fwdcompile
from fwdcompile.capture import capture
from fwdcompile.custom import attached, calls

X = torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3)


def test_a_program_holds_the_call_and_not_the_tensors_of_its_ctx() -> None:
    program = capture(lambda x: zoo.Softmax.apply(x.sin()), (X,), {})
    (node,) = [node for node in program.graph.nodes if node.target is attached]
    _, inputs, saved, key = node.args
    assert [n.name for n in inputs] == ["sin"] and saved == []
    (call,) = program.calls
    assert calls[key] is call and call.function is zoo.Softmax
    assert [n.name for n in node.users] == ["softmax"]
    assert call.context(outs=["the output"]).y == "the output"
    del program, call, node
    assert key not in calls


def test_the_text_is_plain_torch_and_names_the_function(tmp_path: Path) -> None:
    forward = fwdcompile.transform(lambda x: zoo.RoundThrough.apply(x * 3) * x)
    _, y_dot = forward(X, tangents={"x": X})
    assert "round_through: f64[2, 3] = aten.round(mul)" in forward.code
    assert "round_through_dot" in forward.code or "mul_dot * x" in forward.code
    assert "attached" not in forward.code and "detach" not in forward.code
    forward.save(tmp_path / "program.py")
    loaded = fwdcompile.load(tmp_path / "program.py")
    torch.testing.assert_close(loaded(X, tangents={"x": X})[1], y_dot)
    y, _ = loaded(X.clone().requires_grad_(), tangents={"x": X})
    assert not y.requires_grad


def test_autograd_does_not_go_through_a_program_with_a_function() -> None:
    forward = fwdcompile.transform(lambda x: zoo.Lying.apply(x))
    forward(X, tangents={"x": X})
    x = X.clone().requires_grad_()
    with pytest.raises(fwdcompile.FwdcompileError, match=r"Lying.*torch.no_grad\(\)"):
        forward(x, tangents={"x": X})
    with torch.no_grad():
        forward(x, tangents={"x": X})
    with pytest.raises(fwdcompile.FwdcompileError, match="not inside torch.func.jvp"):
        torch.func.jvp(lambda x: forward(x, tangents={"x": X})[0], (X,), (X,))
    with pytest.raises(fwdcompile.FwdcompileError, match=r"Lying.*torch.no_grad\(\)"):
        torch.func.grad(lambda x: forward(x, tangents={"x": X})[0].sum())(X)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_a_compiled_program() -> None:
    torch._dynamo.reset()
    forward = fwdcompile.transform(lambda x: zoo.Softmax.apply(x * 2).sin(), compile=True)
    plain = fwdcompile.transform(lambda x: zoo.Softmax.apply(x * 2).sin())
    tangents = [{"x": X}, {"x": X.cos()}]
    torch.testing.assert_close(forward(X, tangents=tangents), plain(X, tangents=tangents))


class Doubled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Quiet(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        return x.sin()


class Counting(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.count = x[x > 0].shape[0]
        return x * 2


class Twice(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, y


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: Doubled.apply(x * 1), "[m]ark_dirty"),
        (lambda x: Quiet.apply(x * 1), r"[x].mul_\(2\)"),
        (lambda x: Counting.apply(x), "a size that is [o]pen"),
        (lambda x: Twice.apply(x), "one tensor [t]wice"),
        (lambda x: zoo.Reversed.apply(x * 1, 2.0).mul_(3), "through a [d]etached one"),
        (lambda x: torch.func.grad(lambda x: zoo.Cube.apply(x)[0].sum())(x), "it cannot be [k]ept"),
        (lambda x: torch.vmap(zoo.Cube.apply)(x), "it cannot be [k]ept"),
        (lambda x: torch.vmap(zoo.Lying.apply)(x), "must override the [s]etup_context"),
    ],
)
def test_what_cannot_be_kept_is_refused(function: Any, reason: str) -> None:
    with pytest.raises(fwdcompile.CaptureError, match=rf"(?s)test_custom.py:\d+: .*{reason}"):
        capture(function, (X,), {})


def test_one_program_for_all_sizes_has_functions_of_what_has_one_size() -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        return zoo.Lying.apply(x) @ zoo.RoundThrough.apply(w[0] * 3)

    forward, w = fwdcompile.transform(model, dynamic=True), X[None]
    for x in (torch.ones(4, 2, dtype=X.dtype), torch.ones(7, 2, dtype=X.dtype)):
        _, y_dot = forward(x, w, tangents={"w": w})
        torch.testing.assert_close(y_dot, (x * x) @ (w[0] * 3))
    assert len(forward._cache) == 2 and len({id(one) for one in forward._cache.values()}) == 1
    with pytest.raises(fwdcompile.RuleError, match=r"(?s)test_custom.py:\d+.*Lying.*dynamic=True"):
        forward(x, w, tangents={"x": x})


def test_results_may_be_written_to() -> None:
    function = lambda x: zoo.Cube.apply(x)[0].mul_(3).add_(x)  # noqa: E731
    y, y_dot = fwdcompile.jvp(function, (X,), (X.cos(),))
    torch.testing.assert_close((y, y_dot), (3 * X**3 + X, (9 * X**2 + 1) * X.cos()))


def test_integers_go_through_as_they_are() -> None:
    class Parity(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x % 2

    i = torch.arange(6).view(2, 3)
    y, y_dot = fwdcompile.transform(lambda x, i: x * Parity.apply(i))(X, i, tangents={"x": X})
    torch.testing.assert_close((y, y_dot), (X * (i % 2), X * (i % 2)))


def test_an_input_without_a_tangent_has_none_behind_it() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return zoo.Lying.apply(x), zoo.Lying.apply(y)

    forward = fwdcompile.transform(function)
    _, (of_x, of_y) = forward(X, X, tangents={"x": X})
    torch.testing.assert_close((of_x, of_y), (100 * X, 0 * X))


def test_what_forward_reads_besides_its_arguments_is_constant() -> None:
    class Scaled(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, pair: list[Tensor]) -> Tensor:
            ctx.scale = pair[0]
            return x * pair[0] * weight

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient * ctx.scale * 2, None

    weight = torch.nn.Parameter(X.cos())
    model = torch.nn.ParameterDict({"weight": weight})
    function = lambda x, y: Scaled.apply(x, [y]) + model["weight"]  # noqa: E731
    with torch.no_grad():
        y, y_dot = fwdcompile.jvp(function, (X, X.sin()), (X.cos(), X))
    torch.testing.assert_close(y, X * X.sin() * weight + weight)
    torch.testing.assert_close(y_dot, X.cos() * X.sin() * 2)


def test_a_function_inside_the_derivative_of_another() -> None:
    class Outer(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return zoo.RoundThrough.apply(x) + zoo.Lying.apply(x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return zoo.Reversed.apply(gradient, 2.0) * 3

    y, y_dot = fwdcompile.jvp(lambda x: Outer.apply(x), (X,), (X.cos(),))
    torch.testing.assert_close((y, y_dot), (X.round() + X * X, 3 * X.cos()))
