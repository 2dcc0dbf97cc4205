from __future__ import annotations

from typing import Any

import custom_functions as zoo
import pytest
import torch
from nets import Mlp
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torch._higher_order_ops.strict_mode import strict_mode

import fwdcompile
from fwdcompile.capture import capture
from fwdcompile.parts import input_leaves
from fwdcompile.program import location


def ops(model: Any, *args: Any) -> list[str]:
    graph = capture(model, args, {}).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_the_table_decides_how_far_ops_are_lowered() -> None:
    assert ops(Mlp(), torch.zeros(2, 6)) == [
        "aten.linear.default",
        "aten.tanh.default",
        "aten.linear.default",
    ]


def test_the_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    capture(nn.Dropout(0.5), (torch.ones(5),), {})
    assert torch.equal(before, torch.random.get_rng_state())


def test_source_lines_are_the_users() -> None:
    def helper(x: Tensor) -> Tensor:
        return x.sin()  # this very line

    program = capture(lambda x: helper(x) * 2, (torch.zeros(3),), {})
    (unknown,) = [
        location(node)
        for node in capture(nn.ReLU(), (torch.zeros(3),), {}).graph.nodes
        if node.op == "call_function"
    ]
    assert unknown == ""
    lines = {str(node.target): location(node) for node in program.graph.nodes}
    assert "tests/test_capture.py" in lines["aten.sin.default"]
    assert "this very line" in lines["aten.sin.default"]


def test_leaves_are_named_by_argument_and_path() -> None:
    def model(x: Tensor, *rest: Tensor, flag: bool = True, more: Any = None) -> None: ...

    z = torch.zeros(1)
    named = input_leaves(model, (z, z, {"a": [z]}), {"more": {"b": z}})
    assert [name for name, _ in named] == ["x", "rest.0", "rest.1.a.0", "more.b"]


def test_a_stopped_gradient_stays_stopped() -> None:
    x, v = torch.randn(3), torch.ones(3)
    _, y_dot = fwdcompile.jvp(lambda z: z.detach() * z, (x,), (v,))
    torch.testing.assert_close(y_dot, x)
    straight = lambda z: z + (z.round() - z).detach()  # noqa: E731
    assert torch.equal(fwdcompile.jvp(straight, (x,), (v,))[1], v)


def _scale_detached(x: Tensor) -> Tensor:
    w = x * 1
    w.detach().mul_(2)
    return w * 3


def _set_item_of_view(x: Tensor) -> Tensor:
    w = x * 1
    w.view(-1).detach()[0:1] = 2.0
    return w


def _detach_in_place(x: Tensor) -> Tensor:
    w = x * 1
    w.detach_()
    return w * x


def _out_argument(x: Tensor) -> Tensor:
    w = x * 1
    torch.mul(x, 2, out=w.detach())
    return w


def _split_in_two(x: Tensor) -> Tensor:
    w = x * 1
    w.detach().split(1)[0].zero_()
    return w


@pytest.mark.parametrize(
    "model", [_scale_detached, _set_item_of_view, _detach_in_place, _out_argument, _split_in_two]
)
def test_a_write_through_detach_is_refused(model: Any) -> None:
    with pytest.raises(fwdcompile.CaptureError, match=r"(?s)test_capture.py:\d+.*detach\(\)"):
        capture(model, (torch.ones(2),), {})


def test_max_norm_of_an_embedding_writes_through_detach() -> None:
    with pytest.raises(fwdcompile.CaptureError, match=r"(?s)embedding_renorm_.*max_norm"):
        capture(nn.Embedding(5, 3, max_norm=1.0), (torch.tensor([1, 2]),), {})


def test_packed_sequences_are_refused_with_the_way_out() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return self.net(packed)[0].data

    with pytest.raises(fwdcompile.CaptureError, match=r"(?s)self.net\(packed\).*padded, and mask"):
        capture(Packed(), (torch.randn(2, 5, 3), torch.tensor([5, 3])), {})


def test_writes_to_detached_copies_integers_and_buffers_are_harmless() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x: Tensor, i: Tensor) -> Tensor:
            self.mean.detach().mul_(0.5).add_(x.detach().mean(0))
            return x * x.detach().clone().mul_(2) * i.detach().add_(1)

    model, x, i = Counting(), torch.randn(3, 2), torch.tensor(1)
    _, y_dot = fwdcompile.transform(model)(x, i.clone(), tangents={"x": torch.ones_like(x)})
    torch.testing.assert_close(y_dot, 2 * x * 2)
    torch.testing.assert_close(model.mean, x.mean(0))


@pytest.mark.parametrize("inner", [False, True])
def test_random_ops_that_nothing_uses_stay(inner: bool) -> None:
    def model(x: Tensor) -> Tensor:
        torch.nn.functional.dropout(x)
        torch.rand(3)
        return torch.nn.functional.dropout(x) * x

    if inner:
        model = torch.func.grad(lambda x, f=model: f(x).sum())
    x = torch.ones(64)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(fwdcompile.jvp(model, (x,), (x,))[0], expected)


def test_no_grad_does_not_stop_a_tangent() -> None:
    def model(x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.sin()

    x = torch.randn(3)
    theirs = torch.func.jvp(model, (x,), (torch.ones(3),))
    torch.testing.assert_close(fwdcompile.jvp(model, (x,), (torch.ones(3),)), theirs)


def test_a_function_may_close_over_a_module_called_model() -> None:
    model = nn.Linear(2, 3)
    program = capture(lambda x: model(x).tanh(), (torch.ones(2),), {})
    assert [slot.name for slot in program.inputs] == ["model.weight", "model.bias", "x"]


def branch(function: Any) -> Any:
    return lambda x: torch.cond(x.sum() > 0, function, lambda x: x.sin(), (x,))


def hidden_write(x: Tensor) -> Tensor:
    y = x * 2
    y.detach().mul_(3)
    return y


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: zoo.Lying.apply(x), r"test_capture.py:\d+: .*Lying.apply.*custom_op"),
        (hidden_write, r"test_capture.py:\d+: y.detach\(\).mul_\(3\).*clone"),
        (lambda x: x, r"test_capture.py:\d+: .*alias.*x?.clone\(\)"),
        (lambda x: x.sin() if x.sum() > 0 else x.cos(), "decides in Python.*torch.cond"),
        (lambda x: x * torch.tensor([2.0, 3.0]), "makes a tensor from numbers.*torch.full"),
    ],
)
def test_what_a_branch_cannot_say_is_refused(function: Any, message: str) -> None:
    with pytest.raises(fwdcompile.CaptureError, match=f"(?s){message}"):
        capture(branch(function), (torch.ones(2),), {})


def test_other_higher_order_ops_are_refused() -> None:
    def model(x: Tensor) -> Tensor:
        return strict_mode(torch.sin, (x,))

    with pytest.raises(fwdcompile.CaptureError, match=r"(?s)test_capture.py:\d+.*op strict_mode"):
        capture(model, (torch.ones(2),), {})


def test_loops_carry_tensors() -> None:
    def model(x: Tensor) -> Any:
        return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x.sin()), (0, x))

    with pytest.raises(fwdcompile.CaptureError, match=r"(?s)test_capture.py:\d+.*tensor\(0\)"):
        capture(model, (torch.ones(2),), {})


def test_a_generator_is_no_input_of_a_program() -> None:
    generator = torch.Generator()

    def model(x: Tensor) -> Tensor:
        return x * torch.rand(2, generator=generator)

    message = r"(?s)test_capture.py:\d+: return x \* torch.rand.*Generator.*torch.manual_seed"
    with pytest.raises(fwdcompile.CaptureError, match=message):
        capture(model, (torch.ones(2),), {})


def test_branching_on_data_names_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    def model(x: Tensor) -> Tensor:
        if x.sum() > 0:  # the branch
            return x
        return -x

    with pytest.raises(fwdcompile.CaptureError) as error:
        capture(model, (torch.ones(2),), {})
    assert "the branch" in str(error.value)
    assert "torch.where" in str(error.value)
    assert "def forward" not in capfd.readouterr().err  # torch prints half a graph


def test_errors_of_the_model_name_the_line() -> None:
    with pytest.raises(fwdcompile.CaptureError, match=r"test_capture.py:\d+"):
        capture(lambda x: x @ x, (torch.ones(2, 3),), {})


def test_a_layer_of_torchs_that_decides_is_named_by_its_own_line() -> None:
    with pytest.raises(fwdcompile.CaptureError, match=r"(?s)batchnorm.py:\d+.*num_batches_tracked"):
        capture(torch.nn.BatchNorm1d(2, momentum=None), (torch.ones(3, 2),), {})


def test_a_write_to_what_a_function_closes_over_is_refused_with_a_way_out() -> None:
    count = torch.zeros(2)

    def model(x: Tensor) -> Tensor:
        return x * count.add_(1)

    with pytest.raises(
        fwdcompile.CaptureError, match=r"(?s)test_capture.py:\d+.*add_.*register_buffer"
    ):
        capture(model, (torch.ones(2),), {})
    assert not count.any()


def test_an_argument_may_not_have_a_parameters_name() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.x * x

    with pytest.raises(fwdcompile.TangentError, match="rename"):
        fwdcompile.transform(Same())(torch.ones(2), tangents={"x": torch.ones(2)})


def test_one_tensor_passed_twice_is_two_inputs() -> None:
    def model(a: Tensor, b: Tensor) -> Tensor:
        return a * b.sin()

    x, y, v = torch.randn(3), torch.randn(3), torch.ones(3)
    fwd = fwdcompile.transform(model)
    torch.testing.assert_close(fwd(x, x, tangents={"a": v})[1], x.sin())
    torch.testing.assert_close(fwd(x, y, tangents={"a": v})[1], y.sin())
    net = nn.Linear(3, 3, bias=False)
    both = fwdcompile.transform(lambda x: net(x) * x)
    dots = {"net.weight": torch.ones(3, 3)}
    both(net.weight, tangents=dots)
    z = torch.randn(3, 3)
    torch.testing.assert_close(both(z, tangents=dots)[1], (z @ torch.ones(3, 3)) * z)


def test_constants_of_the_model() -> None:
    def model(x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0])

    x = torch.randn(3)
    y, y_dot = fwdcompile.jvp(model, (x,), (torch.ones(3),))
    torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(y_dot, torch.tensor([1.0, 2.0, 3.0]))


def test_keyword_only_and_default_arguments() -> None:
    def model(x: Tensor, power: int = 2, *, shift: float = 0.5) -> Tensor:
        return (x + shift) ** power

    fwd = fwdcompile.transform(model)
    x = torch.randn(3, dtype=torch.float64)
    v = {"x": torch.ones_like(x)}
    torch.testing.assert_close(fwd(x, tangents=v)[1], 2 * (x + 0.5))
    torch.testing.assert_close(fwd(x, 3, shift=1.0, tangents=v)[1], 3 * (x + 1) ** 2)


def test_a_capture_leaves_no_mark_on_the_inputs_and_heeds_none() -> None:
    def model(x: Tensor) -> Tensor:
        return x.sin() if x.sum() > 0 else x.cos()

    x = torch.ones(3, 2)
    with pytest.raises(fwdcompile.CaptureError, match="decides in Python"):
        capture(model, (x,), {}, dynamic=True)
    assert not vars(x)
    torch._dynamo.mark_dynamic(x, 0)
    (node,) = capture(torch.sin, (x,), {}).graph.find_nodes(op="placeholder")
    assert node.meta["val"].shape == (3, 2) and isinstance(node.meta["val"].shape[0], int)


def test_constants_made_of_numbers_are_told_from_those_of_others() -> None:
    scale = torch.tensor(1.5)
    program = capture(
        lambda x: x * scale + scale.clone() + torch.tensor([1.0, 2.0]), (torch.ones(2),), {}
    )
    (literal,) = program.literals
    assert program.constants[literal].shape == (2,) and len(program.constants) == 2
