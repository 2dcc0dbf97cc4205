"""Generated programs under review: `make golden` writes them anew, git shows what changed."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Decoder, Flow, Gated, Mlp, Tied
from oracle import REVIEWED
from torch import nn

import fwdcompile
from fwdcompile.activity import ActivityForward
from fwdcompile.forward import Forward
from fwdcompile.models import cnn, logistic_regression, mlp
from fwdcompile.objective import Objective

GOLDEN = Path(__file__).parent / "golden"
F = torch.nn.functional
TOKENS = torch.zeros(2, 6, dtype=torch.int64)
IMAGES, LABELS = torch.zeros(64, 1, 8, 8), torch.zeros(64, dtype=torch.int64)


def tanh_layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ w)


PROGRAMS: dict[str, Any] = {
    "tanh": (
        lambda y, x, w: torch.tanh(x @ w),
        (None, torch.zeros(4, 3), torch.zeros(3, 2)),
        ["x", "w"],
    ),
    "mlp_input": (Mlp(), (torch.zeros(4, 6),), ["x"]),
    "paper_mlp": (Objective(mlp((1, 8, 8), 10), F.cross_entropy), (IMAGES, LABELS), "parameters"),
    "paper_mlp_rank_one": (
        Objective(mlp((1, 8, 8), 10), F.cross_entropy),
        (IMAGES, LABELS),
        "parameters",
        {"rank_one": True},
    ),
    "paper_mlp_activations": (
        ActivityForward(
            Objective(mlp((1, 8, 8), 10), functools.partial(F.cross_entropy, reduction="none"))
        ),
        (IMAGES, LABELS),
        "parameters",
    ),
    "paper_cnn": (Objective(cnn((1, 8, 8), 10), F.cross_entropy), (IMAGES, LABELS), "parameters"),
    "paper_logistic_regression": (
        Objective(logistic_regression((1, 8, 8), 10), F.cross_entropy),
        (IMAGES, LABELS),
        "parameters",
    ),
    "decoder": (Decoder(), (TOKENS, TOKENS), "parameters"),
    "tied_batch_norm": (Tied(), (torch.zeros(4, dtype=torch.int64),), "parameters"),
    "flow": (Flow(), (torch.zeros(2, 3, 2), torch.zeros(2, 1)), "inputs"),
    "dropout": (nn.Sequential(nn.Linear(3, 3), nn.Dropout()), (torch.zeros(2, 3),), "parameters"),
    "cond": (Gated(), (torch.zeros(2, 3),), "parameters"),
    "laplacian": (fwdcompile.laplacian(Mlp()), (torch.zeros(4, 6),), ["x", "x"]),
    "laplacian_batched": (
        fwdcompile.laplacian(Flow(), batched=True),
        (torch.zeros(2, 3, 2), torch.zeros(2, 1)),
        ["x"],
        {"directions": 6},
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_is_the_reviewed_one(name: str, request: pytest.FixtureRequest) -> None:
    model, inputs, tangents, *options = PROGRAMS[name]
    fwd = model if isinstance(model, Forward) else fwdcompile.transform(model)
    fwd.lower(*inputs, tangents=tangents, **dict(*options))
    text = re.sub(r"with torch [\d.]+", "with torch", fwd.code)
    path = GOLDEN / f"{name}.py"
    if request.config.getoption("--regenerate-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    if not REVIEWED:
        pytest.skip("programs were reviewed as torch 2.13 captures them")
    assert text == path.read_text(), f"{path.name} differs; if that is meant, run `make golden`"
