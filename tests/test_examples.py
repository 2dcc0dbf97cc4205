"""The examples, at a small size: what they print is true."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import inspect_code
import jacobian
import pinn


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
