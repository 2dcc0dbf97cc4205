"""What a batch of directions is compared with: the same directions one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import fwdcompile

Maker = Callable[..., fwdcompile.Forward]
MAKERS = [fwdcompile.transform, fwdcompile.laplacian]


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def rows(tangents: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    count = len(next(iter(tangents.values())))
    return [{name: dot[k] for name, dot in tangents.items()} for k in range(count)]


def check(
    maker: Maker, model: Any, inputs: Any, tangents: dict[str, Tensor], **options: Any
) -> Any:
    """Compares a batch with its directions one after another; returns what was called."""
    y, y_dots, *sums = maker(model)(*inputs, tangents=rows(tangents))
    stacked = pytree.tree_map(
        lambda *parts: parts[0] if parts[0] is None else torch.stack(parts), *y_dots
    )
    together = maker(model, batched=True, **options)
    close(together(*inputs, tangents=[tangents]), (y, (stacked,), *sums))
    return together
