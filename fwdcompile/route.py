"""Route: how the tensors of a call get into a program and out of it, found once a kind of call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .binding import Tangents, refuse_shared, signature_of
from .directions import RankOne
from .lowered import Lowered
from .parts import register_dataclasses
from .program import Kind, Program, Slot
from .request import suffix
from .sizes import mark_open

Home = tuple[Any, str]


class Given:
    """What a call is given, and of which kind it is.

    Args:
        leaves: of the arguments, in order.
        spec: their structure, as by `flatten`.
        dots: all tangents in order, the factors of a `RankOne` one behind the other.
        names: what they are called.
    """

    def __init__(
        self, leaves: Sequence[Any], spec: Any, dots: Sequence[Any], names: Any = None
    ) -> None:
        self.leaves, self.dots = leaves, dots
        # equal for calls that have one route
        self.kind = (spec, names, *map(signature_of, leaves), *map(signature_of, dots))

    @staticmethod
    def of(args: Sequence[Any], kwargs: Mapping[str, Any], *tangents: Any) -> Given:
        """Takes arguments, and one or more mappings of tangents or sequences of mappings."""
        dots: list[Any] = []
        names = tuple([_names(each, dots) for each in tangents])
        return Given(*flatten(args, kwargs), dots, names)

    def has(self, dots: Sequence[Any]) -> bool:
        """Whether its tangents are these very ones."""
        return len(dots) == len(self.dots) and all(map(is_, dots, self.dots))


def flatten(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """Leaves and structure; plain tensors spare a small model a tenth of its step."""
    if not kwargs and all(isinstance(x, Tensor) for x in args):
        return list(args), len(args)
    register_dataclasses(tree := (tuple(args), dict(kwargs)))
    return pytree.tree_flatten(tree)


def _names(tangents: Any, dots: list[Any]) -> Any:
    """How tangents are named, and their tensors added to `dots`."""
    if isinstance(tangents, list | tuple):
        return list, *[_names(each, dots) for each in tangents]
    if not isinstance(tangents, Mapping):
        return type(tangents)
    dots += tensors_of(tangents)
    return tuple([(k, type(dot)) if isinstance(dot, RankOne) else k for k, dot in tangents.items()])


def tensors_of(tangents: Tangents) -> Iterator[Tensor]:
    """The tensors of tangents, in order."""
    for dot in tangents.values():
        if isinstance(dot, RankOne):
            yield dot.u
            yield dot.v
        else:
            yield dot


class Route:
    """Where the tensors of one kind of call go in a program, and what becomes of its results.

    Args:
        lowered: the program.
        homes: where parameters and buffers are kept, by name.
        leaves: the names of the leaves of the arguments, in order.
        dots: the tangents of each direction, and behind them those of inner transforms, innermost
            first.
        directions: how many of `dots` are directions.
        depth: how many transforms there are; inner ones without tangents have those of direction 0.
        several: whether there is a tuple of tangents, of directions.
    """

    def __init__(
        self,
        lowered: Lowered,
        homes: Mapping[str, Home],
        leaves: Sequence[str],
        dots: Sequence[Tangents],
        directions: int,
        depth: int = 1,
        several: bool = False,
    ) -> None:
        self.lowered = lowered
        program = lowered.program
        self._slots = [slot for slot in program.inputs if slot.kind != "constant"]
        written = {i: s for i, s in enumerate(program.outputs) if s.kind in ("buffer", "input")}
        ends = (*self._slots, *written.values())
        state = dict.fromkeys(s.name for s in ends if s.kind in ("parameter", "buffer"))
        self._homes = [homes[name] for name in state]
        places: dict[Any, int] = {name: i for i, name in enumerate((*state, *leaves))}
        for k, name, factor in _parts(dots):
            inner = k >= directions
            key = name + suffix(k - directions + 1) if inner else (k, name, factor)
            places[key] = len(places)
        for level in range(1, depth if len(dots) == directions else 1):
            places |= {name + suffix(level): places[0, name, ""] for name in dots[0]}
        self._order = [places[_key(slot)] for slot in self._slots]
        self._written = [(i, places[slot.name]) for i, slot in written.items()]
        self._results = Results(program, directions, several)

    def pool(self, leaves: Sequence[Any], dots: Sequence[Any]) -> list[Any]:
        """All tensors of a call: the state of the model, arguments, tangents."""
        return [*[home[key] for home, key in self._homes], *leaves, *dots]

    def tensors(self, pool: Sequence[Any]) -> list[Tensor]:
        """The arguments of the program; what it writes to has no other name.

        Raises:
            TangentError: a tensor that is written to shares memory with another one.
        """
        program = self.lowered.program
        tensors = [pool[i] for i in self._order]
        refuse_shared(self._slots, program.changed, tensors, program.constants)
        return tensors

    def opened(self, tensors: Sequence[Tensor]) -> None:
        """Tells torch.compile which dimensions of the tensors are open."""
        mark_open(self.lowered.program, zip(self._slots, tensors, strict=True))

    def results(self, outs: Sequence[Any], pool: Sequence[Any]) -> tuple[Any, Any, Any]:
        """The results of the program in the model's structure, as by `Results`.

        Also writes the new values of buffers and inputs that the model changes in place.
        """
        if self._written:
            with torch.no_grad():
                for i, place in self._written:
                    pool[place].copy_(outs[i])
        return self._results(outs)


class Routes:
    """The routes of calls by their key, whose first part is the version of the model."""

    def __init__(self) -> None:
        self._routes: dict[Any, Route] = {}
        self._newest = -1

    def find(self, key: Any) -> Route | None:
        """The route of a key, unless the numbers that its program was made for are others now."""
        route = self._routes.get(key)
        return None if route is None or route.lowered.program.is_stale else route

    def keep(self, key: Any, route: Route) -> None:
        """Keeps a route. A new version drops those of others: they hold what may be replaced."""
        version, *_ = key
        if version > self._newest:
            self._routes.clear()
            self._newest = version
        self._routes[key] = route

    def clear(self) -> None:
        """Forgets all."""
        self._routes.clear()


class Results:
    """Takes outputs of a program into the structure of what its model returns."""

    def __init__(self, program: Program, directions: int, several: bool) -> None:
        self._tree, self._several = program.out_spec.tree, several
        # behind the outputs of the program: what the model returns that is no tensor, and None
        self._fixed = (*(leaf for _, leaf in program.out_spec.leaves), None)
        self._primal = _picked(program, "output", 0)
        self._dots = [_picked(program, "tangent", k) for k in range(directions)]
        self._ddot = _picked(program, "second", 0)

    def __call__(self, outs: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Primal and tangent outputs, and sums of second derivatives."""
        pool = (*outs, *self._fixed)
        y, *y_dots, y_ddot = (
            pytree.tree_unflatten([pool[i] for i in picked], self._tree)
            for picked in (self._primal, *self._dots, self._ddot)
        )
        return y, tuple(y_dots) if self._several else y_dots[0], y_ddot


def _picked(program: Program, kind: Kind, direction: int) -> list[int]:
    """For each leaf of what the model returns its place in the pool of `Results`."""
    slots, leaves = program.outputs, program.out_spec.leaves
    wanted = (kind, direction)
    places = {s.name: i for i, s in enumerate(slots) if (s.kind, s.direction) == wanted}
    fixed = range(len(slots), len(slots) + len(leaves)) if kind == "output" else [-1] * len(leaves)
    pairs = zip(leaves, fixed, strict=True)
    return [places.get(leaf, -1) if named else i for (named, leaf), i in pairs]


def _parts(dots: Sequence[Tangents]) -> Iterator[tuple[int, str, str]]:
    """Direction, name and factor of each tensor of tangents, in the order of `tensors_of`."""
    for k, one in enumerate(dots):
        for name, dot in one.items():
            for factor in ("u", "v") if isinstance(dot, RankOne) else ("",):
                yield k, name, factor


def _key(slot: Slot) -> Any:
    return (slot.direction, slot.name, slot.factor) if slot.kind == "tangent" else slot.name
