"""Request: what a caller wants generated, and what of a call decides which program serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .binding import Tangents, signature_of
from .directions import RankOne


@dataclass(frozen=True)
class Request:
    """What a caller wants generated: the active names of each level, innermost first."""

    levels: tuple[tuple[str, ...], ...]
    directions: int
    same: bool
    rank_one: tuple[str, ...]

    @staticmethod
    def of(inner: Sequence[Tangents], dots: Sequence[Tangents], same: bool) -> Request:
        """What a call asks for by tangents of inner levels and of each direction of the last."""
        levels = tuple(tuple(level) for level in (*inner, dots[0]))
        rank_one = tuple(name for name, dot in dots[0].items() if isinstance(dot, RankOne))
        return Request(levels, len(dots), same and bool(inner) and len(dots) == 1, rank_one)


def kinds(dots: Tangents) -> dict[str, type]:
    """Which names have tangents, and whether as factors."""
    return {name: RankOne if isinstance(dot, RankOne) else Tensor for name, dot in dots.items()}


def suffix(level: int) -> str:
    """How the tangents of a level are called when the next level sees them as inputs."""
    return "_dot" if level < 2 else f"_dot{level}"


def inputs_key(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of the inputs decides the captured graph."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    return tuple(map(signature_of, leaves)), spec


def fixed(leaves: tuple[Any, ...]) -> tuple[Any, ...]:
    """What of the inputs, given by their keys, is no tensor."""
    return tuple(leaf if isinstance(leaf[0], type) else None for leaf in leaves)
