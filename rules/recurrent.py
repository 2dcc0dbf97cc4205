"""Recurrent layers: torch's own lowering with the dropout between layers that it loses.

`torch._decomp` takes RNN, GRU and LSTM apart, but compares a layer's number the wrong way round
(torch 2.13), so that no exported program of several layers has any dropout. Here each layer is
taken apart alone and dropout stands between them, as in the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload

from ..rule import lowerings

aten = torch.ops.aten


def _by_layer(op: OpOverload) -> Any:
    """The lowering of one kind of layer: `hx` is a tensor, or two for LSTM."""
    lower = decomposition_table[op]

    def lowered(
        input: Tensor, hx: Any, params: list[Tensor], has_biases: bool, num_layers: int,
        dropout: float, train: bool, bidirectional: bool, batch_first: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        x = input.transpose(0, 1) if batch_first else input
        size, count = 1 + bidirectional, len(params) // num_layers
        finals = []
        for i in range(num_layers):
            if i and train and dropout:
                x = torch.dropout(x, dropout, True)
            rows = slice(i * size, (i + 1) * size)
            hidden = hx[rows] if isinstance(hx, Tensor) else [h[rows] for h in hx]
            weights = params[i * count : (i + 1) * count]
            x, *final = lower(x, hidden, weights, has_biases, 1, 0.0, train, bidirectional, False)
            # torch 2.11 leaves an axis of one before the batch in the states of an LSTM
            finals.append([state.flatten(0, -3) for state in final])
        out = x.transpose(0, 1) if batch_first else x
        return out, *(torch.cat(parts) for parts in zip(*finals, strict=True))

    return lowered


for _op in (
    aten.rnn_tanh.input,
    aten.rnn_relu.input,
    aten.gru.input,
    aten.lstm.input,
):
    lowerings[_op] = _by_layer(_op)
