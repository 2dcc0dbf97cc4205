from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import test_subgraph
import torch
from nets import Gated
from torch import Tensor
from torch._higher_order_ops import map as mapped
from torch._higher_order_ops import scan, while_loop

import fwdcompile
from fwdcompile import control

F = torch.nn.functional


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_plain_statements_compute_what_the_ops_compute() -> None:
    x, w = torch.randn(4, 3), torch.randn(3)

    def step(h: Tensor, x: Tensor, *w: Tensor) -> Any:
        return torch.tanh(h * w[0] + x) if w else torch.tanh(h + x), x * h

    expected = scan(lambda h, x: step(h, x), torch.ones(3), x)
    actual = control._scan(step, [torch.ones(3)], [x], [])
    torch.testing.assert_close(actual, expected)

    def below(i: Tensor, h: Tensor, *w: Tensor) -> Tensor:
        return i < 3

    def body(i: Tensor, h: Tensor, *w: Tensor) -> Any:
        return i + 1, h.sin()

    start = torch.tensor(0), x
    looped = control._while_loop(lambda *args: (below(*args),), body, [*start], [w])
    torch.testing.assert_close(looped, while_loop(below, body, start))
    rows = control._map(lambda x, w: (x * w, x.sum()), [x], [w])
    torch.testing.assert_close(rows, mapped(lambda x: (x * w, x.sum()), x))


@pytest.mark.compiled
@pytest.mark.parametrize("rank_one", [False, True])
def test_a_compiled_step_is_the_eager_one(rank_one: bool) -> None:
    def stepped(compile: bool) -> list[float]:
        torch.manual_seed(0)
        model, x = Gated(), torch.rand(8, 3)
        directions = fwdcompile.Normal(rank_one=rank_one)
        fgd = fwdcompile.FGD(model, F.mse_loss, lr=1e-2, directions=directions, compile=compile)
        return [float(fgd.step(sign * x, torch.zeros(8, 3))) for sign in (1, -1, 1)]

    assert stepped(True) == pytest.approx(stepped(False))


@pytest.mark.compiled
@pytest.mark.parametrize(
    "name", [pytest.param("one", marks=pytest.mark.slow), "nested", "rnn", "newton"]
)
def test_programs_compile_as_one_graph(name: str) -> None:
    model, plain = getattr(test_subgraph, name), getattr(test_subgraph, f"{name}_plain")
    x = torch.rand(4, 2, 3) if name == "rnn" else torch.rand(3, 3) + 1
    w = torch.rand(3, 3) + 1
    test_subgraph.agrees(model, plain, "xw", compile=True, x=x, w=w)


def test_a_saved_program_runs_with_its_branches(tmp_path: Path) -> None:
    x, dots = torch.rand(2, 3), {"x": torch.randn(2, 3), "w": torch.randn(3, 3)}
    fwd = fwdcompile.transform(test_subgraph.nested)
    fwd.lower(x, torch.rand(3, 3), tangents=["x", "w"])
    fwd.save(tmp_path / "nested.py")
    loaded = fwdcompile.load(tmp_path / "nested.py")
    for sign in (1, -1):
        args = sign * x, torch.rand(3, 3)
        torch.testing.assert_close(loaded(*args, tangents=dots), fwd(*args, tangents=dots))


def test_functions_of_a_program_have_names_of_their_own() -> None:
    def model(cond_if_true: Tensor) -> Tensor:
        x = cond_if_true
        x = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))
        return torch.cond(x.sum() > 0, lambda x: x.exp(), lambda x: x.tanh(), (x,))

    x = torch.rand(3)
    fwd = fwdcompile.transform(model)
    y, _ = fwd(x, tangents={"cond_if_true": torch.ones(3)})
    torch.testing.assert_close(y, x.sin().exp())
    names = re.findall(r"^def (\w+)", fwd.code, re.MULTILINE)
    assert len(set(names)) == len(names) == 6
    assert "cond_if_true" not in names
    assert max(map(len, fwd.code.split('"""', 2)[2].splitlines())) <= 100


def test_eager_calls_do_not_trace() -> None:
    fwd = fwdcompile.transform(test_subgraph.both)
    x, w = torch.rand(2, 3), torch.rand(3, 3)
    fwd(x, w, tangents={"x": x})
    torch._dynamo.utils.counters.clear()
    fwd(-x, w, tangents={"x": x})
    assert not torch._dynamo.utils.counters["frames"]


def test_a_scan_is_captured_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.ones(3)

    def function(x: Tensor) -> Tensor:
        return scan(lambda c, _: (0.9 * c + x, c.clone()), x.clone(), torch.zeros(5))[0]

    with caplog.at_level("ERROR"):
        fwdcompile.jvp(function, (x,), (x,))
    assert not caplog.records
