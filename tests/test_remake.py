"""Autograd through generated programs: the gradient of a tangent is the second derivative."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Flow, Tied
from torch import Tensor, nn
from torch.nn import functional as F

import fwdcompile
from fwdcompile.capture import capture
from fwdcompile.remake import remake
from fwdcompile.transform import transform

F64 = torch.float64
W, B = torch.randn(2, 6, dtype=F64, generator=torch.Generator().manual_seed(0))


def check(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """The gradient of what a program gives against central differences."""
    x, v = x.detach().requires_grad_(), torch.randn_like(x)
    y = call(x) + 0 * x.sum()
    u = torch.randn_like(y)
    (grad,) = torch.autograd.grad((u * y).sum(), x)
    with torch.no_grad():
        plus, minus = ((u * call(x + step * v)).sum() for step in (1e-5, -1e-5))
    torch.testing.assert_close((grad * v).sum(), (plus - minus) / 2e-5, rtol=1e-6, atol=1e-8)


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer": lambda x: F.layer_norm(x, (6,), W, B),
    "layer of two dimensions": lambda x: F.layer_norm(x, (4, 6), eps=0.1),
    "root mean square": lambda x: F.rms_norm(x, (6,), W),
    "group": lambda x: F.group_norm(x, 2, W[:4], B[:4]),
    "batch": lambda x: F.batch_norm(x, None, None, W[:4], B[:4], training=True),
    "batch, evaluated": lambda x: F.batch_norm(x, B[:4], W[:4] ** 2, W[:4], training=False),
    "instance": lambda x: F.instance_norm(x),
    "weight": lambda x: torch._weight_norm(x, W[:3, None, None], 0),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str) -> None:
    norm = NORMS[name]
    x, v = torch.randn(2, 3, 4, 6, dtype=F64)
    fwd, lap = fwdcompile.transform(norm), fwdcompile.laplacian(norm)
    twice = fwdcompile.transform(fwd)
    check(lambda x: fwd(x, tangents={"x": v})[1], x)
    check(lambda x: twice(x, tangents={"x": v})[1][1], x)
    check(lambda x: lap(x, tangents=[{"x": v}, {"x": v.cos()}])[2], x)


def put(x: Tensor) -> Tensor:
    """Copies into rows, into a transposed part, over a whole tensor, and from another dtype."""
    y = torch.zeros_like(x)
    y[0] = x[1].sin()
    y[1:, :2].T.copy_(x[:2, 1:] ** 2)
    y.mul_(x)
    z = x.T.clone().copy_(y.T.float().exp())
    return z.flatten() * z.T.reshape(-1)


def test_copies() -> None:
    x, v = torch.randn(2, 4, 4, dtype=F64)
    fwd, lap = fwdcompile.transform(put), fwdcompile.laplacian(put)
    torch.testing.assert_close(
        fwd(x, tangents={"x": v}), torch.func.jvp(put, (x,), (v,)), rtol=1e-6, atol=1e-6
    )

    def grad(call: Callable[[Tensor], Tensor]) -> Tensor:
        point = x.clone().requires_grad_()
        return torch.autograd.grad(call(point).sum(), point)[0]

    expected = grad(lambda x: torch.func.jvp(put, (x,), (v,))[1])
    torch.testing.assert_close(grad(lambda x: fwd(x, tangents={"x": v})[1]), expected)
    assert grad(lambda x: lap(x, tangents=[{"x": v}])[2]).isfinite().all()


def test_forward_over_reverse() -> None:
    def slope(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: F.layer_norm(x, (6,), W, B).pow(3).sum())(x)

    x, v = torch.randn(2, 3, 6, dtype=F64)
    fwd = fwdcompile.transform(slope)
    check(lambda x: fwd(x, tangents={"x": v})[1], x)


@pytest.mark.compiled
def test_a_compiled_program() -> None:
    x, v = torch.randn(2, 3, 6, dtype=F64)
    fwd = fwdcompile.transform(NORMS["layer"], compile=True)
    check(lambda x: fwd(x, tangents={"x": v})[1], x)


def test_parameters_of_models() -> None:
    model, x, t = Flow().double(), torch.rand(2, 3, 2, dtype=F64), torch.rand(2, 1, dtype=F64)
    fwd, lap = fwdcompile.transform(model), fwdcompile.laplacian(model)
    dots = {"x": torch.randn_like(x), "t": torch.ones_like(t)}
    weight = model.read.weight
    v, u = torch.randn_like(weight), torch.randn_like(x)
    calls: list[Callable[[], Tensor]] = [
        lambda: fwd(x, t, tangents=dots)[1], lambda: lap(x, t, tangents=[dots])[2]
    ]  # fmt: skip
    for call in calls:
        (grad,) = torch.autograd.grad((u * call()).sum(), weight)
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                weight += step * v
                values.append((u * call()).sum())
        with torch.no_grad():
            weight += 1e-5 * v
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((grad * v).sum(), slope, rtol=1e-6, atol=1e-8)


def test_short_floats_have_statistics_of_longer_ones() -> None:
    captured = capture(nn.LayerNorm(6).bfloat16(), (torch.randn(3, 6).bfloat16(),), {})
    program = transform(captured, ["input"])
    nodes = {node for node in program.graph.nodes if "native_layer_norm" in str(node.target)}
    statistics = {u.meta["val"].dtype for n in nodes for u in n.users if u.args[1] > 0}
    assert remake(program.graph) == ""
    (made,) = (node for node in program.graph.nodes if "var_mean" in str(node.target))
    assert {x.dtype for x in made.meta["val"]} == statistics


def test_steps_and_tangents_without_autograd_keep_what_was_saved() -> None:
    tokens = torch.tensor([0, 1, 2, 3])
    fgd = fwdcompile.FGD(Tied(), F.cross_entropy, lr=0.1, compile=False)
    fgd.step(tokens, tokens)
    cut = fwdcompile.transform(Tied(), tracks_grad=False)
    cut.lower(tokens)
    kept = fwdcompile.transform(Tied())
    kept.lower(tokens)
    found = ["var_mean" in program.code for program in (fgd, cut, kept)]
    assert found == [False, False, True]


UNSEEN: dict[str, Callable[[Tensor], Any]] = {
    "special_bessel_j0": lambda x: torch.special.bessel_j0(x) * x,
    "linalg_det": lambda x: torch._linalg_det(x)[1] ** 2,
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_autograd_takes_for_a_constant_is_refused(name: str, tmp_path: Path) -> None:
    x = torch.rand(3, 3, dtype=F64) + torch.eye(3, dtype=F64)
    fwd = fwdcompile.transform(UNSEEN[name])
    tangents = {"x": torch.ones_like(x)}
    with pytest.raises(fwdcompile.FwdcompileError, match=f"result of {name} for a constant"):
        fwd(x.clone().requires_grad_(), tangents=tangents)
    expected = fwd(x, tangents=tangents)
    with torch.no_grad():
        torch.testing.assert_close(fwd(x.clone().requires_grad_(), tangents=tangents), expected)
    fwd.save(tmp_path / "program.py")
    saved = fwdcompile.load(tmp_path / "program.py")(x, tangents=tangents)
    torch.testing.assert_close(saved, expected)
    assert f"# Not for autograd: autograd takes a result of {name}" in fwd.code
    cut = fwdcompile.transform(UNSEEN[name], tracks_grad=False)
    _, y_dot = cut(x.clone().requires_grad_(), tangents=tangents)
    torch.testing.assert_close(y_dot, expected[1])
    assert not y_dot.requires_grad


def test_what_only_leaves_the_program_is_not_refused() -> None:
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * x, torch.special.bessel_j0(x.detach())

    x = torch.rand(3, dtype=F64).requires_grad_()
    (y, _), _ = fwdcompile.transform(model)(x, tangents={"x": torch.ones(3, dtype=F64)})
    assert y.requires_grad


def test_results_that_are_constant_indeed_are_not_refused() -> None:
    labels = torch.tensor([0, 2, 1])

    def slope(x: Tensor) -> Tensor:  # its program reads how many labels there are
        return torch.func.grad(lambda x: F.cross_entropy(x, labels))(x)

    x, v = torch.randn(2, 3, 4, dtype=F64)
    fwd = fwdcompile.transform(slope)
    check(lambda x: fwd(x, tangents={"x": v})[1], x)
