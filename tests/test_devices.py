"""Steps on another device than the CPU: all that they make is there, too.

Torch's device "meta" has shapes and no memory, and refuses to mix with others as a GPU does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Decoder, Lstm, Mlp, Tied
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

from fwdcompile import FGD, ForwardGradient, Normal, Rademacher, Sphere
from fwdcompile.data import import_torchvision
from fwdcompile.models import MODELS

LABELS = torch.zeros(2, dtype=torch.int64)
TOKENS = torch.zeros(2, 6, dtype=torch.int64)
MODELS_WITH_INPUTS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], Any]] = {
    "mlp": (Mlp, (torch.zeros(2, 6), LABELS), cross_entropy),
    "cnn": (
        lambda: MODELS["cnn"]((1, 28, 28), 10),
        (torch.zeros(2, 1, 28, 28), LABELS),
        cross_entropy,
    ),
    "tied": (Tied, (LABELS, LABELS), cross_entropy),
    "decoder": (Decoder, (TOKENS, TOKENS), None),
    "lstm": (lambda: nn.Sequential(Lstm()), (torch.zeros(2, 3, 3), torch.zeros(4)), nn.MSELoss()),
    "resnet18": (
        lambda: import_torchvision().models.resnet18(num_classes=10),
        (torch.zeros(2, 3, 32, 32), LABELS),
        cross_entropy,
    ),
}
STEPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "normal": (FGD, {"directions": Normal()}),
    "rank-one": (FGD, {"directions": Rademacher(rank_one=True), "samples": 2}),
    "regenerated": (FGD, {"store_directions": False}),
    "orthogonal": (FGD, {"directions": Sphere(orthogonal=True), "samples": 2}),
    "gradient": (ForwardGradient, {}),
    "activations": (ForwardGradient, {"perturb": "activations", "samples": 2}),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("model", MODELS_WITH_INPUTS)
def test_a_step_stays_on_its_device(model: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # whether all is finite is asked of a number, which "meta" does not have
    monkeypatch.setattr(Tensor, "__bool__", lambda x: True)
    build, inputs, loss_fn = MODELS_WITH_INPUTS[model]
    made, settings = STEPS[step]
    net = build().to("meta")
    if made is FGD:
        settings = settings | {"lr": 0.1}
    trainer = made(net, loss_fn, compile=False, **settings)
    run = trainer.step if made is FGD else trainer
    loss = run(*(x.to("meta") for x in inputs))
    assert loss.is_meta and loss.ndim == 0
    assert made is FGD or all(p.grad.is_meta for p in net.parameters())
    (plan,) = trainer._plans.values()
    values = pytree.tree_leaves([n.meta.get("val") for n in plan.lowered.program.graph.nodes])
    assert {x.device.type for x in values if isinstance(x, Tensor)} == {"meta"}
