"""Lowerings of rules/recurrent.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Case, compare
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fwdcompile

LAYERS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 2, "dropout": 0.3}),
    (nn.LSTM, {"num_layers": 3, "dropout": 0.3, "batch_first": True, "bias": False}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True, "dropout": 0.3}),
    (nn.RNN, {"num_layers": 2, "bidirectional": True, "nonlinearity": "relu", "dropout": 0.5}),
    (nn.RNN, {"batch_first": True}),
]


@pytest.mark.parametrize(("kind", "settings"), LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_layers(kind: type[nn.Module], settings: dict[str, Any], training: bool) -> None:
    layer = kind(5, 6, **settings).double().train(training)
    found = compare(Case.of(layer, (torch.randn(4, 3, 5, dtype=torch.float64),)))
    assert found.is_right(torch.float64), found


def test_a_given_state_moves() -> None:
    layer = nn.LSTM(5, 6, num_layers=2).double()
    x, h = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(2, 2, 3, 6, dtype=torch.float64)
    found = compare(Case.of(layer, (x, (h[0], h[1]))), ("jvp",))
    assert found.is_right(torch.float64), found


def test_dropout_between_layers_is_not_lost() -> None:
    layer, x = nn.GRU(5, 6, num_layers=2, dropout=0.5), torch.randn(4, 3, 5)
    fwd = fwdcompile.transform(layer)
    (first, _), (second, _) = (fwd(x, tangents={"input": x})[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_packed_sequences_are_refused(kind: type[nn.Module]) -> None:
    layer, x = kind(3, 4), torch.randn(5, 2, 3)

    def model(x: Tensor) -> Tensor:
        return layer(pack_padded_sequence(x, torch.tensor([5, 3])))[0].data

    with pytest.raises(fwdcompile.FwdcompileError, match="test_recurrent.py"):
        fwdcompile.jvp(model, (x,), (x,))
