"""Sums of second derivatives in one run, against Hessians by reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import custom_functions as zoo
import pytest
import torch
from controls import branch, loop, recurrence
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Decoder, Flow, Mlp, Tied, axes
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import fwdcompile
from fwdcompile.capture import capture
from fwdcompile.emit import emit
from fwdcompile.second import second_order
from fwdcompile.simplify import simplify

F64 = torch.float64


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def hessian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of each output's element, by reverse mode twice, one element after another.

    torch.func.hessian is wrong over layer norm: forward mode in the way in which it is known to be,
    and under vmap reverse mode, too, where the weight moves as well.
    """

    def gradient(y: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, create_graph=True, materialize_grads=True)[0].flatten()

    x = x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        ys = (f(x) + 0 * x.square().sum()).flatten()
    rows = [torch.stack([gradient(slope) for slope in gradient(y)]) for y in ys]
    return torch.stack(rows).detach()


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(f, x)


class Deep(nn.Module):
    """What wave functions and solvers are made of: norms, attention, smooth activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2), nn.Softplus())

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.first(x)))
        return self.last(h + self.mix(h, h, h, need_weights=False)[0]).prod(-1).sum()


def test_the_laplacian_of_a_network_is_the_trace_of_its_hessian() -> None:
    model, x = Deep().double(), torch.randn(4, 3, dtype=F64)
    ways = [{"x": e.view(4, 3)} for e in torch.eye(12, dtype=F64)]
    y, y_dots, y_ddot = fwdcompile.laplacian(model)(x, tangents=ways)
    close(y, model(x))
    close(torch.stack(y_dots), jacobian(model, x).flatten())
    close(y_ddot, hessian(model, x)[0].trace())


def test_of_a_batch_it_is_that_of_each_point() -> None:
    model, x = Mlp().double(), torch.randn(5, 6, dtype=F64)
    y, y_dots, y_ddot = fwdcompile.laplacian(model)(x, tangents=axes(x))
    close(y, model(x))
    close(torch.stack(y_dots, -1), torch.stack([jacobian(model, point) for point in x]))
    second = torch.stack([hessian(model, point) for point in x])
    close(y_ddot, second.diagonal(dim1=-2, dim2=-1).sum(-1))


def test_along_parameters_it_is_a_quadratic_form_of_the_hessian() -> None:
    model, tokens = Decoder().double(), torch.randint(0, 11, (2, 6))
    values = {name: p.detach() for name, p in model.named_parameters()}
    ways = [{n: torch.randn_like(p) for n, p in values.items()} for _ in range(2)]

    def along(step: Tensor, way: dict[str, Tensor]) -> Tensor:
        moved = {name: x + step * way[name] for name, x in values.items()}
        return functional_call(model, moved, (tokens, tokens), tie_weights=True)

    _, _, y_ddot = fwdcompile.laplacian(model)(tokens, tokens, tangents=ways)
    start = torch.zeros(1, dtype=F64)
    each = [hessian(lambda step, way=way: along(step, way), start) for way in ways]
    close(y_ddot, sum(each).squeeze())


def test_directions_may_move_other_inputs_and_be_of_first_order_alone() -> None:
    def u(x: Tensor, t: Tensor) -> Tensor:
        return torch.exp(-2 * t) * torch.sin(3 * x)

    x, t = torch.randn(2, 7, dtype=F64)
    ones = torch.ones_like(x)
    lap = fwdcompile.laplacian(u)
    _, (u_x, u_t), u_xx = lap(x, t, tangents=[{"x": ones}], first=[{"t": ones}])
    close(u_x, 3 * torch.exp(-2 * t) * torch.cos(3 * x))
    close(u_t, -2 * u(x, t))
    close(u_xx, -9 * u(x, t))
    _, (_, mixed), both = lap(x, t, tangents=[{"x": ones}, {"x": ones, "t": ones}])
    close(mixed, u_x + u_t)
    close(both, u_xx + (-9 + 4) * u(x, t) - 2 * 2 * u_x)


def test_structures_integers_and_what_nothing_reaches() -> None:
    def model(x: Tensor, y: Tensor) -> Any:
        return {"sorted": x.pow(3).sort(), "still": y * y, "linear": 2 * x, "text": "a"}

    x, y = torch.randn(4, dtype=F64), torch.randn(2, dtype=F64)
    lap = fwdcompile.laplacian(model)
    out, (out_dot,), out_ddot = lap(x, y, tangents=[{"x": torch.ones_like(x)}])
    close(out["sorted"], x.pow(3).sort())
    close(out_ddot["sorted"][0], 6 * x[out["sorted"][1]])
    assert out_ddot["sorted"][1] is None and out_ddot["text"] is None and out["text"] == "a"
    close(out_ddot["still"], torch.zeros(2, dtype=F64))
    close(out_dot["linear"], torch.full_like(x, 2))
    close(out_ddot["linear"], torch.zeros_like(x))
    _, none, second = fwdcompile.laplacian(lambda x: x.argmax())(x, tangents=[{"x": x}])
    assert none == (None,) and second is None


def test_buffers_move_once_and_random_numbers_are_the_models() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Tanh()).double()
    twin = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Tanh()).double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(6, 3, dtype=F64)
    nested = fwdcompile.transform(fwdcompile.transform(twin))
    found, expected = [], []
    for way in axes(x, "input"):
        torch.manual_seed(1)
        found.append(fwdcompile.laplacian(model)(x, tangents=[way])[2])
        torch.manual_seed(1)
        expected.append(nested(x, tangents=way)[1][1])
    close(found, expected)
    close(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert model[1].num_batches_tracked == 3


def _scanned(x: Tensor) -> Tensor:
    each = []
    for w in torch.linspace(0.1, 1, 4, dtype=F64):
        x = torch.sin(x * w) + x
        each.append(x * x)
    return (x * x).sum() + torch.stack(each).prod()


def _looped(x: Tensor) -> Tensor:
    y = x.exp()
    for _ in range(3):
        y = y * x.cos() + y.sin()
    return y.prod()


@pytest.mark.parametrize(
    ("function", "plain", "sign"),
    [
        (branch, lambda x: (x**3).sum(), 1),
        (branch, lambda x: x.exp().prod(), -1),
        (recurrence, _scanned, 1),
        (loop, _looped, 1),
    ],
    ids=["true", "false", "scan", "while_loop"],
)
def test_control_flow(
    function: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], sign: int
) -> None:
    x = sign * torch.rand(3, dtype=F64)
    y, y_dots, y_ddot = fwdcompile.laplacian(function)(x, tangents=axes(x))
    close(y, plain(x))
    close(torch.stack(y_dots), jacobian(plain, x))
    close(y_ddot, hessian(plain, x)[0].trace())


def test_functions_keep_their_own_derivatives() -> None:
    x = torch.rand(3, dtype=F64) * 4
    lap = fwdcompile.laplacian(lambda x: zoo.RoundThrough.apply(x * x) * x)
    _, _, y_ddot = lap(x, tangents=[{"x": torch.ones_like(x)}])
    close(y_ddot, 2 * x + 2 * 2 * x)  # (r x)'' with r = round(x^2), r' = 2 x, r'' = 2


def test_reverse_mode_inside_gives_third_derivatives() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: (x.sin() * x.flip(0).exp()).sum())(x)

    def plain(x: Tensor) -> Tensor:
        return x.cos() * x.flip(0).exp() + x.exp() * x.flip(0).sin()

    x = torch.randn(4, dtype=F64)
    _, _, y_ddot = fwdcompile.laplacian(f)(x, tangents=axes(x))
    close(y_ddot, hessian(plain, x).diagonal(dim1=1, dim2=2).sum(-1))


WEIGHTS = torch.randn(3, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
STEPS: list[Callable[[Tensor], Tensor]] = [  # none overflows after any others
    lambda x: x @ WEIGHTS[0],
    torch.tanh,
    lambda x: x * x.flip(-1),
    lambda x: torch.einsum("i,j,ijk->k", x, x, WEIGHTS),
    lambda x: x.softmax(-1),
    lambda x: x / (1 + x.square().sum()),
    lambda x: torch.linalg.solve(WEIGHTS[1] @ WEIGHTS[1].mT + torch.diag(x.tanh().exp()), x),
    lambda x: torch.cat([x[1:].sin(), x[:1].cumsum(0)]),
    lambda x: nn.functional.layer_norm(x, (3,), x.tanh().exp()),
]


@settings(max_examples=25)
@given(
    st.lists(st.sampled_from(range(len(STEPS))), min_size=1, max_size=5),
    st.integers(0, 2**20),
    st.integers(1, 3),
)
def test_any_chain_of_ops(steps: list[int], seed: int, count: int) -> None:
    def f(x: Tensor) -> Tensor:
        for step in steps:
            x = STEPS[step](x)
        return x

    generator = torch.Generator().manual_seed(seed)
    x, *ways = torch.randn(count + 1, 3, dtype=F64, generator=generator)
    _, y_dots, y_ddot = fwdcompile.laplacian(f)(x, tangents=[{"x": v} for v in ways])
    h, j = hessian(f, x), jacobian(f, x)
    traces = sum(torch.einsum("kij,i,j->k", h, v, v) for v in ways)
    first, second = (1e-8 * float(d.abs().max() + 1) for d in (j, h))
    expected = j @ torch.stack(ways, 1)
    torch.testing.assert_close(torch.stack(y_dots, 1), expected, rtol=1e-8, atol=first)
    torch.testing.assert_close(y_ddot, traces, rtol=1e-8, atol=second)


def test_a_direction_costs_one_tangent_more() -> None:
    model, x = Mlp(), torch.zeros(4, 6)

    def ops(count: int, name: str) -> int:
        captured = capture(model, (x,), {}, False, {"x"})
        program = second_order(captured, {"x": range(count)}, count)
        simplify(program.graph)
        return sum(name in str(node.target) for node in program.graph.nodes)

    # x_ddot is zero, and so the first layer has no tangent of second order
    assert [ops(count, "linear") for count in (1, 2, 10)] == [5, 7, 23]
    assert ops(11, "") - ops(10, "") == ops(3, "") - ops(2, "")


def test_names_and_text() -> None:
    captured = capture(Mlp(), (torch.zeros(4, 6),), {}, False, {"x"})
    one = emit(second_order(captured, {"x": range(1)}, 1))
    two = emit(second_order(captured, {"x": range(2)}, 2))
    assert "tanh_dot:" in one and "tanh_ddot:" in one
    assert "tanh_dot1:" in two and "tanh_ddot:" in two and "tanh_dot2" not in two
    assert '("second", "out", 0)' in two
    assert "its directional derivative in 2 directions and a sum of second ones" in two


def test_where_there_is_no_second_derivative_the_users_line_is_named() -> None:
    def loss(x: Tensor) -> Tensor:
        lengths = torch.tensor([3, 3])
        targets = torch.ones(2, 2, dtype=torch.long)
        return nn.functional.ctc_loss(x.log_softmax(-1), targets, lengths, torch.tensor([2, 2]))

    x = torch.randn(3, 2, 4, dtype=F64)
    with pytest.raises(fwdcompile.MissingRuleError, match="second derivative of ctc_loss") as met:
        fwdcompile.laplacian(loss)(x, tangents=[{"x": x}])
    assert "test_second.py" in str(met.value) and "ctc_loss(x.log_softmax" in str(met.value)


@pytest.mark.parametrize("model", [Flow(), Tied()], ids=["flow", "tied"])
def test_it_is_the_sum_over_transforms_of_a_transform(model: nn.Module) -> None:
    model = model.double()
    tied = isinstance(model, Tied)
    inputs = (torch.tensor([0, 1, 2, 3]),) if tied else (torch.rand(2, 3, 2), torch.rand(2, 1))
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    values = {n: p.detach() for n, p in model.named_parameters()}
    ways = [{n: torch.randn_like(p) for n, p in values.items()} for _ in range(3)]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _, _, y_ddot = fwdcompile.laplacian(model)(*inputs, tangents=ways)
    expected = 0.0
    for way in ways:
        model.load_state_dict(before, strict=False)
        nested = fwdcompile.transform(fwdcompile.transform(model))
        expected = expected + nested(*inputs, tangents=way)[1][1]
    close(y_ddot, expected)
