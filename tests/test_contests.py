"""The benchmark of Jacobians, and how ways are compared: they agree, and all are told."""

from __future__ import annotations

from typing import Any

import contest
import jacobians
import jvps
import pytest
import torch
from forces import Forces
from jacobians import CASES, JAX, OURS, WAYS
from results import table
from torch import nn
from works import WIDTH, Attention

import fwdcompile


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


SMALL: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "perceptron": (nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 4)), (1, 3)),
    "convolutions": (nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.GELU()), (1, 1, 3, 4)),
    "transformer": (
        nn.Sequential(nn.Linear(2, WIDTH), Attention(causal=False), nn.Linear(WIDTH, 3)),
        (1, 2, 2),
    ),
    "forces": (Forces(4), (3, 3)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's, over attention
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SMALL)
def test_ways_agree(name: str, way: str) -> None:
    model, shape = SMALL[name]
    x = torch.randn(shape)
    if name == "transformer" and "torch.func.jacfwd" in way:
        with pytest.raises(NotImplementedError, match="forward AD with _scaled_dot_product"):
            jacobians.start(way, model.requires_grad_(False), x)
        return
    if name == "forces" and "torch.func.jacfwd" in way:
        with pytest.raises(RuntimeError, match="inside of a function being transformed"):
            jacobians.start(way, model.requires_grad_(False), x)
        return
    run, _ = jacobians.start(way, model.requires_grad_(False), x)
    assert run().shape[-len(shape) :] == shape


@pytest.mark.parametrize("name", SMALL)
def test_jax_agrees(name: str) -> None:
    pytest.importorskip("jax")
    model, shape = SMALL[name]
    x = torch.randn(shape)
    run, _ = jacobians.start(JAX, model, x)
    found = torch.tensor(run().tolist())
    if name == "convolutions":  # JAX has channels last
        found = found.permute(0, 3, 1, 2, 4, 7, 5, 6)
    torch.testing.assert_close(found, WAYS[OURS](model)(x).detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", jvps.WAYS)
@pytest.mark.parametrize("name", [name for name in SMALL if name != "forces"])
def test_ways_to_a_jvp_agree(name: str, way: str) -> None:
    model, shape = SMALL[name]
    x, v = torch.randn(2, *shape)
    model.requires_grad_(False)
    if name == "transformer" and way.startswith("torch."):
        with pytest.raises(NotImplementedError, match="forward AD with _scaled_dot_product"):
            jvps.start(way, model, x, v)
        return
    run, _ = jvps.start(way, model, x, v)
    y, _ = run()
    torch.testing.assert_close(y, model(x))


def test_the_jvp_of_jax_agrees() -> None:
    pytest.importorskip("jax")
    model, shape = SMALL["perceptron"]
    x, v = torch.randn(2, *shape)
    run, _ = jvps.start(jvps.JAX, model, x, v)
    found = tuple(torch.tensor(each.tolist()) for each in run())
    expected = fwdcompile.jvp(model, (x,), (v,))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_wrong_jvp_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(jvps.WAYS, "wrong", lambda m: lambda x, v: (m(x), m(v)))
    model, shape = SMALL["perceptron"]
    with pytest.raises(ArithmeticError, match="the tangent is wrong by"):
        jvps.start("wrong", model.requires_grad_(False), *torch.randn(2, *shape))


def test_a_wrong_jacobian_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WAYS, "wrong", lambda f: lambda x: 1.1 * torch.func.jacfwd(f)(x))
    model, shape = SMALL["perceptron"]
    with pytest.raises(ArithmeticError, match="wrong by 1"):
        jacobians.start("wrong", model.requires_grad_(False), torch.randn(shape))


def test_every_way_is_told() -> None:
    def fails() -> Any:
        raise RuntimeError("no such op\nmore")

    def runs() -> Any:
        return lambda: None, 0.5

    cells = contest.contest({"ours": runs, "peer": fails, "other": runs}, "ours", ("other",), 2)
    assert cells["peer"] == {"refused": "RuntimeError: no such op"}
    assert cells["ours"]["ratio"] == 1 and cells["other"]["first, seconds"] == 0.5
    text = table("time", {"work": cells}, contest.seconds, ["ours", "peer", "absent"], "-")
    assert text.splitlines()[2:] == ["| ours | 0.5 |", "| peer | - |"]


def test_cases_are_as_large_as_their_names_say() -> None:
    for name, case in CASES.items():
        inputs, outputs = name.split(", ", 1)[1].split(" to ")
        x = torch.zeros(case.shape)
        assert x.numel() == int(inputs)
        assert case.make()(x).numel() == int(outputs.replace(",", ""))
