from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Gated, difference, directions
from torch import Tensor
from torch._higher_order_ops import associative_scan, scan, while_loop
from torch._higher_order_ops import map as mapped
from torch.utils.checkpoint import checkpoint

import fwdcompile
from fwdcompile.program import graphs

F = torch.nn.functional


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def agrees(
    model: Callable[..., Any],
    plain: Callable[..., Any],
    active: str,
    compile: bool = False,
    **args: Tensor,
) -> fwdcompile.Forward:
    """Checks two directions against torch.func.jvp of `plain`, second order against differences.

    Arguments go by name; those in `active` have tangents.
    """
    ways = [{name: torch.randn_like(args[name]) for name in active} for _ in range(2)]
    fwd = fwdcompile.transform(model, compile=compile)
    y, y_dots = fwd(*args.values(), tangents=ways)

    def moved(changed: dict[str, Tensor]) -> Any:
        return plain(**{**args, **changed})

    at = {name: args[name] for name in active}
    for way, y_dot in zip(ways, y_dots, strict=True):
        torch.testing.assert_close((y, y_dot), torch.func.jvp(moved, (at,), (way,)))

    def slope(step: Tensor) -> Tensor:
        shifted = {name: args[name] + step * ways[0][name] for name in active}
        out = fwd(*{**args, **shifted}.values(), tangents=ways)[1][0]
        return torch.cat([x.flatten() for x in (out if isinstance(out, tuple) else (out,))])

    second = fwdcompile.transform(fwd)(*args.values(), tangents=ways[0])[1][1]
    flat = [x.flatten() for x in (second if isinstance(second, tuple) else (second,))]
    numeric = difference(slope, torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(torch.cat(flat), numeric, rtol=1e-6, atol=1e-7)
    return fwd


def results_of(fwd: fwdcompile.Forward, op: str) -> int:
    """How many results the one higher-order op of the last program has."""
    (node,) = (node for node in fwd.program.graph.nodes if str(node.target) == op)
    return len(node.meta["val"])


def both(x: Tensor, w: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x, w: torch.tanh(x @ w), lambda x, w: x * w[0], (x, w))


def both_plain(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w) if x.sum() > 0 else x * w[0]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("active", ["x", "w", "xw"])
def test_cond(active: str, sign: int) -> None:
    x = sign * torch.rand(2, 3)
    agrees(both, both_plain, active, x=x, w=torch.randn(3, 3))


def one(x: Tensor, w: Tensor) -> Any:
    """The first result depends on w in one branch, the second in none, the third is x itself."""
    return torch.cond(
        x.sum() > 0,
        lambda x, w: (x @ w, x.sin(), x.clone()),
        lambda x, w: (x * 2, x.cos(), x.clone()),
        (x, w),
    )


def one_plain(x: Tensor, w: Tensor) -> Any:
    return (x @ w, x.sin(), x.clone()) if x.sum() > 0 else (x * 2, x.cos(), x.clone())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("active", ["w", "xw"])
def test_a_result_has_a_tangent_if_it_has_one_in_either_branch(active: str, sign: int) -> None:
    x = sign * torch.rand(2, 3)
    fwd = agrees(one, one_plain, active, x=x, w=torch.randn(3, 3))
    fwd(x, torch.ones(3, 3), tangents={"w": torch.ones(3, 3)})
    assert results_of(fwd, "cond") == 4  # of the three tangents there is one to compute


def nested(x: Tensor, w: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 100, lambda x: x * w.sum(), lambda x: x.exp() * w.sum(), (x,))

    return torch.cond(x.sum() > 0, inner, lambda x: x.sin() + w.prod(), (x,))


def nested_plain(x: Tensor, w: Tensor) -> Tensor:
    if x.sum() > 100:
        return x * w.sum()
    return x.exp() * w.sum() if x.sum() > 0 else x.sin() + w.prod()


@pytest.mark.parametrize("scale", [1.0, -1.0, 1000.0])
def test_a_cond_in_a_branch_and_values_closed_over(scale: float) -> None:
    x = scale * (1 + torch.rand(2, 3)) / (100 if scale > 100 else 1)
    agrees(nested, nested_plain, "xw", x=x, w=torch.rand(3))


@pytest.mark.parametrize("sign", [1, -1])
def test_parameters_of_a_module_in_a_branch(sign: int) -> None:
    model, x = Gated(), sign * torch.rand(2, 3)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    dots = directions(parameters)

    def plain(p: dict[str, Tensor]) -> Tensor:
        linear = F.linear(x, p["linear.weight"], p["linear.bias"])
        return linear.tanh() if x.sum() > 0 else x * p["scale"]

    actual = fwdcompile.transform(model)(x, tangents=dots)
    torch.testing.assert_close(actual, torch.func.jvp(plain, (parameters,), (dots,)))


def rnn(x: Tensor, w: Tensor) -> Any:
    def cell(h: Tensor, x: Tensor) -> Any:
        h = torch.tanh(h @ w + x)
        return h, h * h

    return scan(cell, torch.zeros(2, 3), x)


def rnn_plain(x: Tensor, w: Tensor) -> Any:
    h, ys = torch.zeros(2, 3), []
    for row in x:
        h = torch.tanh(h @ w + row)
        ys.append(h * h)
    return h, torch.stack(ys)


@pytest.mark.parametrize("active", ["x", "w", "xw"])
def test_scan_carries_a_tangent_that_its_body_makes(active: str) -> None:
    agrees(rnn, rnn_plain, active, x=torch.randn(4, 2, 3), w=torch.randn(3, 3))


def relay(x: Tensor, w: Tensor) -> Any:
    """The tangent of x reaches c in the third round only, through a and b; n stays without."""

    def body(c: Any, row: Tensor) -> Any:
        a, b, c, n = c
        return (row.sin(), a * w, b.exp(), n + 1), (c * 2, n * 1.0)

    start = (torch.ones(3), torch.ones(3), torch.ones(3), torch.zeros(()))
    return pytree_flat(scan(body, start, x))


def relay_plain(x: Tensor, w: Tensor) -> Any:
    a = b = c = torch.ones(3)
    n, ys = torch.zeros(()), []
    for row in x:
        ys.append((c * 2, n * 1.0))
        a, b, c, n = row.sin(), a * w, b.exp(), n + 1
    return pytree_flat(((a, b, c, n), tuple(map(torch.stack, zip(*ys, strict=True)))))


def pytree_flat(tree: Any) -> tuple[Tensor, ...]:
    return tuple(torch.utils._pytree.tree_leaves(tree))


@pytest.mark.parametrize(("active", "tangents"), [("x", 4), ("w", 3)])
def test_activity_of_what_is_carried_is_a_fixed_point(active: str, tangents: int) -> None:
    fwd = agrees(relay, relay_plain, active, x=torch.randn(5, 3), w=torch.randn(3))
    assert results_of(fwd, "scan") == 6 + 2 * tangents  # of a, b, c and the first of the stacked


def power(x: Tensor, w: Tensor) -> Tensor:
    def body(i: Tensor, x: Tensor) -> Any:
        x = w @ x
        return i + 1, x / x.norm()

    return while_loop(lambda i, x: i < 4, body, (torch.tensor(0), x))[1]


def power_plain(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(4):
        x = w @ x / (w @ x).norm()
    return x


def newton(x: Tensor, w: Tensor) -> Tensor:
    """The root of y**3 = w from x on, until the residual is small: the number of rounds varies."""

    def unfinished(y: Tensor) -> Tensor:
        return ((y**3 - w).abs() > 1e-3).any()

    return while_loop(unfinished, lambda y: (y - (y**3 - w) / (3 * y * y),), (x,))[0]


def newton_plain(x: Tensor, w: Tensor) -> Tensor:
    while ((x**3 - w).abs() > 1e-3).any():
        x = x - (x**3 - w) / (3 * x * x)
    return x


@pytest.mark.parametrize("active", ["x", "w", "xw"])
def test_while_loop(active: str) -> None:
    agrees(power, power_plain, active, x=torch.randn(3), w=torch.randn(3, 3))


@pytest.mark.parametrize("start", [1.0, 20.0])
def test_a_while_loop_whose_rounds_depend_on_data(start: float) -> None:
    x, w = torch.full((2,), start), torch.tensor([2.0, 5.0])
    agrees(newton, newton_plain, "xw", x=x, w=w)


@pytest.mark.parametrize("active", ["x", "w", "xw"])
def test_map(active: str) -> None:
    def model(x: Tensor, w: Tensor) -> Any:
        return mapped(lambda row: (torch.tanh(row @ w), w.sum().clone()), x)

    def plain(x: Tensor, w: Tensor) -> Any:
        return torch.tanh(x @ w), w.sum().expand(len(x))

    agrees(model, plain, active, x=torch.randn(4, 3), w=torch.randn(3, 3))


def test_associative_scan_is_taken_apart_by_export() -> None:
    def model(x: Tensor) -> Tensor:
        return associative_scan(lambda a, b: a * b, x, 0, combine_mode="generic")

    agrees(model, lambda x: x.cumprod(0), "x", x=torch.randn(5, 2))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_is_inlined(reentrant: bool) -> None:
    def model(x: Tensor, w: Tensor) -> Tensor:
        return checkpoint(lambda x: torch.tanh(x @ w), x, use_reentrant=reentrant).sin()

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(x @ w).sin()

    fwd = agrees(model, plain, "xw", x=torch.randn(2, 3), w=torch.randn(3, 3))
    assert len(list(graphs(fwd.program.graph))) == 1


def test_random_numbers_in_a_branch_are_shared_by_primal_and_tangent() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: F.dropout(x), lambda x: x.sin(), (x,))

    x = torch.rand(50) + 0.1
    y, y_dot = fwdcompile.transform(model)(x, tangents={"x": torch.ones(50)})
    torch.testing.assert_close(y_dot, y / x)
    assert 0 < int((y == 0).sum()) < 50


def test_reverse_mode_goes_through_the_primal() -> None:
    model, x = Gated(), torch.rand(2, 3, requires_grad=True)
    dots = directions(dict(model.named_parameters()))
    (expected,) = torch.autograd.grad(model.linear(x).tanh().sum(), x)
    for tracks_grad in (True, False):
        fwd = fwdcompile.transform(model, tracks_grad=tracks_grad)
        y, y_dot = fwd(x, tangents=dots)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)
        assert y_dot.requires_grad is tracks_grad


def test_forward_gradients_train_a_model_that_branches() -> None:
    target = torch.zeros(8, 3)
    for rank_one in (False, True):
        model, x = Gated(), torch.rand(8, 3)
        directions = fwdcompile.Rademacher(rank_one=rank_one)
        fgd = fwdcompile.FGD(
            model, F.mse_loss, lr=1e-2, directions=directions, samples=2, compile=False
        )
        losses = [float(fgd.step(sign * x, target)) for sign in (1, -1) * 10]
        assert losses[-2] < losses[0]
        assert losses[-1] < losses[1]
