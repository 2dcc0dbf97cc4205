"""The benchmark of Laplacians: its ways compute the same, and what does not is told."""

from __future__ import annotations

from typing import Any

import fields
import laplacian
import pytest
import torch
from fields import OURS, WAYS, Field, Particles, backward_twice, loss, perceptron
from torch import nn

F64 = torch.float64
JET = "jet-for-pytorch, collapsed, compiled"
FORWARD_TWICE = "torch.func, forward twice, eager"


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def checked(way: str, model: nn.Module, inputs: int) -> float:
    """The largest error of the Laplacian; u and its slopes are right."""
    x = torch.randn(5, inputs, dtype=F64)
    u, slopes, laplacians = WAYS[way](model, x)(x)
    expected = backward_twice(model, x)(x)
    torch.testing.assert_close((u, slopes), expected[:2])
    return float((laplacians - expected[2]).detach().abs().max())


@pytest.mark.parametrize("way", WAYS)
def test_ways_agree(way: str) -> None:
    if way == JET:
        pytest.importorskip("jet")
    assert checked(way, perceptron(3, 8).double(), 3) < 1e-12
    if way not in (JET, FORWARD_TWICE):
        assert checked(way, Particles(2, 8).double(), 6) < 1e-12


def test_torch_is_wrong_forward_twice_over_layer_norm() -> None:
    assert checked(FORWARD_TWICE, Particles(2, 8).double(), 6) > 1e-3


@pytest.mark.parametrize("model", [perceptron(3, 8), Particles(2, 8)], ids=["mlp", "particles"])
def test_jax_agrees(model: nn.Module) -> None:
    pytest.importorskip("jax")
    import fields_jax

    inputs = 6 if isinstance(model, Particles) else 3
    x = torch.randn(5, inputs)
    expected = backward_twice(model, x)(x)
    slopes = torch.autograd.grad(loss(WAYS[OURS](model, x)(x)), list(model.parameters()))
    for way in fields_jax.WAYS:
        found = [torch.tensor(part.tolist()) for part in fields_jax.run_of(way, model, x, False)()]
        torch.testing.assert_close(tuple(found), expected, rtol=1e-3, atol=1e-4)
        grads = fields_jax.run_of(way, model, x, True)()
        for (name, _), slope in zip(model.named_parameters(), slopes, strict=True):
            grad = torch.tensor(grads[name].tolist())
            torch.testing.assert_close(grad, slope, rtol=1e-2, atol=1e-2 * float(slope.abs().max()))


def test_autograd_twice_trains_wrongly_over_layer_norm() -> None:
    model, x = Particles(2, 8), torch.randn(5, 6)
    for way, right in ((OURS, True), ("autograd twice, eager", False)):
        grads = torch.autograd.grad(loss(WAYS[way](model, x)(x)), list(model.parameters()))
        assert (laplacian._slope_error(grads, model, x) < 1e-3) == right


def test_times_ratios_and_refusals_become_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def crooked(model: nn.Module, x: Any) -> Any:
        right = backward_twice(model, x)
        return lambda x: (*right(x)[:2], 2 * right(x)[2])

    monkeypatch.setitem(fields.FIELDS, "small", Field(lambda: perceptron(2, 4), 2, 3))
    monkeypatch.setitem(WAYS, FORWARD_TWICE, crooked)
    ways = [OURS, "autograd twice, eager", FORWARD_TWICE]
    tasks = {task: laplacian.measure("small", task, 2, ways) for task in laplacian.TASKS}
    for cells in tasks.values():
        assert cells[OURS]["ratio"] == 1
        assert cells["autograd twice, eager"]["ms"] > 0
        assert "wrong by" in cells[FORWARD_TWICE]["refused"]
    entry = laplacian.header("small", 3, "float32", "cpu") | {"pairs": 2} | tasks
    page = laplacian.page({"works": {"small": entry}})
    assert f"| {FORWARD_TWICE} | - |" in page and "small, torch.func, forward twice" in page
    assert f"| {OURS} | {tasks['trained'][OURS]['ms']:.2f} (1.00) |" in page
