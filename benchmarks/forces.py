"""Forces between atoms: a potential of learnt pairs, and its gradient by torch.autograd.grad."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RADIAL = 16


class Forces(nn.Module):
    """Minus the gradient of a sum over pairs, `[atoms, 3]` like the places.

    Args:
        width: of the hidden layers that map a distance, as `RADIAL` bumps, to an energy.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.energy = nn.Sequential(
            nn.Linear(RADIAL, width),
            nn.GELU("tanh"),
            nn.Linear(width, width),
            nn.GELU("tanh"),
            nn.Linear(width, 1),
        )

    @torch.enable_grad()
    def forward(self, places: Tensor) -> Tensor:
        if not places.requires_grad:
            places = places.clone().requires_grad_()
        i, j = torch.triu_indices(len(places), len(places), 1, device=places.device)
        apart = (places[i] - places[j]).square().sum(1, keepdim=True).sqrt()
        bumps = torch.exp(-((apart - torch.arange(RADIAL).to(apart) / 4) ** 2))
        return -torch.autograd.grad(self.energy(bumps).sum(), places, create_graph=True)[0]
