"""Fine-tuning by forward gradients, at a small size: it learns, and frozen weights stay."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import finetune


def test_adapters_learn_by_forward_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    before, forward, backward = finetune.main(width=16, pretrain=300, steps=300, samples=6)
    assert before < 0.6
    assert forward > before + 0.15
    assert backward > forward - 0.05
    count = 2 * (16 + 48) + 2 * (16 + 16) + 2 * (16 + 32) + 2 * (32 + 16) + 17 * 10
    assert f"adapters train: {count}\n" in capsys.readouterr().out


def test_adapters_start_at_the_model_and_freeze_it() -> None:
    model = finetune.Reader(width=8, depth=2)
    twin = finetune.adapted(model)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(twin(images), model(images))
    assert all(p.requires_grad for p in model.parameters())
    learning = {name for name, p in twin.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1] for name in learning} == {"down", "up", "weight", "bias"}
    assert not any("base" in name or "norm" in name for name in learning)
