"""Reverse mode inside a captured function: Hessian-vector products, forces, Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vjp, vmap
from torch.nn import functional as F

import fwdcompile
from fwdcompile import CaptureError

LABELS = torch.arange(3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def made(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double().eval()


def mlp() -> nn.Module:
    return made(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x.sin(), x.cos()).pow(3).sum()


def double_backward(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """H v, by reverse over reverse."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad((g * v).sum(), x)[0]


CONV = made(
    nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ELU(), nn.AvgPool2d(2), nn.Conv2d(4, 2, 2, groups=2)
)
MLP, LSTM = mlp(), nn.LSTM(4, 5).double()
LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "mlp": (lambda x: F.cross_entropy(MLP(x), LABELS), (3, 4)),
    "convolutions": (lambda x: CONV(x).square().sum(), (2, 1, 8, 8)),
    "lstm": (lambda x: LSTM(x)[0].square().sum(), (3, 2, 4)),
    "saved output": (lambda x: (x @ x.T).exp().sum(), (3, 4)),
    "detached": (lambda x: (x.sin() * x.detach().cos()).sum(), (3, 4)),
    "solve": (lambda x: torch.linalg.solve(x, x.T).square().sum(), (3, 3)),
}
# torch has no derivative of these backward runs
BEYOND: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "attention": (attention, (1, 2, 5, 4)),
    "distances": (lambda x: (1 / (0.1 + torch.pdist(x))).sum(), (5, 3)),
    "cross distances": (lambda x: torch.cdist(x, x[:2] + 1, p=3.0).square().sum(), (5, 3)),
    "largest": (lambda x: torch.cdist(x, x[:2] + 1, p=torch.inf).square().sum(), (5, 3)),
    "sums": (lambda x: torch.pdist(x, 1.0).square().sum(), (5, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_forward_over_reverse_is_the_hessian_times_the_tangent(name: str) -> None:
    f, shape = LOSSES[name]
    x, v = normal(*shape), normal(*shape, seed=1)
    g, hv = fwdcompile.jvp(grad(f), (x,), (v,))
    torch.testing.assert_close(g, grad(f)(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hv, double_backward(f, x, v), rtol=1e-10, atol=1e-10)


def differences(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """H v, from gradients on both sides."""
    step = 1e-5
    return (grad(f)(x + step * v) - grad(f)(x - step * v)) / (2 * step)


@pytest.mark.parametrize("name", BEYOND)
def test_products_where_torch_has_none(name: str) -> None:
    f, shape = BEYOND[name]
    x, v = normal(*shape), normal(*shape, seed=1)
    with pytest.raises((RuntimeError, NotImplementedError), match="derivative for"):
        double_backward(f, x, v)
    g, hv = fwdcompile.jvp(grad(f), (x,), (v,))
    torch.testing.assert_close(g, grad(f)(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hv, differences(f, x, v), rtol=1e-6, atol=1e-6)


def test_of_all_parameters_as_one_compiled_program() -> None:
    model, x = mlp(), normal(3, 4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    dots = {name: normal(*p.shape, seed=2) for name, p in parameters.items()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x,)), LABELS)

    product = fwdcompile.transform(grad(loss), compile=True)
    tangents = {f"parameters.{name}": dot for name, dot in dots.items()}
    _, found = product(parameters, x, tangents=tangents)
    _, expected = torch.func.jvp(lambda p: grad(loss)(p, x), (parameters,), (dots,))
    for name in parameters:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


def energy(x: Tensor) -> Tensor:
    return torch.pdist(x).reciprocal().sum()


def test_a_model_may_return_a_gradient_and_hold_parameters() -> None:
    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.charge = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return -grad(lambda at: self.charge * energy(at))(x)

    model, x, x_dot = Forces(), normal(4, 3), normal(4, 3, seed=1)
    one = torch.ones((), dtype=torch.float64)
    forces, dot = fwdcompile.transform(model)(x, tangents={"x": x_dot, "charge": one})
    expected = -grad(energy)(x) - 0.7 * differences(energy, x, x_dot)
    torch.testing.assert_close(forces, -0.7 * grad(energy)(x))
    torch.testing.assert_close(dot, expected, rtol=1e-6, atol=1e-6)


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "vjp": lambda x: vjp(lambda x: x.cumprod(1), x)[1](x.sin())[0],
    "jacrev": jacrev(lambda x: x.softmax(0) @ x.T),
    "hessian": hessian(lambda x: x.prod(1).sin().sum()),
    "per-example": vmap(grad(lambda row: row.sin().prod())),
    "twice": grad(lambda x: grad(lambda x: x.pow(4).prod(1).sum())(x).square().sum()),
    "a level of jvp": lambda x: torch.func.jvp(torch.tanh, (x,), (x.cos(),))[1],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_of_torch_func(name: str) -> None:
    f, x, x_dot = FUNCTIONS[name], normal(3, 4), normal(3, 4, seed=1)
    found = fwdcompile.jvp(f, (x,), (x_dot,))
    torch.testing.assert_close(found, torch.func.jvp(f, (x,), (x_dot,)), rtol=1e-9, atol=1e-9)


def test_third_derivatives_by_transforming_twice() -> None:
    x, v = normal(3, 4), normal(3, 4, seed=1)
    f = grad(lambda x: x.sin().prod(1).sum())

    def along(x: Tensor) -> Tensor:
        return torch.func.jvp(f, (x,), (v,))[1]

    (_, first), (_, second) = fwdcompile.transform(fwdcompile.transform(f))(x, tangents={"x": v})
    expected = torch.func.jvp(along, (x,), (v,))
    torch.testing.assert_close((first, second), expected, rtol=1e-9, atol=1e-9)


def test_a_loss_of_derivatives_trains_by_forward_gradients() -> None:
    """A physics-informed loss, u'' = 1 with u(0) = 0, whose derivatives are inside the model."""
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            slope = grad(lambda x: self.u(x).sum())
            bent = grad(lambda x: slope(x).sum())(x)
            return (bent - 1).square().mean() + self.u(torch.zeros(1, 1)).square().sum()

    model, x = Residual(), torch.rand(16, 1)
    fgd = fwdcompile.FGD(model, lambda loss, _: loss, lr=5e-3, compile=False)
    losses = [float(fgd.step(x, torch.zeros(()))) for _ in range(150)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_buffer_written_inside_a_gradient_is_refused() -> None:
    model = nn.BatchNorm1d(3).double()
    with pytest.raises(CaptureError, match="would mutate a captured Tensor"):
        fwdcompile.jvp(grad(lambda x: model(x).square().sum()), (normal(4, 3),), (normal(4, 3),))


def through_a_view(x: Tensor) -> Tensor:
    y = x * 1.5
    y.detach()[0].mul_(2)
    return y


def through_data(x: Tensor) -> Tensor:
    y = x * 1.5
    y.data += 1
    return y


@pytest.mark.parametrize(
    ("write", "op"),
    [
        (through_a_view, "aten.mul_.Tensor"),
        (through_data, "aten.add_.Tensor"),
        (lambda x: x.cos().detach_(), "aten.detach_.default"),
        (lambda x: grad(lambda x: through_a_view(x).sin().sum())(x), "aten.mul_.Tensor"),
    ],
)
def test_hidden_writes_beside_a_gradient_are_refused(
    write: Callable[[Tensor], Tensor], op: str
) -> None:
    def f(x: Tensor) -> Tensor:
        return grad(lambda x: x.sin().sum())(x) + write(x)

    with pytest.raises(CaptureError, match=f"test_reverse.py:\\d+: (.|\\n)*{op}"):
        fwdcompile.jvp(f, (normal(3),), (normal(3),))


def test_plain_writes_beside_a_gradient_are_kept() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.detach().clone()
        y.mul_(2)
        return grad(lambda x: x.clone().mul_(x).sin_().sum())(x) + y * x

    x, x_dot = normal(3), normal(3, seed=1)
    found = fwdcompile.jvp(f, (x,), (x_dot,))
    torch.testing.assert_close(found, torch.func.jvp(f, (x,), (x_dot,)))
