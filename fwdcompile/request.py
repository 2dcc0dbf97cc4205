"""Request: what a caller wants generated, and what of a call decides which program serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from .binding import Tangents, signature_of
from .directions import RankOne
from .errors import TangentError


@dataclass(frozen=True)
class Request:
    """What a caller wants generated.

    Attributes:
        moved: the names that have a tangent in each direction.
        inner: the same of each inner transform, innermost first.
        same: whether the tangents of the inner transforms are those of the last one, too.
        rank_one: names whose tangents come as factors.
        sizes: how many directions each stands for, where they are batched.
        curved: how many of the directions are in a sum of second derivatives.
    """

    moved: tuple[tuple[str, ...], ...]
    inner: tuple[tuple[str, ...], ...] = ()
    same: bool = False
    rank_one: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    curved: int = 0

    @property
    def ways(self) -> dict[str, list[int]]:
        """The directions in which each name moves."""
        names = dict.fromkeys(name for each in self.moved for name in each)
        return {n: [k for k, each in enumerate(self.moved) if n in each] for n in names}


def factored(dots: Sequence[Tangents]) -> tuple[str, ...]:
    """The names whose tangents come as factors.

    Raises:
        TangentError: a tangent comes as factors in one direction, and in full in another.
    """
    kinds: dict[str, bool] = {}
    for name, dot in (item for one in dots for item in one.items()):
        if kinds.setdefault(name, isinstance(dot, RankOne)) != isinstance(dot, RankOne):
            raise TangentError(f"the tangents of {name!r} are RankOne in all directions or in none")
    return tuple(name for name, is_factored in kinds.items() if is_factored)


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
