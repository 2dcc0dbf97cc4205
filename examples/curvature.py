"""The largest eigenvalues of a loss's Hessian, by products with it from one generated program.

The program is the forward mode of a gradient: one run gives the gradient and the product H v of
the Hessian with a direction v in all parameters. No Hessian is made and nothing is taped. Lanczos
finds the eigenvalues from such products. Gradient descent at a rate lr overshoots along directions
whose eigenvalue is above 2 / lr.

    python examples/curvature.py
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

import fwdcompile
from fwdcompile.data import load


class Curvature:
    """The Hessian of `loss_fn(model(x), y)` by all parameters of a model, as they are.

    Args:
        model: of which only the parameters' values change between calls.
        loss_fn: a number from outputs and targets.
        compile: the program, by torch.compile.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], compile: bool = True
    ) -> None:
        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss_fn(functional_call(model, parameters, (x,)), y)

        self.parameters = {name: p.detach() for name, p in model.named_parameters()}
        self.forward = fwdcompile.transform(grad(loss), compile=compile)

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    def product(self, v: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient and H v, flat like `v`: `[size]`."""
        parts = v.split([p.numel() for p in self.parameters.values()])
        pairs = zip(self.parameters.items(), parts, strict=True)
        tangents = {f"parameters.{name}": part.view_as(p) for (name, p), part in pairs}
        both = self.forward(self.parameters, x, y, tangents=tangents)
        gradient, product = (torch.cat([part.flatten() for part in d.values()]) for d in both)
        return gradient, product

    def eigenvalues(self, count: int, x: Tensor, y: Tensor) -> list[float]:
        """The largest eigenvalues, falling."""

        def product(v: NDArray[np.float32]) -> NDArray[np.float32]:
            return self.product(torch.from_numpy(v.ravel()), x, y)[1].numpy()

        kind = next(iter(self.parameters.values())).numpy().dtype
        hessian = LinearOperator((self.size, self.size), matvec=product, dtype=kind)
        start = np.random.default_rng(0).standard_normal(self.size).astype(kind)
        found = eigsh(hessian, k=count, which="LA", tol=1e-3, v0=start, return_eigenvectors=False)
        return sorted(map(float, found), reverse=True)


def main(steps: int = 600, every: int = 100, lr: float = 0.5, compile: bool = True) -> list[float]:
    """Trains on handwritten digits, all of them a step; returns the largest eigenvalues met."""
    torch.manual_seed(0)
    x, y = load("digits").train
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    curvature = Curvature(model, cross_entropy, compile)
    descent = torch.optim.SGD(model.parameters(), lr=lr)
    sharpest = []
    for step in range(steps + 1):
        loss = cross_entropy(model(x), y)
        if step % every == 0:
            values = curvature.eigenvalues(3, x, y)
            shown = ", ".join(f"{value:.3f}" for value in values)
            print(f"step {step:4}  loss {loss.item():.4f}  eigenvalues {shown}; 2 / lr {2 / lr:g}")
            sharpest.append(values[0])
        descent.zero_grad()
        loss.backward()
        descent.step()
    return sharpest


if __name__ == "__main__":
    main()
