"""A small transformer is fine-tuned by forward gradients: low-rank adapters on frozen weights.

Backpropagation pre-trains it on handwritten digits, read row by row. Then its weights are frozen,
and the head and adapters of rank 2 beside its projections learn to read digits that stand on their
heads, once by forward gradients and once by backpropagation. A forward gradient is the noisier the
more parameters learn: here they are few. It keeps no activations: training needs the memory of
inference, and the model only ever runs forwards.

    python examples/finetune.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, linear, scaled_dot_product_attention

import fwdcompile
from fwdcompile import data

Part = tuple[Tensor, Tensor]


class Adapted(nn.Module):
    """A linear layer with a product of two thin matrices added to its weight; zero at first."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + linear(linear(x, self.down), self.up)


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
        mixed = scaled_dot_product_attention(*heads.chunk(3, 1)).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.narrow(gelu(self.widen(self.norm2(x))))


class Reader(nn.Module):
    """Images `[n, 1, 8, 8]` as sequences of their rows, to the scores of ten digits."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.read, self.place = nn.Linear(8, width), nn.Parameter(torch.randn(8, width) / 2)
        self.blocks = nn.Sequential(*(Block(width, heads=2) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        h = self.blocks(self.read(images.squeeze(1)) + self.place)
        return self.head(self.norm(h.mean(1)))


def adapted(model: Reader, rank: int = 2) -> Reader:
    """A copy in which nothing learns but adapters of the blocks' linear layers and the head."""
    model = copy.deepcopy(model).requires_grad_(False)
    for block in model.blocks:
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block, name, Adapted(child, rank))
    model.head.requires_grad_(True)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [p for p in model.parameters() if p.requires_grad]


def by_backprop(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Fills the gradients of trained parameters by a backward pass, and returns the loss."""

    def gradient(images: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(model(images), labels)
        loss.backward()
        return loss.detach()

    return gradient


def fit(
    model: nn.Module,
    gradient: Callable[[Tensor, Tensor], Tensor],
    part: Part,
    steps: int,
    lr: float,
) -> None:
    """Adam on whatever gradients come, with a rate that sinks to zero."""
    optimizer = torch.optim.Adam(trained(model), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = data.batches(part, 64, seed=0)
    for _ in range(steps):
        optimizer.zero_grad()
        gradient(*next(batches))
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """The share of images that get their label."""
    images, labels = part
    return float((model(images).argmax(-1) == labels).float().mean())


def kept(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes of activations that autograd keeps from the model's run to its backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = cross_entropy(model(images), labels)
    del loss
    return sum(sizes.values())


def pretrained(digits: data.Dataset, width: int, steps: int) -> Reader:
    """Task A, by backpropagation."""
    model = Reader(width, depth=1)
    fit(model, by_backprop(model), digits.train, steps, lr=3e-3)
    return model


def main(
    width: int = 32, pretrain: int = 500, steps: int = 800, samples: int = 8
) -> tuple[float, float, float]:
    """Returns the accuracies on task B: before, by forward gradients, by backpropagation."""
    torch.manual_seed(0)
    digits = data.load("digits")
    model = pretrained(digits, width, pretrain)
    train, held_out = ((x.flip(-2), y) for x, y in (digits.train, digits.validation))
    forward = adapted(model)
    backward = copy.deepcopy(forward)
    count, whole = (sum(p.numel() for p in ps) for ps in (trained(forward), model.parameters()))
    print(f"upright digits after pre-training: {accuracy(model, digits.validation):.1%}")
    print(f"parameters: {whole}, frozen but for the head; that and the adapters train: {count}")

    gradient = fwdcompile.ForwardGradient(
        forward,
        cross_entropy,
        directions=fwdcompile.Rademacher(),
        samples=samples,
        compile=False,  # a run of seconds is over before a compilation
    )
    fit(forward, gradient, train, steps, lr=1e-2)
    fit(backward, by_backprop(backward), train, steps, lr=1e-2)
    before, ours, theirs = (accuracy(m, held_out) for m in (model, forward, backward))
    print(f"digits upside down, before:    {before:.1%}")
    print(
        f"after forward gradients:       {ours:.1%}  ({samples} directions a step, kept: nothing)"
    )
    size = kept(backward, *next(data.batches(train, 64, seed=0))) / 1024
    print(
        f"after backpropagation:         {theirs:.1%}  (kept for a backward pass: {size:.0f} KiB)"
    )
    return before, ours, theirs


if __name__ == "__main__":
    main()
