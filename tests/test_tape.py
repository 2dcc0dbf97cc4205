"""torch.autograd.grad in a captured function: forces, penalties, inner steps of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, hvp
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fwdcompile
from fwdcompile import CaptureError

Function = Callable[[Tensor], Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def slope(energy: Function, create_graph: bool = True) -> Function:
    """The gradient of a sum, by a tape."""

    def gradient(x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.clone().requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x, create_graph=create_graph)[0]

    return gradient


def moved(x: Tensor) -> Tensor:
    """Three steps of a particle in a force."""
    v = torch.zeros_like(x)
    for _ in range(3):
        v = v - 0.1 * torch.autograd.grad(x.pow(4).sum() + x.prod(), x, create_graph=True)[0]
        x = x + 0.1 * v
    return x


def rows(x: Tensor) -> Tensor:
    y = x.sin().cumsum(1)[0]
    units = torch.eye(4).to(x)
    return torch.autograd.grad(y, x, units, is_grads_batched=True, create_graph=True)[0]


def written(x: Tensor) -> Tensor:
    return torch.zeros(5, 4).to(x).index_add_(0, torch.tensor([0, 1, 1]), x.sin()).pow(3)


NET = nn.Sequential(
    nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 2)
).double()
LSTM = nn.LSTM(4, 5).double()
FUNCTIONS: dict[str, Function] = {
    "network": slope(lambda x: NET(x).square()),
    "lstm": slope(lambda x: LSTM(x)[0].square()),
    "results that are saved": slope(lambda x: (x @ x.T).exp().sum().sqrt() * x.tanh().softmax(1)),
    "detached": slope(lambda x: x.sin() * x.detach().cos()),
    "torch.detach": slope(lambda x: x.sin() * torch.detach(x).tanh()),
    "data": slope(lambda x: x.sin() * x.data.cos()),
    "checkpointed": slope(lambda x: checkpoint(torch.tanh, x.exp(), use_reentrant=False)),
    "written in place": slope(written),
    "twice": slope(lambda x: slope(lambda x: x.pow(4).prod(1))(x).square()),
    "steps": moved,
    "rows at once": rows,
    "hessian": lambda x: hessian(lambda x: x.sin().prod(1).sum(), x, create_graph=True),
    "hvp": lambda x: hvp(lambda x: x.sin().prod(1).sum(), x, x.cos(), create_graph=True)[1],
    "beside torch.func": lambda x: (
        slope(torch.tanh)(x) * torch.func.grad(lambda x: x.cos().prod())(x)
    ),
    "around torch.func": slope(lambda x: torch.func.grad(lambda x: x.tanh().prod())(x).square()),
    "around vmap": slope(lambda x: torch.func.vmap(lambda x: x.tanh().prod())(x).square()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tangents_are_those_of_reverse_over_reverse(name: str) -> None:
    f, x, v = FUNCTIONS[name], normal(3, 4).requires_grad_(), normal(3, 4, seed=1)
    expected = f(x)
    u = normal(*expected.shape, seed=2)
    (pulled,) = torch.autograd.grad((expected * u).sum(), x)
    y, y_dot = fwdcompile.jvp(f, (x.detach(),), (v,))
    torch.testing.assert_close(y, expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((y_dot * u).sum(), (pulled * v).sum(), rtol=1e-10, atol=1e-10)


def test_inside_torch_func_and_without_derivatives_of_torch() -> None:
    """Central differences, as a reverse pass over it raises or is inside one of torch.func."""
    x, v = normal(3, 4), normal(3, 4, seed=1)
    inside = torch.func.grad(lambda x: slope(lambda y: y.tanh().prod(1))(x).square().sum())
    attention = slope(lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos()).pow(3))
    for f in (inside, attention):
        y, y_dot = fwdcompile.jvp(f, (x,), (v,))
        torch.testing.assert_close(y, f(x), rtol=1e-10, atol=1e-10)
        expected = (f(x + 1e-5 * v) - f(x - 1e-5 * v)) / 2e-5
        torch.testing.assert_close(y_dot, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("op", [torch.tanh, F.silu, F.mish, F.gelu, F.softplus, F.logsigmoid])
def test_a_gradient_without_a_graph_has_the_same_tangent(op: Function) -> None:
    """As under torch.autograd.forward_ad; a second reverse pass stops there."""
    x, v = normal(3, 4), normal(3, 4, seed=1)
    found = fwdcompile.jvp(slope(op, create_graph=False), (x,), (v,))
    torch.testing.assert_close(found, fwdcompile.jvp(slope(op), (x,), (v,)))

    def stopped(x: Tensor) -> Tensor:
        return torch.autograd.grad((slope(op, create_graph=False)(x) * x).sum(), x)[0]

    y, y_dot = fwdcompile.jvp(stopped, (x,), (v,))
    torch.testing.assert_close((y, y_dot), found)


class Potential(nn.Module):
    """Messages between atoms: the energy and the forces."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 8)
        self.message = nn.Sequential(nn.Linear(17, 16), nn.SiLU(), nn.Linear(16, 8))
        self.readout = nn.Linear(8, 1)
        self.double()

    def forward(self, x: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        i, j = torch.triu_indices(len(x), len(x), 1)
        apart = (x[i] - x[j]).norm(dim=1, keepdim=True)
        h = self.embedding(kinds)
        message = self.message(torch.cat([h[i], h[j], apart], 1)) * torch.exp(-apart)
        h = h + torch.zeros_like(h).index_add_(0, i, message).index_add_(0, j, message)
        energy = self.readout(h.tanh()).sum()
        return energy, -torch.autograd.grad(energy, x, create_graph=self.training)[0]


KINDS = torch.tensor([0, 1, 1, 3, 2])


def test_forces_along_parameters_and_positions() -> None:
    model, x = Potential(), normal(5, 3)
    names = dict(model.named_parameters())
    dots = {name: normal(*p.shape, seed=3) for name, p in names.items()}
    _, (_, forces_dot) = fwdcompile.transform(model)(x, KINDS, tangents=dots)
    assert not x.requires_grad
    u = normal(5, 3, seed=4)
    pulled = torch.autograd.grad(
        (model(x, KINDS)[1] * u).sum(), list(names.values()), allow_unused=True
    )
    expected = sum(
        (g * dots[name]).sum() for name, g in zip(names, pulled, strict=True) if g is not None
    )
    torch.testing.assert_close((forces_dot * u).sum(), expected, rtol=1e-10, atol=1e-10)


def test_every_way_to_ask_gives_the_same(tmp_path: Path) -> None:
    model, x, v = Potential().eval(), normal(5, 3), normal(5, 3, seed=1)
    step = 1e-5
    differences = (model(x + step * v, KINDS)[1] - model(x - step * v, KINDS)[1]) / (2 * step)
    program = fwdcompile.transform(model)
    (_, forces), (energy_dot, forces_dot) = program(x, KINDS, tangents={"x": v})
    torch.testing.assert_close(forces_dot, differences.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(energy_dot, -(forces * v).sum())
    program.save(tmp_path / "forces.py")
    loaded = fwdcompile.load(tmp_path / "forces.py", model)
    for other in (
        loaded,
        fwdcompile.transform(model, compile=True),
        fwdcompile.transform(model, dynamic=True),
    ):
        _, (_, found) = other(x, KINDS, tangents={"x": v})
        torch.testing.assert_close(found, forces_dot)
    hessian = fwdcompile.jacfwd(lambda x: model(x, KINDS)[1])(x)
    torch.testing.assert_close(torch.einsum("iajb,jb->ia", hessian, v), forces_dot)
    torch.testing.assert_close(hessian, hessian.permute(2, 3, 0, 1))
    _, _, bent = fwdcompile.laplacian(model)(x, KINDS, tangents=[{"x": v}])
    ahead, behind = (program(x + s * v, KINDS, tangents={"x": v})[1][1] for s in (1e-4, -1e-4))
    torch.testing.assert_close(bent[1], (ahead - behind) / 2e-4, rtol=1e-5, atol=1e-7)


def test_torch_func_raises_on_the_forces() -> None:
    """As README and docs/derivatives.md say."""
    model, x = Potential(), normal(5, 3)
    with pytest.raises(RuntimeError, match="inside of a function being transformed"):
        torch.func.jvp(lambda x: model(x, KINDS), (x,), (x,))


class Inner(nn.Module):
    """A loss after two steps of training, of parameters that are gradients' targets themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 8).double(), nn.Linear(8, 1).double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weights = list(self.parameters())
        for _ in range(2):
            slopes = torch.autograd.grad(self.loss(weights, x, y), weights, create_graph=True)
            weights = [w - 0.1 * g for w, g in zip(weights, slopes, strict=True)]
        return self.loss(weights, 2 * x, y)

    def loss(self, weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        w, b, v, c = weights
        return F.mse_loss(F.linear(F.linear(x, w, b).tanh(), v, c), y)


class Penalty(nn.Module):
    """The gradient penalty of a critic, whose batch norm keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.critic = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 1)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = self.critic(x)
        slopes = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)[0]
        return (slopes.flatten(1).norm(dim=1) - 1).square().mean() + out.mean()


class Tied(nn.Module):
    """One weight in two layers: its gradient is that of both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(4, 4, bias=False).double() for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.a(x).tanh()).square().sum()
        return torch.autograd.grad(out, self.a.weight, create_graph=True)[0].sin().sum()


MODELS: dict[str, tuple[type[nn.Module], list[Tensor]]] = {
    "inner steps": (Inner, [normal(5, 3), normal(5, 1, seed=1)]),
    "penalty": (Penalty, [normal(4, 1, 6, 6)]),
    "tied": (Tied, [normal(3, 4)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_gradients_along_all_parameters(name: str) -> None:
    make, inputs = MODELS[name]
    model, twin = make(), make()
    dots = {n: normal(*p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters())}
    loss, loss_dot = fwdcompile.transform(model)(*inputs, tangents=dots)
    expected = twin(*inputs)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-10, atol=1e-10)
    along = sum((p.grad * dots[n]).sum() for n, p in twin.named_parameters() if p.grad is not None)
    torch.testing.assert_close(loss_dot.detach(), along, rtol=1e-10, atol=1e-10)
    for key, x in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], x)


def test_forces_are_trained_by_forward_gradients() -> None:
    """Until the atoms are at rest where they are."""
    model, x, none = Potential(), normal(5, 3), torch.zeros(5, 3, dtype=torch.float64)
    fgd = fwdcompile.FGD(
        model, lambda out, none: (out[1] - none).square().sum(), lr=3e-2, compile=False
    )
    losses = [float(fgd.step(x, KINDS, none)) for _ in range(100)]
    assert losses[-1] < 0.1 * losses[0]


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def, override]
        return 2 * g * ctx.saved_tensors[0]


def by_backward(x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    x.sin().sum().backward(create_graph=True)
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize(
    ("f", "why"),
    [
        (by_backward, r"backward\(\) writes gradients(.|\n)*torch.autograd.grad"),
        (slope(Square.apply), "Function here(.|\n)*plain ops"),
        (lambda x: torch.autograd.grad(x.detach().sum(), x)[0], "does not require grad"),
    ],
)
def test_refusals_name_the_line_and_leave_flags(f: Function, why: str) -> None:
    weight = nn.Linear(3, 3).double()

    def model(x: Tensor) -> Tensor:
        return f(weight(x))

    with pytest.raises(CaptureError, match=rf"test_tape.py:\d+: (.|\n)*{why}"):
        fwdcompile.jvp(model, (normal(2, 3),), (normal(2, 3),))
    assert all(p.requires_grad for p in weight.parameters())


def test_a_function_off_the_tape_keeps_its_derivative() -> None:
    def f(x: Tensor) -> Tensor:
        return slope(torch.sin)(x) * Square.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    x, v = normal(3), normal(3, seed=1)
    _, y_dot = fwdcompile.jvp(f, (x,), (v,))
    torch.testing.assert_close(y_dot, (2 * x * x.cos() - x * x * x.sin()) * v)
