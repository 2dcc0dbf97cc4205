"""Forward gradients in a training loop of plain torch: one call in place of `loss.backward()`.

`ForwardGradient` fills `p.grad`, so that the optimizer, its schedule, clipping and the DataLoader
stay as they are. A run that is resumed also loads `gradient.state_dict()`, and draws on from there.

    python examples/training_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fwdcompile
from fwdcompile import data


def train(model: nn.Module, batches: DataLoader[tuple[Tensor, ...]], epochs: int) -> list[float]:
    """The mean loss of each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    gradient = fwdcompile.ForwardGradient(
        model,
        cross_entropy,
        directions=fwdcompile.Rademacher(),
        samples=16,
        compile=False,  # a run of seconds is over before a compilation
    )
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for images, labels in batches:
            optimizer.zero_grad()
            loss = gradient(images, labels)  # runs the model, too; nothing runs backwards
            optimizer.step()
            total += float(loss)
        losses.append(total / len(batches))
        print(f"epoch {epoch:2}  loss {losses[-1]:.3f}")
    return losses


def main(epochs: int = 20) -> tuple[list[float], float]:
    torch.manual_seed(0)
    digits = data.load("digits")
    # drop_last: a batch of another size would be captured anew
    batches = DataLoader(TensorDataset(*digits.train), batch_size=64, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    losses = train(model, batches, epochs)
    images, labels = digits.validation
    with torch.no_grad():
        accuracy = float((model(images).argmax(-1) == labels).float().mean())
    print(f"accuracy on digits that were held out: {accuracy:.1%}")
    return losses, accuracy


if __name__ == "__main__":
    main()
