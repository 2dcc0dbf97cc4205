"""A physics-informed network for the heat equation u_t = u_xx / 10, against the exact solution.

u_t and u_xx come from one program, in one forward run: exact derivatives, no graph of the backward
pass kept for a second one. The weights are trained by backpropagation through that program.

    python examples/pinn.py [FILE.png]
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

import fwdcompile

ALPHA = 0.1


class Rod(nn.Module):
    """Temperature of a rod: sin(pi x) at the start, zero at both ends, whatever the weights are."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        start = torch.sin(math.pi * x)
        return start + t * x * (1 - x) * self.net(torch.cat([x, t], -1))


def exact(x: Tensor, t: Tensor) -> Tensor:
    """The solution for that start: it dies out."""
    return torch.exp(-ALPHA * math.pi**2 * t) * torch.sin(math.pi * x)


def train(steps: int, points: int = 256) -> Rod:
    """Makes u_t - u_xx / 10 small at random points of [0, 1] x [0, 1]."""
    model = Rod().double()
    derivatives = fwdcompile.laplacian(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    ones = torch.ones(points, 1, dtype=torch.float64)
    for step in range(steps):
        x, t = torch.rand(2, points, 1, dtype=torch.float64)
        _, (_, u_t), u_xx = derivatives(x, t, tangents=[{"x": ones}], first=[{"t": ones}])
        loss = (u_t - ALPHA * u_xx).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(steps // 10, 1) == 0:
            print(f"step {step:5}  mean squared residual {float(loss.detach()):.1e}")
    return model


def grid(count: int = 101) -> tuple[Tensor, Tensor]:
    """Points of the whole square, `[count ** 2, 1]` each."""
    line = torch.linspace(0, 1, count, dtype=torch.float64)
    x, t = torch.meshgrid(line, line, indexing="xy")
    return x.reshape(-1, 1), t.reshape(-1, 1)


def draw(model: Rod, path: str) -> None:
    """The network's temperatures and their errors."""
    import matplotlib.pyplot as plt

    x, t = grid()
    with torch.no_grad():
        u = model(x, t)
    size = math.isqrt(len(u))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, values, title in zip(
        axes, (u, (u - exact(x, t)).abs()), ("u(x, t)", "error"), strict=True
    ):
        image = axis.imshow(values.view(size, size).numpy(), extent=(0, 1, 0, 1), origin="lower")
        axis.set(title=title, xlabel="x", ylabel="t")
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=150)


def main(path: str | None = None, steps: int = 2000) -> float:
    torch.manual_seed(0)
    model = train(steps)
    x, t = grid()
    with torch.no_grad():
        error = float((model(x, t) - exact(x, t)).abs().max())
    print(f"largest error on the square: {error:.1e}")
    if path:
        draw(model, path)
    return error


if __name__ == "__main__":
    main(*sys.argv[1:2])
