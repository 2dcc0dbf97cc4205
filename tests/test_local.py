"""Local losses: each block learns from its own head's loss alone, backwards and forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fwdcompile
from fwdcompile.config import Config
from fwdcompile.data import Dataset
from fwdcompile.local import Local
from fwdcompile.methods import losses, total_loss
from fwdcompile.models import local_mlp
from fwdcompile.runner import Runner

SHAPE = (1, 2, 2)


def problem(depth: int = 3, width: int = 4) -> tuple[Local, Tensor, Tensor]:
    torch.manual_seed(0)
    model = local_mlp(SHAPE, 2, depth, width).double()
    return model, torch.randn(6, *SHAPE).double(), torch.arange(6) % 2


def parts(model: Local) -> list[list[Tensor]]:
    """The parameters of each block and its head."""
    pairs = zip(model.blocks, model.heads, strict=True)
    return [[*block.parameters(), *head.parameters()] for block, head in pairs]


def test_backwards_a_block_learns_from_its_own_loss_alone() -> None:
    model, x, y = problem()
    for i, loss in enumerate(losses(model(x), y)):
        for j, part in enumerate(parts(model)):
            found = torch.autograd.grad(loss, part, retain_graph=True, allow_unused=True)
            assert all((gradient is not None) == (i == j) for gradient in found)


@pytest.mark.parametrize("perturb", ["activations", "weights"])
def test_forward_other_losses_change_nothing(perturb: Any) -> None:
    model, x, y = problem()
    found = []
    for factors in ((1.0, 1.0, 1.0), (7.0, 1.0, 0.0)):

        def weighted(outs: list[Tensor], target: Tensor, factors: Any = factors) -> list[Tensor]:
            return [f * loss for f, loss in zip(factors, losses(outs, target), strict=True)]

        model.zero_grad()
        fwdcompile.ForwardGradient(model, weighted, perturb=perturb, compile=False)(x, y)
        found.append([[p.grad for p in part] for part in parts(model)])
    for factor, (one, other) in zip((7, 1, 0), zip(*found, strict=True), strict=True):
        assert any(gradient.any() for gradient in one)
        torch.testing.assert_close([factor * gradient for gradient in one], other)


def test_forward_gradients_come_near_those_of_local_losses() -> None:
    model, x, y = problem(depth=2, width=3)
    grad = fwdcompile.ForwardGradient(
        model,
        lambda outs, target: losses(outs, target, "none"),
        directions=fwdcompile.Rademacher(),
        perturb="activations",
        samples=16,
        compile=False,
    )
    for _ in range(80):
        loss = grad(x, y)
    mine = [torch.cat([p.grad.flatten() / 80 for p in part]) for part in parts(model)]
    model.zero_grad()
    expected = total_loss(model(x), y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for found, part in zip(mine, parts(model), strict=True):
        true = torch.cat([p.grad.flatten() for p in part])
        assert (found - true).norm() < 0.15 * true.norm()


def test_evaluation_is_the_last_head_with_no_gradient_stopped() -> None:
    model, x, y = problem()
    whole = model.end_to_end()
    outs = model(x)
    assert len(outs) == 3
    out = model.eval()(x)
    torch.testing.assert_close(out, outs[-1])
    torch.testing.assert_close(out, whole(x))
    first = model.blocks[0][1].weight  # type: ignore[index]
    (mine,) = torch.autograd.grad(F.cross_entropy(out, y), [first])
    (true,) = torch.autograd.grad(F.cross_entropy(whole(x), y), [first])
    assert mine.any()
    torch.testing.assert_close(mine, true)
    assert {id(p) for p in whole.parameters()} < {id(p) for p in model.parameters()}


def test_blocks_are_any_modules() -> None:
    torch.manual_seed(0)

    def head(channels: int) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2))

    convolutions = [nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)]
    model = Local([nn.Sequential(c, nn.ReLU()) for c in convolutions], [head(3), head(4)])
    x, y = torch.randn(4, 1, 5, 5), torch.tensor([0, 1, 1, 0])
    fwdcompile.ForwardGradient(model, losses, perturb="activations", compile=False)(x, y)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_blocks_without_heads_and_no_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="2 blocks and 1 heads"):
        Local([nn.Identity(), nn.Identity()], [nn.Identity()])
    with pytest.raises(ValueError, match="0 blocks"):
        Local([], [])
    for depth, width in ((0, 4), (2, 0)):
        with pytest.raises(ValueError, match="depth and width must be at least 1"):
            local_mlp(SHAPE, 2, depth, width)


def test_every_method_of_the_runner_trains_with_local_losses() -> None:
    labels = torch.arange(60) % 2
    images = torch.randn(60, *SHAPE) + 3 * labels.view(60, 1, 1, 1)
    data = Dataset((images[:40], labels[:40]), (images[40:], labels[40:]))
    methods = ("fgd:perturb=activations", "fgd", "backprop", "torch-jvp")
    config = Config(methods, iterations=60, batch=20, lr=0.05, every=30, compile=False)
    report = Runner(lambda: local_mlp(SHAPE, 2, 2, 8), data, config).run()
    starts = {trace.validation_loss[0] for trace in report.traces}
    assert len(starts) == 1
    for trace in report.traces:
        # two losses are trained on, one is looked at
        assert trace.train_loss[1] > 1.2 * trace.validation_loss[1]
        assert trace.validation_loss[-1] < 0.8 * trace.validation_loss[0], trace.method
