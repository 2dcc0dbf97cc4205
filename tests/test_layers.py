"""Every layer of torch.nn, in training mode: the generated program against reverse mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import Case, compare
from torch import Tensor, nn
from torch.nn.modules import (
    activation,
    batchnorm,
    conv,
    distance,
    dropout,
    fold,
    instancenorm,
    linear,
    loss,
    normalization,
    padding,
    pixelshuffle,
    pooling,
    rnn,
    sparse,
    transformer,
    upsampling,
)
from torch.utils import _pytree as pytree

FAMILIES = (
    activation, batchnorm, conv, distance, dropout, fold, instancenorm, linear, loss, normalization,
    padding, pixelshuffle, pooling, rnn, sparse, transformer, upsampling,
)  # fmt: skip
# Bases of others, a deprecated name, a torch.autograd.Function, and one that needs a process group.
LEFT_OUT = {"RNNBase", "RNNCellBase", "NLLLoss2d", "CrossMapLRN2d", "SyncBatchNorm"}

X, Y = torch.rand(4, 6) + 0.1, torch.rand(4, 6) + 0.1
SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0])
CLASSES = torch.tensor([0, 2, 5, 1])
INDICES = torch.tensor([[0, 2], [1, 1]])
SEQUENCE = torch.randn(5, 2, 4)
LENGTHS = torch.tensor([6, 6])
IMAGES = {1: torch.randn(2, 4, 8), 2: torch.randn(2, 4, 6, 6), 3: torch.randn(2, 4, 4, 4, 4)}

# What a layer is made with and called with, where that is not the rule of its family.
SPECIAL: dict[str, tuple[Any, ...]] = {
    "Threshold": ((0.5, 0.1), X),
    "GLU": ((), X),
    "Softmax": ((1,), X),
    "LogSoftmax": ((1,), X),
    "Softmin": ((1,), X),
    "Softmax2d": ((), IMAGES[2]),
    "MultiheadAttention": ((4, 2), SEQUENCE, SEQUENCE, SEQUENCE),
    "Bilinear": ((6, 6, 3), X, Y),
    "Linear": ((6, 3), X),
    "Identity": ((), X),
    "Embedding": ((5, 3), INDICES),
    "EmbeddingBag": ((5, 3), INDICES),
    "Fold": (((4, 5), (2, 2)), torch.randn(2, 12, 12)),
    "Unfold": (((2, 2),), IMAGES[2]),
    "PixelShuffle": ((2,), IMAGES[2]),
    "PixelUnshuffle": ((2,), IMAGES[2]),
    "LayerNorm": ((6,), X),
    "RMSNorm": ((6,), X),
    "GroupNorm": ((2, 4), IMAGES[2]),
    "LocalResponseNorm": ((2,), IMAGES[2]),
    "PairwiseDistance": ((), X, Y),
    "CosineSimilarity": ((), X, Y),
    "CosineEmbeddingLoss": ((), X, Y, SIGNS),
    "MarginRankingLoss": ((), X[:, 0], Y[:, 0], SIGNS),
    "TripletMarginLoss": ((), X, Y, X * Y),
    "TripletMarginWithDistanceLoss": ((), X, Y, X * Y),
    "GaussianNLLLoss": ((), X, Y, X * Y),
    "HingeEmbeddingLoss": ((), X, X.round() * 2 - 1),
    "SoftMarginLoss": ((), X, (X.round() * 2 - 1).long()),
    "LinearCrossEntropyLoss": ((6, 6), X, CLASSES),
    "NLLLoss": ((), X, CLASSES),
    "CrossEntropyLoss": ((), X, CLASSES),
    "MultiMarginLoss": ((), X, CLASSES),
    "MultiLabelMarginLoss": ((), X, torch.tensor([[1, 3, -1, 0, 0, 0]] * 4)),
    "MultiLabelSoftMarginLoss": ((), X, X.round()),
    "BCELoss": ((), X / 2, X.round()),
    "BCEWithLogitsLoss": ((), X, X.round()),
    "CTCLoss": ((), torch.randn(6, 2, 5).log_softmax(-1), INDICES + 1, LENGTHS, LENGTHS // 3),
    "AdaptiveLogSoftmaxWithLoss": ((6, 8, [3, 5]), X, CLASSES),
    "Transformer": ((4, 2, 1, 1, 8), SEQUENCE, SEQUENCE),
    "TransformerEncoder": ((nn.TransformerEncoderLayer(4, 2, 8), 2), SEQUENCE),
    "TransformerDecoder": ((nn.TransformerDecoderLayer(4, 2, 8), 2), SEQUENCE, SEQUENCE),
    "TransformerEncoderLayer": ((4, 2, 8), SEQUENCE),
    "TransformerDecoderLayer": ((4, 2, 8), SEQUENCE, SEQUENCE),
    "RNN": ((4, 3, 2, "tanh", True, False, 0.0, True), SEQUENCE),
    "LSTM": ((4, 3, 2, True, False, 0.0, True), SEQUENCE),
    "GRU": ((4, 3, 2, True, False, 0.0, True), SEQUENCE),
    "RNNCell": ((4, 3), SEQUENCE[0]),
    "LSTMCell": ((4, 3), SEQUENCE[0]),
    "GRUCell": ((4, 3), SEQUENCE[0]),
    "Upsample": ((None, 2, "bilinear"), IMAGES[2]),
    "UpsamplingNearest2d": ((None, 2), IMAGES[2]),
    "UpsamplingBilinear2d": ((None, 2), IMAGES[2]),
    "FractionalMaxPool2d": ((2, 3), IMAGES[2]),
    "FractionalMaxPool3d": ((2, 2), IMAGES[3]),
    "LPPool1d": ((2, 2), IMAGES[1].abs()),
    "LPPool2d": ((2, 2), IMAGES[2].abs()),
    "LPPool3d": ((2, 2), IMAGES[3].abs()),
}


def layers() -> Iterator[type[nn.Module]]:
    """All public layers of the families, but lazy ones: these become others when first called."""
    for family in FAMILIES:
        for name in family.__all__:
            layer = getattr(family, name)
            if not name.startswith(("Lazy", "_")) and name not in LEFT_OUT:
                yield layer


def made(layer: type[nn.Module]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A layer and its inputs."""
    name, family = layer.__name__, layer.__module__.rsplit(".", 1)[-1]
    if name in SPECIAL:
        settings, *inputs = SPECIAL[name]
        return layer(*settings), tuple(inputs)
    size = next((int(d) for d in "123" if f"{d}d" in name), 2)
    images = IMAGES[size]
    if family == "conv":
        return layer(4, 4, 2), (images,)
    if family in ("batchnorm", "instancenorm"):
        return layer(4, affine=True), (images,)
    if family == "padding":
        return layer(1, 0.5) if name.startswith("Constant") else layer(1), (images,)
    if family == "pooling":
        return layer(2), unpooled(size) if "Unpool" in name else (images,)
    if family == "dropout":
        return layer(0.5), (images if "d" in name[-1] else X,)
    return layer(), (X, Y) if family == "loss" else (X,)


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def unpooled(size: int) -> tuple[Tensor, Tensor]:
    """What max pooling gives, with the indices."""
    pool = getattr(nn, f"MaxPool{size}d")(2, return_indices=True)
    found: tuple[Tensor, Tensor] = pool(IMAGES[size])
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layer", list(layers()), ids=lambda layer: layer.__name__)
def test_layer(layer: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module, inputs = made(layer)
    case = Case.of(module.double(), pytree.tree_map_only(Tensor, _wide, inputs))
    # torch's backward of CTCLoss is right behind log_softmax alone
    oracle = "difference" if layer is nn.CTCLoss else "reverse"
    compared = compare(case, (oracle,))
    assert compared.is_right(torch.float64), compared
