"""What the benchmarks train: a model and a batch for each name, under cross entropy always."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fwdcompile.data import import_torchvision
from fwdcompile.models import MODELS, deep_mlp

PAPER = ("logistic-regression", "mlp", "cnn")
DEPTHS = (1, 3, 10, 30, 100)
CLASSES = 10
WIDTH, HEADS = 768, 12
VOCABULARY = 1000


@dataclass(frozen=True)
class Problem:
    """A model with its batch, on one device and in one dtype, and torch.compile's mode."""

    model: nn.Module
    x: Tensor
    y: Tensor
    stages: tuple[str, ...]
    mode: str = "default"


@dataclass(frozen=True)
class Work:
    """How to make a problem.

    Attributes:
        build: makes the model, which returns logits [n, classes].
        make_batch: from the batch size to the model's input and the n classes.
        batch: the size by default.
        inner: steps a turn, where one is too short for the clock.
        stages: submodules that checkpointing runs again; empty for a sequence, which it cuts.
    """

    build: Callable[[], nn.Module]
    make_batch: Callable[[int], tuple[Tensor, Tensor]]
    batch: int = 64
    inner: int = 1
    stages: tuple[str, ...] = ()

    def problem(
        self, batch: int, device: torch.device, dtype: torch.dtype, mode: str = "default"
    ) -> Problem:
        """Equal weights and equal data at every call."""
        torch.manual_seed(0)
        model, (x, y) = self.build().to(device, dtype), self.make_batch(batch)
        x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
        return Problem(model, x, y.to(device), self.stages, mode)


def images(batch: int, channels: int = 1, size: int = 28) -> tuple[Tensor, Tensor]:
    """Channels last: torch moves no one-channel image there by itself, oneDNN is faster so."""
    x = torch.randn(batch, size, size, channels).permute(0, 3, 1, 2)
    return x, torch.randint(CLASSES, (batch,))


def patches(batch: int, tokens: int = 197) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, tokens, WIDTH), torch.randint(CLASSES, (batch,))


def text(batch: int, tokens: int = 128) -> tuple[Tensor, Tensor]:
    words = torch.randint(VOCABULARY, (batch, tokens + 1))
    return words[:, :-1].contiguous(), words[:, 1:].flatten()


def resnet18() -> nn.Module:
    return import_torchvision().models.resnet18(num_classes=CLASSES)


class Attention(nn.Module):
    """Layer norm and self-attention, added to their input."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm(x)).unflatten(2, (3, HEADS, WIDTH // HEADS))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Perceptron(nn.Module):
    """Layer norm, two layers and a GELU, added to their input."""

    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.norm, self.gelu = nn.LayerNorm(WIDTH), nn.GELU(approximate)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.gelu(self.up(self.norm(x))))


class Encoder(nn.Module):
    """One encoder block of vit_b_16; its first token is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.perceptron = Attention(causal=False), Perceptron("none")
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.perceptron(self.attention(x))[:, 0])


class Decoder(nn.Module):
    """One decoder block of GPT-2 small between its embeddings and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(128, WIDTH)
        self.attention, self.perceptron = Attention(causal=True), Perceptron("tanh")
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for part in (self.words, self.places):
            nn.init.normal_(part.weight, std=0.02)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.perceptron(self.attention(x)))).flatten(0, 1)


class Checkpointed(nn.Module):
    """A module whose activations are computed again in the backward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=False, preserve_rng_state=False)


def checkpointed(problem: Problem) -> nn.Module:
    """The model with its stages checkpointed, or a sequence cut into sqrt(n) of them.

    The last part of a sequence is left out: its activations are needed at once. Batch norm moves
    its running means twice, as it does for all users of torch.utils.checkpoint.
    """
    model = problem.model
    if isinstance(model, nn.Sequential):
        size = max(1, round(len(model) ** 0.5))
        parts = [model[i : i + size] for i in range(0, len(model), size)]
        return nn.Sequential(*map(Checkpointed, parts[:-1]), parts[-1])
    for name in problem.stages:
        model.set_submodule(name, Checkpointed(model.get_submodule(name)))
    return model


def _paper(name: str) -> Work:
    build = functools.partial(MODELS[name], (1, 28, 28), CLASSES)
    return Work(build, images, inner=30 if name == "logistic-regression" else 1)


def _deep(depth: int) -> Work:
    return Work(functools.partial(deep_mlp, depth, (1, 28, 28), CLASSES), images)


_BLOCK = ("attention", "perceptron")
WORKS: dict[str, Work] = {
    **{name: _paper(name) for name in PAPER},
    **{f"mlp-depth-{depth}": _deep(depth) for depth in DEPTHS},
    "resnet18": Work(
        resnet18,
        functools.partial(images, channels=3, size=64),
        batch=32,
        stages=("layer1", "layer2", "layer3", "layer4"),
    ),
    "vit-block": Work(Encoder, patches, batch=8, stages=_BLOCK),
    "gpt2-block": Work(Decoder, text, batch=8, stages=_BLOCK),
}
