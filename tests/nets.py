"""Small models that several test files share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


class Tied(nn.Module):
    """One embedding reads tokens and scores them; a buffer moves in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)))


@dataclass
class Pair:
    left: Tensor
    right: Tensor


class Decoder(nn.Module):
    """A GPT-2-style decoder: causal attention, layer norm before each block, tied weights."""

    def __init__(
        self, vocabulary: int = 11, width: int = 16, heads: int = 2, depth: int = 2
    ) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(12, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Flow(nn.Module):
    """A small transformer over points with a time: what MeanFlow trains."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.read, self.time = nn.Linear(2, width), nn.Linear(1, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.write = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.read(x) + self.time(t)[:, None]
        query, key, value = self.qkv(self.norm(h)).unsqueeze(1).chunk(3, -1)
        h = h + F.scaled_dot_product_attention(query, key, value).squeeze(1)
        return self.write(F.silu(h))


class Lstm(nn.Module):
    """An LSTM cell in a Python loop."""

    def __init__(self, steps: int = 3) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(3, 4)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], 4, dtype=x.dtype, device=x.device)
        for i in range(self.steps):
            h, c = self.cell(x[:, i], (h, c))
        return h.sum(0)


def directions(tensors: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        for name, x in tensors.items()
    }


def reverse_jvp(model: nn.Module, loss: Tensor, dots: dict[str, Tensor]) -> Tensor:
    """The directional derivative of a scalar by reverse mode: the sum of gradient times tangent."""
    parameters = dict(model.named_parameters())
    names = [name for name in dots if name in parameters]
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
    return torch.stack(
        [(g * dots[name]).sum() for g, name in zip(gradients, names, strict=True)]
    ).sum()


def difference(function: Any, x: Tensor, v: Tensor, step: float = 1e-5) -> Tensor:
    return (function(x + step * v) - function(x - step * v)) / (2 * step)


class Gated(nn.Module):
    """Takes one of two ways by the value of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.mix, self.stretch, (x,))

    def mix(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))

    def stretch(self, x: Tensor) -> Tensor:
        return x * self.scale


def axes(x: Tensor, name: str = "x") -> list[dict[str, Tensor]]:
    """A direction along each element of a vector, or of the last dimension of a batch."""
    return [{name: e.expand(x.shape)} for e in torch.eye(x.shape[-1], dtype=x.dtype)]
