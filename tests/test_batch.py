"""Batches of directions, against the same directions one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import custom_functions as zoo
import pytest
import torch
from batches import MAKERS, Maker, check, close, rows
from controls import branch, loop, recurrence
from nets import Decoder, Flow, Lstm, Mlp, Tied
from torch import Tensor, nn
from torch._higher_order_ops import map as torch_map
from torch._higher_order_ops import scan

import fwdcompile
from fwdcompile.errors import TangentError

F64 = torch.float64


def batch_of(count: int, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    moving = dict(model.named_parameters()) | inputs
    return {n: torch.randn(count, *x.shape, dtype=F64) for n, x in moving.items()}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("model", [Mlp(), Lstm(), Flow()], ids=lambda model: type(model).__name__)
def test_parameters_and_inputs(maker: Maker, model: nn.Module) -> None:
    shapes = {Mlp: [(4, 6)], Lstm: [(2, 3, 3)], Flow: [(2, 3, 2), (2, 1)]}[type(model)]
    inputs = [torch.rand(shape, dtype=F64) for shape in shapes]
    check(maker, model.double(), inputs, batch_of(3, model, {}))


@pytest.mark.parametrize("maker", MAKERS)
def test_integers_keywords_and_tied_weights(maker: Maker) -> None:
    tokens = torch.randint(0, 11, (2, 6))
    check(maker, Decoder().double(), (tokens, tokens), batch_of(2, Decoder(), {}))
    check(maker, Tied().double(), (torch.tensor([0, 1, 2]),), batch_of(2, Tied(), {}))


def _map(x: Tensor) -> Tensor:
    def row(x: Tensor, w: Tensor) -> Tensor:
        return x.sin() * w

    return torch_map(row, x.outer(x).exp(), x).square().sum(0)


def _scan_of_slices(x: Tensor) -> Tensor:
    """What is scanned moves, what is carried starts without a tangent."""

    def step(c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(c + w), c * w

    last, each = scan(step, torch.ones(2, dtype=F64), x[:, None] * torch.ones(2, dtype=F64))
    return last.sum() * each.sum(1).exp()


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    "function",
    [branch, recurrence, loop, _map, _scan_of_slices],
    ids=lambda function: function.__name__,
)
def test_control_flow(maker: Maker, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.rand(3, dtype=F64)
    check(maker, function, (x,), {"x": torch.randn(4, 3, dtype=F64)})


@pytest.mark.parametrize("maker", MAKERS)
def test_functions_keep_their_own_derivatives(maker: Maker) -> None:
    x = torch.rand(3, dtype=F64) * 4
    check(
        maker, lambda x: zoo.RoundThrough.apply(x * x) * x, (x,), {"x": torch.randn(4, 3).double()}
    )


def test_buffers_move_once_and_random_numbers_are_the_models() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()).double()
    x, dots = torch.randn(6, 3, dtype=F64), torch.randn(5, 6, 3, dtype=F64)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(1)
    _, y_dots = fwdcompile.transform(model)(x, tangents=rows({"input": dots}))
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.load_state_dict(before, strict=False)
    torch.manual_seed(1)
    _, y_dot = fwdcompile.transform(model, batched=True)(x, tangents={"input": dots})
    close(y_dot, torch.stack(y_dots))
    close(dict(model.named_buffers()), after)


def test_kernels_that_do_not_broadcast() -> None:
    x, dots = torch.randn(16, 8, 8), torch.randn(3, 16, 8, 8)
    _, y_dots = fwdcompile.transform(nn.GELU())(x, tangents=rows({"input": dots}))
    _, y_dot = fwdcompile.transform(nn.GELU(), batched=True)(x, tangents={"input": dots})
    torch.testing.assert_close(y_dot, torch.stack(y_dots))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts(layout: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).double()
    model = model.to(memory_format=layout)
    x = torch.randn(2, 3, 5, 5, dtype=F64).to(memory_format=layout)
    dots = batch_of(3, model, {"input": x})
    check(fwdcompile.transform, model, (x,), dots)
    dots["input"] = dots["input"].movedim(0, -1).contiguous().movedim(-1, 0)
    check(fwdcompile.transform, model, (x,), dots)
    still = {"input": torch.randn_like(x).expand(3, *x.shape)}
    check(fwdcompile.transform, model, (x,), still)


@pytest.mark.compiled
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("compile", [False, True])
def test_open_sizes(maker: Maker, compile: bool) -> None:
    model = Mlp().double()
    fwd = maker(model, batched=True, dynamic=True, compile=compile)
    for size in (4, 7):
        x, dots = torch.randn(size, 6, dtype=F64), torch.randn(3, size, 6, dtype=F64)
        y, y_dots, *sums = maker(model)(x, tangents=rows({"x": dots}))
        close(fwd(x, tangents=[{"x": dots}]), (y, (torch.stack(y_dots),), *sums))
    assert len({id(lowered) for lowered in fwd._cache.values()}) == 1


def test_batches_of_different_lengths_and_names_share_one_primal() -> None:
    model, x = Mlp().double(), torch.randn(4, 6, dtype=F64)
    weight = torch.randn(2, *model.fc1.weight.shape, dtype=F64)
    along_x = torch.randn(5, 4, 6, dtype=F64)
    fwd, single = fwdcompile.transform(model, batched=True), fwdcompile.transform(model)
    y, (by_weight, by_x) = fwd(x, tangents=[{"fc1.weight": weight}, {"x": along_x}])
    close(y, model(x))
    close(by_weight, torch.stack([single(x, tangents={"fc1.weight": w})[1] for w in weight]))
    close(by_x, torch.stack([single(x, tangents={"x": v})[1] for v in along_x]))
    assert fwd.code.count("tanh:") == 1 and "in 7 directions" in fwd.code
    lap = fwdcompile.laplacian(model, batched=True)
    found = lap(x, tangents=[{"x": along_x}], first=[{"fc1.weight": weight}])
    close(found[1], (by_x, by_weight))
    close(found[2], fwdcompile.laplacian(model)(x, tangents=rows({"x": along_x}))[2])


@pytest.mark.parametrize("maker", MAKERS)
def test_the_program_does_not_grow(maker: Maker) -> None:
    x = torch.zeros(2, 4, 6, dtype=torch.long)
    fwd, names = maker(Decoder(), batched=True), ["places.weight", "norm.weight"]
    tangents: Any = [names] if maker is fwdcompile.laplacian else names
    programs = (fwd.lower(x[0], x[1], tangents=tangents, directions=k).program for k in (3, 50))
    counts = [len(program.graph.nodes) for program in programs]
    assert counts[0] == counts[1]


def test_outer_of_a_transform_of_a_transform() -> None:
    model, x = Mlp().double(), torch.randn(4, 6, dtype=F64)
    u, dots = torch.randn(4, 6, dtype=F64), torch.randn(3, 4, 6, dtype=F64)
    twice = fwdcompile.transform(fwdcompile.transform(model), batched=True)
    plain = fwdcompile.transform(fwdcompile.transform(model))
    (_, _), (_, mixed) = twice(x, tangents={"x": dots}, inner={"x": u})
    each = [plain(x, tangents={"x": v}, inner={"x": u})[1][1] for v in dots]
    close(mixed, torch.stack(each))
    with pytest.raises(TangentError, match="give inner="):
        twice(x, tangents={"x": dots})
    with pytest.raises(ValueError, match="only the outermost transform can be batched"):
        fwdcompile.transform(fwdcompile.transform(model, batched=True))


def test_inside_a_model() -> None:
    f = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    columns = fwdcompile.transform(f, batched=True)
    basis = torch.eye(3, dtype=F64)[:, None].expand(3, 4, 3)

    def slopes(x: Tensor) -> Tensor:
        return columns(x, tangents={"input": basis})[1].square().sum()

    x, v = torch.randn(2, 4, 3, dtype=F64)
    expected = torch.autograd.functional.jvp(
        lambda x: torch.autograd.functional.jacobian(
            lambda x: f(x).sum(), x, create_graph=True
        ).square().sum(), x, v,
    )  # fmt: skip
    close(fwdcompile.transform(slopes)(x, tangents={"x": v}), expected)


def test_autograd_goes_through_it() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    x, dots = torch.randn(5, 3, dtype=F64), torch.randn(6, 5, 3, dtype=F64)
    parameters = list(model.parameters())

    def gradient(y_dot: Tensor) -> Any:
        return torch.autograd.grad(y_dot.sin().sum(), parameters, materialize_grads=True)

    together = fwdcompile.transform(model, batched=True)(x, tangents={"input": dots})[1]
    each = fwdcompile.transform(model)(x, tangents=rows({"input": dots}))[1]
    close(gradient(together), gradient(torch.stack(each)))
    cut = fwdcompile.transform(model, batched=True, tracks_grad=False)
    assert not cut(x, tangents={"input": dots})[1].requires_grad


def test_compiled_and_saved(tmp_path: Path) -> None:
    model, x = Mlp().double(), torch.randn(4, 6, dtype=F64)
    dots = {"x": torch.randn(5, 4, 6, dtype=F64)}
    fwd = check(fwdcompile.transform, model, (x,), dots, compile=True)
    fwd.save(tmp_path / "program.py")
    saved = fwdcompile.load(tmp_path / "program.py", model)
    close(saved(x, tangents=dots), fwdcompile.transform(model, batched=True)(x, tangents=dots))
    with pytest.raises(TangentError, match="direction 0, 5 each"):
        saved(x, tangents={"x": dots["x"][:4]})


@pytest.mark.parametrize(
    ("dots", "message"),
    [
        ({"x": torch.ones(4, 6)}, r"has shape \[4, 6\], its primal asks for \[4, 4, 6\]"),
        ({"x": torch.ones(0, 4, 6)}, r"the tangent of 'x' is a tensor \[K, ...\], K > 0"),
        ({"x": torch.ones(2, 4, 6, dtype=F64)}, "has dtype torch.float64"),
        ({"x": torch.ones(2, 4, 6), "fc2.bias": torch.ones(3, 3)}, r"its primal asks for \[2, 3\]"),
        ({"fc2.weight": fwdcompile.RankOne(torch.ones(3), torch.ones(8))}, "is a tensor"),
        ({}, "no tangent given"),
    ],
)
def test_wrong_tangents_are_refused(dots: Any, message: str) -> None:
    with pytest.raises(TangentError, match=message):
        fwdcompile.transform(Mlp(), batched=True)(torch.zeros(4, 6), tangents=dots)
