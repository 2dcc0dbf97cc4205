"""The examples, at a small size: what they print is true."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import curvature
import inspect_code
import jacobian
import pinn
import vibrations
from torch import nn
from torch.func import functional_call, hessian
from torch.nn.functional import cross_entropy


def test_every_arm_reaches_its_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert jacobian.main(arms=20, joints=5, steps=40) < 1e-6
    said = capsys.readouterr().out
    assert float(said.split("torch.func.jacfwd: ")[1].split()[0]) < 1e-12


def test_the_edit_lets_the_tangent_through(tmp_path: Path) -> None:
    generated, edited = inspect_code.main(str(tmp_path / "quantised.py"))
    assert not generated.any()
    torch.manual_seed(0)
    model, x = inspect_code.Quantised(), torch.randn(5, 3)
    w_dot = torch.randn_like(model.fc1.weight)
    h = torch.tanh(model.fc1(x))
    expected = ((x @ w_dot.T) * (1 - h * h)) @ model.fc2.weight.T
    torch.testing.assert_close(edited, expected.detach())


def test_the_heat_equation_is_solved(tmp_path: Path) -> None:
    path = tmp_path / "heat.png"
    assert pinn.main(str(path), steps=300) < 0.05
    assert path.stat().st_size > 10_000


def test_eigenvalues_are_those_of_the_hessian(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(9, 3).double(), torch.arange(9) % 2
    found = curvature.Curvature(model, cross_entropy, compile=False)
    flat = torch.cat([p.flatten() for p in found.parameters.values()])
    sizes = [p.numel() for p in found.parameters.values()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pairs = zip(found.parameters.items(), flat.split(sizes), strict=True)
        parameters = {name: part.view_as(p) for (name, p), part in pairs}
        return cross_entropy(functional_call(model, parameters, (x,)), y)

    whole, v = hessian(loss)(flat), torch.randn(found.size).double()
    gradient, product = found.product(v, x, y)
    torch.testing.assert_close(product, whole @ v)
    torch.testing.assert_close(gradient, torch.func.grad(loss)(flat))
    expected = torch.linalg.eigvalsh(whole).flip(0)[:3]
    torch.testing.assert_close(torch.tensor(found.eigenvalues(3, x, y)), expected.float(),
                               rtol=1e-3, atol=1e-4)  # fmt: skip
    assert 0 < min(curvature.main(steps=2, every=1, compile=False)) < 2
    assert "2 / lr 4" in capsys.readouterr().out


def test_a_triangle_swings_as_it_is_known_to(capsys: pytest.CaptureFixture[str]) -> None:
    found = vibrations.main(mass=1.0)
    expected = torch.tensor([0, 0, 0, 0, 0, 0, 1.5, 1.5, 3.0], dtype=torch.float64).mul(4.5).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-6)
    assert "transformed by a functorch transform" in capsys.readouterr().out
