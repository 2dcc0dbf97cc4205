"""Directions drawn a second time, behind the forward run: they need not be kept, nor sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .directions import Directions, RankOne, scaled


class Redraw:
    """Moves a tensor along directions that are drawn again from their keys.

    Args:
        directions: where they come from.
        compiled: compiles a function; each shape has one of its own.
    """

    def __init__(
        self, directions: Directions, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self._directions, self._compiled = directions, compiled
        self._functions: dict[Any, Callable[..., None]] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor, keys: Tensor, moves: Tensor) -> None:
        """Adds to `x`, in place, the sum over k of `moves[k]` times the direction of `keys[k]`.

        Args:
            x: a parameter, or something of its shape and dtype.
            keys: `[K, 2]`, of `stream_keys`.
            moves: `[K]`, of a floating dtype.
        """
        kind = x.shape, x.stride(), x.dtype, len(keys)
        if kind not in self._functions:

            def along(x: Tensor, keys: Tensor, moves: Tensor) -> None:
                shape, dtype = x.shape, x.dtype
                move(x, [self._directions.draw(shape, key=key, dtype=dtype) for key in keys], moves)

            self._functions[kind] = self._compiled(along)
        self._functions[kind](x, keys, moves)


def move(x: Tensor, dots: Iterable[Tensor | RankOne], moves: Tensor) -> None:
    """Adds directions to a tensor in place, each times its number."""
    for dot, factor in zip(dots, moves, strict=True):
        x.add_(scaled(dot, factor))
