"""Functions with control flow that several test files share; all take one vector."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops import scan, while_loop


def branch(x: Tensor) -> Tensor:
    """A branch on the sign of the sum."""
    return torch.cond(x.sum() > 0, lambda x: (x**3).sum(), lambda x: x.exp().prod(), (x,))


def recurrence(x: Tensor) -> Tensor:
    """A recurrence over constants, of which all results are used."""

    def step(c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.sin(c * w) + c
        return new, new * new

    last, each = scan(step, x, torch.linspace(0.1, 1, 4, dtype=torch.float64)[:, None].expand(4, 3))
    return (last * last).sum() + each.prod()


def loop(x: Tensor) -> Tensor:
    """A product that three rounds make."""

    def body(i: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, y * x.cos() + y.sin()

    return while_loop(lambda i, y: i < 3, body, (torch.tensor(0), x.exp()))[1].prod()
