"""The derivative that MeanFlow training needs: of a transformer, along its input and its time.

The tangent is a target: it must stay out of autograd, while the output stays differentiable.
Compiled torch.func.jvp stops at the affine LayerNorm; the generated program compiles.

    python examples/meanflow.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

import fwdcompile


class Flow(nn.Module):
    """Points in the plane and a time for each, to velocities: one attention block."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.read, self.time = nn.Linear(2, width), nn.Linear(1, width)
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.write = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.read(x) + self.time(t)
        query, key, value = self.qkv(self.norm(h)).chunk(3, -1)
        return self.write(silu(h + scaled_dot_product_attention(query, key, value)))


def main(steps: int = 20) -> None:
    torch.manual_seed(0)
    model = Flow()
    x, t = torch.randn(64, 16, 2), torch.rand(64, 16, 1)

    peer = torch.compile(lambda x, t, v: torch.func.jvp(model, (x, t), (v, torch.ones_like(t))))
    try:
        peer(x, t, x)
        print("torch.compile(torch.func.jvp): runs")
    except Exception as error:
        first = str(error).splitlines()[0]
        print(f"torch.compile(torch.func.jvp): {type(error).__name__}: {first}")

    forward = fwdcompile.transform(model, tracks_grad=False, compile=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        noise = torch.randn_like(x)
        mixed, velocity = (1 - t) * x + t * noise, noise - x
        u, u_dot = forward(mixed, t, tangents={"x": velocity, "t": torch.ones_like(t)})
        loss = (u - (velocity - t * u_dot)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"fwdcompile, compiled: step {step:2}  loss {float(loss.detach()):.4f}")


if __name__ == "__main__":
    main()
