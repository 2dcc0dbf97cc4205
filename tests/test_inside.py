"""Transforms that a model calls: the outer program goes through the inner one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import custom_functions as zoo
import pytest
import torch
from nets import directions
from torch import Tensor, nn
from torch.nn import functional as F

import fwdcompile
from fwdcompile import FGD, CaptureError, ForwardGradient, Rademacher

F64 = torch.float64


class Residual(nn.Module):
    """u_t - u_xx / 10 + u u_x of a network's u(x, t)."""

    def __init__(self, *layers: nn.Module, **options: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), *layers, nn.Linear(8, 1))
        self.derivatives = fwdcompile.laplacian(self.net, **options)

    def forward(self, points: Tensor) -> Tensor:
        along_x, along_t = ({"input": e.expand(points.shape)} for e in torch.eye(2).to(points))
        u, (u_x, u_t), u_xx = self.derivatives(points, tangents=[along_x], first=[along_t])
        return u_t - u_xx / 10 + u * u_x


def check(model: nn.Module, *inputs: Tensor) -> None:
    """The jvp by all parameters against reverse mode: u'(Jv) = (J'u)'v."""
    values = dict(model.named_parameters())
    v = directions(values)
    y, y_dot = fwdcompile.transform(model)(*inputs, tangents=v)
    expected = model(*inputs)
    u = torch.randn_like(expected)
    torch.testing.assert_close(y, expected)
    names, parameters = zip(*values.items(), strict=True)
    grads = torch.autograd.grad((expected * u).sum(), parameters, materialize_grads=True)
    slope = sum((g * v[name]).sum() for name, g in zip(names, grads, strict=True))
    torch.testing.assert_close((u * y_dot).sum(), slope, rtol=1e-9, atol=1e-10)


def test_the_derivative_of_a_loss_of_derivatives() -> None:
    model, points = Residual().double(), torch.randn(5, 2, dtype=F64)
    check(model, points)
    check(model, points[:3])  # other sizes, another inner program


def test_a_transform_and_a_transform_of_a_transform() -> None:
    class Flowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
            self.once = fwdcompile.transform(self.net)
            self.twice = fwdcompile.transform(self.once)

        def forward(self, x: Tensor) -> Tensor:
            y, y_dot = self.once(x, tangents={"input": x})
            _, (_, y_ddot) = self.twice(x, tangents={"input": y})
            return y_dot * y_ddot

    check(Flowing().double(), torch.randn(4, 3, dtype=F64))


def test_a_model_inside_of_which_is_another_of_the_kind() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.residual = Residual()
            self.along = fwdcompile.transform(self.residual)

        def forward(self, points: Tensor) -> Tensor:
            return self.along(points, tangents={"points": points.sin()})[1]

    check(Outer().double(), torch.randn(5, 2, dtype=F64))


def test_a_function_that_closes_over_a_transform_has_the_parameters() -> None:
    derivatives = fwdcompile.laplacian(nn.Linear(2, 2).double())

    def residual(points: Tensor) -> Tensor:
        u, (u_x,), _ = derivatives(points, tangents=[{"input": points}])
        return u * u_x

    points = torch.randn(5, 2, dtype=F64)
    fwd = fwdcompile.transform(residual)
    fwd.lower(points)
    names = [slot.name for slot in fwd.program.inputs if slot.kind == "tangent"]
    assert names == ["derivatives.weight", "derivatives.bias"]


@pytest.mark.parametrize("options", [{}, {"compile": True}, {"dynamic": True}], ids=str)
def test_forward_gradients_train_it_without_a_backward_pass(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, points = Residual(**options), torch.rand(64, 2)
    fgd = FGD(
        model, F.mse_loss, lr=2e-2, directions=Rademacher(rank_one=True), samples=4, compile=False
    )
    losses = [float(fgd.step(points, torch.ones(64, 1))) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    assert "backward" not in fgd.code.replace("tanh_backward", "")


@pytest.mark.compiled
def test_a_compiled_step_is_the_eager_one() -> None:
    points, target = torch.rand(16, 2), torch.ones(16, 1)

    def stepped(compile: bool) -> list[float]:
        torch.manual_seed(0)
        fgd = FGD(Residual(), F.mse_loss, lr=1e-2, compile=compile)
        return [float(fgd.step(points, target)) for _ in range(3)]

    assert stepped(True) == pytest.approx(stepped(False), rel=1e-4)


def test_a_forward_gradient_for_any_optimizer() -> None:
    model, points = Residual(), torch.rand(16, 2)
    gradient = ForwardGradient(model, F.mse_loss)
    gradient(points, torch.ones(16, 1))
    assert all(p.grad is not None and p.grad.any() for p in list(model.parameters())[:-1])


def test_buffers_of_the_inner_model_move_once() -> None:
    model, twin = (Residual(nn.BatchNorm1d(8)).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    points = torch.randn(6, 2, dtype=F64)
    fwdcompile.transform(model)(points, tangents={"points": points})
    twin(points)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert model.net[2].num_batches_tracked == 1


def test_what_is_kept_out_of_autograd_is_constant_for_the_outer_transform() -> None:
    net = nn.Linear(2, 1).double()
    free, cut = (fwdcompile.transform(net, tracks_grad=flag) for flag in (True, False))
    points = torch.randn(5, 2, dtype=F64)
    for inner, moves in ((free, True), (cut, False)):

        def model(x: Tensor, inner: Any = inner) -> Tensor:
            return inner(x, tangents={"input": x})[1]

        _, y_dot = fwdcompile.transform(model)(points, tangents={"x": points})
        assert bool(y_dot.any()) == moves


class Written(nn.Module):
    """The same residual without u_xx, by functions that forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def along(self, jvp: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(lambda x: self.net(torch.cat([x, t], 1)), (x,), (torch.ones_like(x),))

    def residual(self, jvp: Any, jacfwd: Any, x: Tensor, t: Tensor) -> Tensor:
        u, u_x = self.along(jvp, x, t)
        _, u_t = jvp(functools.partial(self.field, x), (t,), (torch.ones_like(t),))
        jacobian = jacfwd(self.net)(torch.cat([x, t], 1)[0])
        return u_t + u * u_x + jacobian.square().sum()

    def field(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([x, t], 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.residual(fwdcompile.jvp, fwdcompile.jacfwd, x, t)


def test_functions_that_forward_writes() -> None:
    torch.manual_seed(0)
    model = Written().double()
    x, t = torch.randn(2, 5, 1, dtype=F64)
    expected = model.residual(torch.func.jvp, torch.func.jacfwd, x, t)
    fwd = fwdcompile.transform(model)
    y, _ = fwd(x, t, tangents={"x": x})
    torch.testing.assert_close(y, expected)
    check(model, x, t)
    steps = FGD(model, lambda out, target: (out - target).square().mean(), lr=1e-2, compile=False)
    losses = [float(steps.step(x, t, torch.zeros_like(x))) for _ in range(3)]
    torch.testing.assert_close(losses[0], float(expected.detach().square().mean()))
    assert len(set(losses)) == 3


def test_a_jvp_of_a_jvp() -> None:
    x, v = torch.randn(2, 3, dtype=F64)

    def cubed(jvp: Any, order: int) -> Callable[[Tensor], Tensor]:
        if not order:
            return lambda x: (x**3).sin()
        inner = cubed(jvp, order - 1)
        return lambda x: jvp(lambda z: inner(z) * x, (x,), (v,))[1]

    for order in (1, 2):
        found = fwdcompile.jvp(cubed(fwdcompile.jvp, order), (x,), (v,))
        expected = torch.func.jvp(cubed(torch.func.jvp, order), (x,), (v,))
        torch.testing.assert_close(found, expected)


def test_transforms_that_forward_makes() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def model(x: Tensor) -> Tensor:
        axes = [{"input": e.expand_as(x)} for e in torch.eye(2, dtype=F64)]
        u, _, u_laplace = fwdcompile.laplacian(net)(x, tangents=axes)
        twice = fwdcompile.transform(fwdcompile.transform(net))
        (_, u_dot), (_, u_ddot) = twice(x, tangents={"input": x})
        return u_laplace + u * u_dot + u_ddot

    def by_torch(x: Tensor) -> Tensor:
        hessian = torch.stack([torch.func.hessian(lambda z: net(z)[0])(row) for row in x])
        u_laplace = hessian.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
        u, u_dot = torch.func.jvp(net, (x,), (x,))
        return u_laplace + u * u_dot + torch.einsum("bi,bij,bj->b", x, hessian, x)[:, None]

    x, h = torch.randn(4, 2, dtype=F64), 1e-5
    fwd = fwdcompile.transform(model)
    for _ in range(2):
        y, y_dot = fwd(x, tangents={"x": x})
        torch.testing.assert_close(y, by_torch(x))
        slope = (by_torch(x + h * x) - by_torch(x - h * x)) / (2 * h)
        torch.testing.assert_close(y_dot, slope, rtol=1e-7, atol=1e-7)


class Scaled:
    """A function that is another object each time it is made."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.sin()


def test_a_module_that_forward_makes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fwdcompile.inside, "_MOST", 3)

    def model(x: Tensor) -> Tensor:
        layer = nn.Tanh()
        return fwdcompile.jvp(lambda x: layer(x), (x,), (x,))[1]

    with pytest.raises(CaptureError, match=r"test_inside.py.*\n.*another thing in each call"):
        fwdcompile.transform(model)(torch.ones(3), tangents={"x": torch.ones(3)})


def test_a_transform_that_forward_makes_is_refused() -> None:
    net = nn.Linear(2, 1)
    makers: list[Callable[[Tensor], Any]] = [
        lambda x: fwdcompile.transform(Scaled())(x, tangents={"x": x})[1],
        lambda x: fwdcompile.transform(lambda z: z * x)(x, tangents={"z": x})[1],
        lambda x: fwdcompile.jvp(Scaled(), (x,), (x,))[1],
    ]
    for model in makers:
        with pytest.raises(CaptureError, match="made anew in each call") as met:
            fwdcompile.transform(model)(torch.ones(3, 2), tangents={"x": torch.ones(3, 2)})
        assert "test_inside.py" in str(met.value)
    y, _ = fwdcompile.transform(net)(torch.ones(3, 2), tangents={"input": torch.ones(3, 2)})
    assert y.shape == (3, 1)  # nothing is left behind


def test_functions_with_a_derivative_of_their_own_are_refused(tmp_path: Path) -> None:
    inner = fwdcompile.transform(lambda x: zoo.RoundThrough.apply(x) * x)
    inner.lower(torch.ones(3), tangents="x")
    inner.save(tmp_path / "inner.py")
    saved = fwdcompile.load(tmp_path / "inner.py")
    for program in (inner, saved):

        def model(x: Tensor, program: Any = program) -> Any:
            return program(x, tangents={"x": x})[1]

        with pytest.raises(CaptureError, match="of RoundThrough, a torch.autograd.Function") as met:
            fwdcompile.transform(model)(torch.ones(3), tangents={"x": torch.ones(3)})
        assert "test_inside.py" in str(met.value)


def test_a_saved_program_becomes_a_part_of_a_model(tmp_path: Path) -> None:
    inner, x = fwdcompile.transform(torch.sin), torch.randn(3, dtype=F64)
    inner(x, tangents={"arg0": x})
    inner.save(tmp_path / "inner.py")
    saved = fwdcompile.load(tmp_path / "inner.py")
    y, y_dot = fwdcompile.jvp(lambda x: saved(x, tangents={"arg0": x})[1], (x,), (x,))
    torch.testing.assert_close(y, x * x.cos())
    torch.testing.assert_close(y_dot, x * x.cos() - x * x * x.sin())


def test_open_sizes_outside_are_refused() -> None:
    fwd = fwdcompile.transform(Residual(), dynamic=True)
    with pytest.raises(CaptureError, match="the sizes of its inputs are open"):
        fwd(torch.ones(3, 2), tangents={"points": torch.ones(3, 2)})


def test_a_state_that_holds_in_forward_alone_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    inner = fwdcompile.transform(net)

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Any:
            self.net.eval()
            y_dot = inner(x, tangents={"input": x})[1]
            self.net.train()
            return y_dot

    fwd = fwdcompile.transform(Frozen())
    for _ in range(2):
        with pytest.raises(CaptureError, match="sets training flags, or autocast"):
            fwd(torch.ones(3, 2), tangents={"x": torch.ones(3, 2)})


def test_errors_of_the_inner_program_are_those_of_its_model() -> None:
    inner = fwdcompile.transform(lambda x: x if x.sum() > 0 else -x)

    def model(x: Tensor) -> Any:
        return inner(x, tangents={"x": x})[1]

    with pytest.raises(CaptureError, match="decides in Python by the value of a tensor"):
        fwdcompile.transform(model)(torch.ones(3), tangents={"x": torch.ones(3)})


TORCH_FUNC: dict[str, Callable[[Callable[..., Any], Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda z: f(z).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda z: f(z).sum()))(x),
}


@pytest.mark.parametrize("name", TORCH_FUNC)
def test_a_first_call_may_be_inside_of_torch_func(name: str) -> None:
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    fwd = fwdcompile.transform(lambda z: z.sin().square())
    found = TORCH_FUNC[name](lambda z: fwd(z, tangents={"z": torch.ones_like(z)})[1], x)
    expected = TORCH_FUNC[name](lambda z: 2 * z.sin() * z.cos(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.compiled
def test_a_first_call_may_be_inside_of_torch_compile() -> None:
    x = torch.linspace(-1, 1, 6, dtype=torch.float64)
    fwd = fwdcompile.transform(torch.nn.Sequential(torch.nn.Tanh()), tracks_grad=False)
    found = torch.compile(lambda z: fwd(z, tangents={"input": z})[1].sum(), backend="eager")(x)
    torch.testing.assert_close(found, (x * (1 - x.tanh() ** 2)).sum(), rtol=1e-12, atol=1e-12)


def test_copies_of_a_model_have_transforms_of_their_own() -> None:
    model, points = Residual(), torch.randn(3, 2)
    expected = model(points)
    twin = copy.deepcopy(model)
    assert twin.derivatives.base is twin.net
    with torch.no_grad():
        twin.net[0].weight.zero_()
    assert not torch.equal(twin(points), expected)
    torch.testing.assert_close(model(points), expected)
    check(twin.double(), points.double())
