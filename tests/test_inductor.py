"""Passes keep meaning, and change what they are for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy, max_pool2d

from fwdcompile import FGD, Normal, Rademacher
from fwdcompile.compiling import compiled_step
from fwdcompile.directions import Directions
from fwdcompile.inductor import (
    FEW,
    addends_on_the_way,
    images_in_order,
    parts_apart,
    sums_of_products,
)

X, Y = torch.linspace(-1, 1, 24).view(4, 6), torch.tensor([0, 1, 2, 1])


@pytest.mark.compiled
def test_no_addend_of_a_product_is_written_out() -> None:
    """A rank-one tangent's part of a product is computed where the sum is read."""
    layers = [layer for _ in range(3) for layer in (nn.Linear(6, 6, bias=False), nn.ReLU())]
    model, twin = nn.Sequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    settings: dict[str, Any] = {"lr": 0.1, "directions": Rademacher(rank_one=True)}
    fgd = FGD(model, cross_entropy, **settings)
    with fresh_cache():
        loss, (code,) = run_and_get_code(fgd.step, X, Y)
    assert code.count("extern_kernels.mm(") == 5 and "extern_kernels.addmm(" not in code
    expected = FGD(twin, cross_entropy, compile=False, **settings).step(X, Y)
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("sums", "changed"),
    [
        (lambda x, w: (x @ w).view(2, 3, 5) + torch.addmm(w[0], x, w).view(2, 3, 5), True),
        (lambda x, w: (x @ w).view(2, 15) + (x @ (w + 1)).view(2, 15), True),
        (lambda x, w: (x @ w).view(30) + (x @ w).view(5, 6).mT.reshape(30), False),
        (lambda x, w: torch.add((x @ w).view(30), (x @ (w + 1)).view(30), alpha=2), False),
        (lambda x, w: 2 * (y := (x @ w).view(30)) + y, False),
    ],
)
def test_products_are_added_before_they_are_viewed(sums: Any, changed: bool) -> None:
    x, w = torch.randn(6, 4), torch.randn(4, 5)
    graph = make_fx(sums)(x, w)
    sums_of_products(graph.graph)
    graph.recompile()
    graph.graph.lint()
    adds = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    sources = [{source.target for source in add.all_input_nodes} for add in adds]
    assert any(found and found <= products for found in sources) == changed
    torch.testing.assert_close(graph(x, w), sums(x, w))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.uint8, torch.bool])
def test_addends_of_any_dtype_are_added(dtype: torch.dtype) -> None:
    def sums(x: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return x @ w + u * u, u[:, :1] * u + x @ w

    inputs = torch.randn(3, 4), torch.randn(4, 5), torch.randint(1, 9, (3, 5)).to(dtype)
    graph = make_fx(sums)(*inputs)
    before = graph.code
    addends_on_the_way(graph.graph)
    graph.recompile()
    assert (graph.code != before) == (dtype == torch.float32)
    torch.testing.assert_close(graph(*inputs), sums(*inputs), rtol=0, atol=0)


@pytest.mark.compiled
@pytest.mark.parametrize(
    "directions", [Rademacher(rank_one=True), pytest.param(Normal(), marks=pytest.mark.slow)]
)
def test_layers_that_are_alike_share_kernels(directions: Directions) -> None:
    """The code of a step grows by calls with its depth, not by kernels."""

    def kernels(depth: int) -> int:
        model = nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(6, 6), nn.Tanh())])
        with fresh_cache():
            fgd = FGD(model, cross_entropy, lr=0.1, directions=directions)
            _, (code,) = run_and_get_code(fgd.step, X, Y)
        return code.count("async_compile.cpp_pybinding")

    assert kernels(2 * FEW) == kernels(FEW)


@pytest.mark.parametrize("count", [FEW, FEW + 1])
@pytest.mark.parametrize("drawn", [False, True])
def test_parts_of_what_was_drawn_are_apart_where_they_are_many(count: int, drawn: bool) -> None:
    def parts(x: Tensor) -> tuple[Tensor, ...]:
        y = 2 * x
        return torch.split(y.as_strided(y.shape, y.stride()) if drawn else y, 3)

    x = torch.randn(3 * count)
    graph = make_fx(parts)(x)
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.split.Tensor):
        node.target = torch.ops.aten.split_with_sizes.default
        node.args = (node.args[0], [3] * count)
    parts_apart(graph.graph)
    graph.recompile()
    assert ("split_with_sizes_copy" in graph.code) == (drawn and count > FEW)
    for mine, theirs in zip(graph(x), parts(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "device", "changed"),
    [((4, 9), "cpu", True), ((2, 2, 9), "cpu", False), ((4, 9), "meta", False)],
)
def test_images_are_in_order_before_they_are_flattened(
    shape: tuple[int, ...], device: str, changed: bool
) -> None:
    def flattened(x: Tensor) -> Tensor:
        y = (2 * x).permute(0, 2, 1).clone(memory_format=torch.contiguous_format)
        return y.view(shape) + 1

    x = torch.arange(36.0, device=device).view(4, 3, 3)
    graph = make_fx(flattened)(x)
    images_in_order(graph.graph)
    graph.recompile()
    assert ("as_strided" in graph.code) == changed
    torch.testing.assert_close(graph(x), flattened(x), rtol=0, atol=0)


@pytest.mark.compiled
def test_flattened_images_are_not_read_number_by_number() -> None:
    def stacked(x: Tensor) -> Tensor:
        y = max_pool2d(x, 2)
        return torch.cat([y.flatten(1), (2 * y).flatten(1)]).mT

    x = torch.randn(8, 16, 18, 18).to(memory_format=torch.channels_last)
    with fresh_cache():
        step = compiled_step(stacked, "default", False, x.device)
        out, (code,) = run_and_get_code(step, x)
    assert "maximum(" in code and "max_propagate_nan(" not in code
    torch.testing.assert_close(out, stacked(x), rtol=0, atol=0)
