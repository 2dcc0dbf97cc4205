"""Vibrations of a molecule whose model takes its forces by torch.autograd.grad.

The matrix of second derivatives of the energy is the Jacobian of the forces: one generated program
gives all its columns, forward over reverse. torch.func.jacfwd refuses it. Of three atoms that
are bound alike the frequencies are known: sqrt(3 k / m) where all swing outwards at once, twice
sqrt(3 k / 2 m) where they do not, and six zeros, as nothing holds the molecule in its place.

    python examples/vibrations.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fwdcompile


class Morse(nn.Module):
    """Pairs of atoms at places `[atoms, 3]` in wells of a depth, a width and a distance."""

    def __init__(self, depth: float = 1.0, width: float = 1.5, distance: float = 1.2) -> None:
        super().__init__()
        self.depth, self.width, self.distance = (
            nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (depth, width, distance)
        )

    @property
    def stiffness(self) -> Tensor:
        """The second derivative of a pair's energy by its distance, k."""
        return 2 * self.depth * self.width**2

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The energy, and the forces `[atoms, 3]`."""
        places = places.requires_grad_()
        i, j = torch.triu_indices(len(places), len(places), 1)
        apart = (places[i] - places[j]).norm(dim=1)
        energy = (self.depth * (1 - torch.exp(self.width * (self.distance - apart))) ** 2).sum()
        return energy, -torch.autograd.grad(energy, places, create_graph=True)[0]


def triangle(side: Tensor) -> Tensor:
    """Three places at equal distances: `[3, 3]`."""
    corners = torch.tensor([[0, 0, 0], [1, 0, 0], [0.5, 0.75**0.5, 0]], dtype=side.dtype)
    return side * corners


def frequencies(model: Morse, places: Tensor, mass: float) -> Tensor:
    """The angular frequencies of all modes, rising: `[3 * atoms]`."""
    columns = fwdcompile.jacfwd(lambda places: -model(places)[1])(places)
    squares = torch.linalg.eigvalsh(columns.reshape(places.numel(), -1) / mass)
    return squares.clamp(min=0).sqrt()


def main(mass: float = 2.0) -> Tensor:
    model = Morse().requires_grad_(False)
    places = triangle(model.distance)
    found = frequencies(model, places, mass)
    known = (model.stiffness / mass * torch.tensor([1.5, 1.5, 3.0])).sqrt()
    print("frequencies ", ", ".join(f"{float(x):.6f}" for x in found[-3:]))
    print("known       ", ", ".join(f"{float(x):.6f}" for x in known))
    try:
        torch.func.jacfwd(lambda places: model(places)[1])(places)
    except RuntimeError as error:
        print(f"torch.func   {str(error).split('. ')[0]}.")
    return found


if __name__ == "__main__":
    main()
