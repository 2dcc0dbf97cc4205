from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import directions
from torch import Tensor, nn
from torch.nn import functional as F

import fwdcompile
from fwdcompile import saved

F64 = torch.float64


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def _programs(fwd: fwdcompile.Forward) -> int:
    return len({id(lowered) for lowered in fwd._cache.values()})


class Mixed(nn.Module):
    """Asks for the batch in every way a model does: views, means, positions, a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x))).reshape(x.shape[0], -1)
        h = self.head(h) * torch.arange(x.shape[0], dtype=x.dtype).unsqueeze(1)
        return torch.cat([h, h.roll(1, 0)]) / x.shape[0] - h.mean(0)


def _reference(model: nn.Module, x: Tensor, dots: dict[str, Tensor], x_dot: Tensor) -> Any:
    names = dict(model.named_parameters())
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    eps = 1e-6

    def at(step: float) -> Tensor:
        moved = {n: p.detach() + step * dots[n] for n, p in names.items()}
        state = {**moved, **{n: b.clone() for n, b in buffers.items()}}
        return torch.func.functional_call(model, state, (x + step * x_dot,))

    return at(0.0), (at(eps) - at(-eps)) / (2 * eps)


def test_one_program_serves_every_batch() -> None:
    model = Mixed().double()
    fwd = fwdcompile.transform(model, dynamic=True)
    dots = directions(dict(model.named_parameters()))
    for batch in (8, 5, 2, 33, 8):
        x, x_dot = _x(batch, 2, 5), _x(batch, 2, 5)
        expected, expected_dot = _reference(model, x, dots, x_dot)
        y, y_dot = fwd(x, tangents={**dots, "x": x_dot})
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y_dot, expected_dot, rtol=1e-6, atol=1e-7)
    assert _programs(fwd) == 1
    assert "x: f64[n, 2, 5]" in fwd.code
    assert "n: int = x.shape[0]" in fwd.code


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x[: x.shape[0] // 2] * x.shape[0]).sum(1),
        lambda x: x.sum(0).expand(x.shape[0] + 1, 3) * x.numel() ** 0.5,
        lambda x: torch.cat([x, x]).reshape(-1, 6).softmax(0),
        lambda x: F.pad(x, (1, 2)).cumsum(0).unfold(1, 3, 1).std(0),
        lambda x: (x @ x.mT).tril().logsumexp(1),
        lambda x: x.var(0) + x.prod(0) + x.amax(0) + x.flatten().sort().values[0],
        lambda x: torch.stack(x.chunk(2)[0].unbind(1)).norm(dim=0),
    ],
)
def test_sizes_reach_the_tangent(function: Callable[[Tensor], Tensor]) -> None:
    fwd = fwdcompile.transform(function, dynamic=True)
    for batch in (6, 10, 4):
        x, x_dot = _x(batch, 3), _x(batch, 3)
        expected = torch.func.jvp(function, (x,), (x_dot,))
        torch.testing.assert_close(fwd(x, tangents={"x": x_dot}), expected)
    assert _programs(fwd) == 1


def test_a_size_that_the_model_decides_by_is_captured_anew() -> None:
    def function(x: Tensor) -> Tensor:
        return x.sin() if x.shape[0] > 4 else x.cos()

    fwd = fwdcompile.transform(function, dynamic=True)
    for batch, programs in ((6, 1), (9, 1), (3, 2), (4, 2), (5, 2), (1, 3)):
        x = _x(batch, 2)
        expected = torch.func.jvp(function, (x,), (x,))
        torch.testing.assert_close(fwd(x, tangents={"x": x}), expected)
        assert _programs(fwd) == programs


def test_inputs_of_one_batch_stay_tied() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    fwd = fwdcompile.transform(function, dynamic=True)
    fwd(_x(4, 3), _x(4, 3), tangents={"x": _x(4, 3)})
    fwd(_x(6, 3), _x(6, 3), tangents={"x": _x(6, 3)})
    assert _programs(fwd) == 1
    y, _ = fwd(_x(6, 3), _x(1, 3), tangents={"x": _x(6, 3)})
    assert _programs(fwd) == 2
    assert y.shape == (6, 3)


def test_other_strides_and_dtypes_are_captured_anew() -> None:
    fwd = fwdcompile.transform(torch.exp, dynamic=True)
    fwd(_x(4, 3), tangents={"arg0": _x(4, 3)})
    fwd(_x(3, 5).mT, tangents={"arg0": _x(5, 3)})
    assert _programs(fwd) == 2
    fwd(_x(5, 3).float(), tangents={"arg0": _x(5, 3).float()})
    assert _programs(fwd) == 3


def test_second_derivatives_and_several_directions() -> None:
    def function(x: Tensor) -> Tensor:
        return (x * x).mean(0).exp() * x.shape[0]

    inner = fwdcompile.transform(function, dynamic=True)
    outer = fwdcompile.transform(inner)
    for batch in (4, 7):
        x, v = _x(batch, 3), _x(batch, 3)
        (_, _), (_, curved) = outer(x, tangents={"x": v})

        def slope(x: Tensor, v: Tensor = v) -> Tensor:
            return torch.func.jvp(function, (x,), (v,))[1]

        torch.testing.assert_close(curved, torch.func.jvp(slope, (x,), (v,))[1])
        _, (first, second) = inner(x, tangents=[{"x": v}, {"x": 2 * v}])
        torch.testing.assert_close(second, 2 * first)
    assert _programs(outer) == 1
    with pytest.raises(ValueError, match="innermost"):
        fwdcompile.transform(fwdcompile.transform(function), dynamic=True)


def test_saved_programs_keep_their_sizes_open(tmp_path: Any) -> None:
    model = Mixed().double().eval()
    fwd = fwdcompile.transform(model, dynamic=True)
    dots = directions(dict(model.named_parameters()))
    fwd(_x(4, 2, 5), tangents=dots)
    fwd.save(tmp_path / "program.py")
    loaded = saved.load(tmp_path / "program.py", model)
    x = _x(9, 2, 5)
    torch.testing.assert_close(loaded(x, tangents=dots), fwd(x, tangents=dots))


def test_a_short_last_batch_takes_the_same_plan() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    fgd = fwdcompile.FGD(model, F.cross_entropy, lr=1e-2, dynamic=True, compile=False)
    for batch in (16, 16, 7):
        fgd.step(torch.randn(batch, 5), torch.randint(0, 3, (batch,)))
    assert len({id(plan) for plan in fgd._plans.values()}) == 1


@pytest.mark.compiled
def test_a_short_last_batch_compiles_nothing() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    twin = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    twin.load_state_dict(model.state_dict())
    fgd = fwdcompile.FGD(model, F.cross_entropy, lr=1e-2, dynamic=True)
    plain = fwdcompile.FGD(twin, F.cross_entropy, lr=1e-2, compile=False)
    batches = [(torch.randn(n, 5), torch.randint(0, 3, (n,))) for n in (16, 16, 7, 3)]
    fgd.step(*batches[0])
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for x, y in batches[1:]:
        fgd.step(x, y)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    for x, y in batches:
        plain.step(x, y)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.compiled
def test_compiled_programs_serve_every_batch_along_inputs() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    fwd = fwdcompile.transform(model, dynamic=True, compile=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for batch in (4, 7, 3):
        x, x_dot = torch.randn(2, batch, 5)
        expected = torch.func.jvp(model, (x,), (x_dot,))
        torch.testing.assert_close(fwd(x, tangents={"input": x_dot}), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_factors_of_a_weight_are_for_every_batch() -> None:
    model = nn.Linear(5, 3)
    fwd = fwdcompile.transform(model, dynamic=True)
    dot = fwdcompile.RankOne(torch.randn(3), torch.randn(5))
    for batch in (4, 7):
        x = torch.randn(batch, 5)
        torch.testing.assert_close(fwd(x, tangents={"weight": dot})[1], x @ dot.dense().T)
    assert _programs(fwd) == 1
