"""Lifted: a function that takes the tensors it holds as arguments.

A function that is written in a training step is another object in each step, and holds tensors of
that step: in its closure, in its defaults, in a `partial`. What else it consists of is equal from
step to step, and tells the one program that serves them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from enum import Enum
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor, nn

HELD = "_held"  # the argument that takes them
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
_HOLE = torch.empty(0)
_REAL = (Tensor, nn.Parameter)

# From tensors to a thing with these in the place of its own; None for one that holds none.
Build = Callable[[Sequence[Tensor]], Any]
Part = tuple[Any, Build | None]


class Derived:
    """What is made of a model and called in its place, as a transform is."""

    base: Callable[..., Any]


_LASTING = (nn.Module, Derived, type, ModuleType, FunctionType, type(None))


class Held:
    """What a function holds: tensors, and what is told by its identity."""

    def __init__(self, inside: bool) -> None:
        self._inside = inside
        self._places: dict[int, int] = {}
        self.tensors: list[Tensor] = []
        self.others: list[Any] = []

    def takes(self, thing: Any) -> bool:
        """Whether this is a tensor that an argument can be; what a capture has left is none."""
        is_taken = isinstance(thing, Tensor) if self._inside else type(thing) in _REAL
        return is_taken and thing.layout is torch.strided

    def place(self, x: Tensor) -> int:
        """The place of a tensor among those that are held."""
        place = self._places.setdefault(id(x), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(x)
        return place


class Lifted:
    """A function that is called with the tensors it holds, beside its own arguments.

    Attributes:
        like: the function with empty tensors in their place.
    """

    def __init__(self, build: Build, count: int) -> None:
        self._build = build
        self.like = build([_HOLE] * count)
        self.__qualname__ = getattr(self.like, "__qualname__", type(self.like).__name__)

    def __call__(self, *args: Any, _held: Sequence[Tensor], **kwargs: Any) -> Any:
        """Calls the function made of the tensors `_held`."""
        return self._build(_held)(*args, **kwargs)


class Liftable:
    """A function and the tensors it holds.

    Args:
        func: the function.
        inside: whether it is written in a model that is captured.

    Attributes:
        func: the function.
        tensors: each once.
        key: equal for functions that differ in their tensors alone, as long as the other things
            live that they hold.
        lasts: whether the key is the same where the function is written another time.
    """

    def __init__(self, func: Callable[..., Any], inside: bool) -> None:
        self.func = func
        held = Held(inside)
        self.key, self._build = _part(func, held, ())
        self.tensors = held.tensors
        self.lasts = all(isinstance(thing, _LASTING) for thing in held.others)

    def model(self) -> Callable[..., Any]:
        """What to capture: it holds no tensors of this call."""
        return Lifted(self._build, len(self.tensors)) if self._build else self.func


def lifted(func: Callable[..., Any], inside: bool = False) -> Liftable | None:
    """A function and the tensors it holds, unless these cannot be told; see `Liftable`."""
    try:
        return Liftable(func, inside)
    except ValueError:  # a variable is not set yet, or is the function itself
        return None


def _part(thing: Any, held: Held, within: tuple[Any, ...]) -> Part:
    """The key of a thing, and what makes it anew if it holds tensors; these are added to `held`."""
    kind = type(thing)
    if isinstance(thing, _PLAIN):
        return (kind, repr(thing)), None
    if held.takes(thing):
        place = held.place(thing)
        return (Tensor, place), lambda given: given[place]
    if kind is MethodType:  # another object each time it is asked for
        held.others += thing.__func__, thing.__self__
        return (kind, id(thing.__func__), id(thing.__self__)), None
    if kind is BuiltinFunctionType:  # so may be this one
        held.others.append(thing.__self__)
        return (kind, thing), None
    if kind not in _LOOKED_INTO or (kind is functools.partial and vars(thing)):
        held.others.append(thing)
        return (object, id(thing)), None
    if any(thing is each for each in within):
        raise ValueError("it holds itself")
    key, build = _LOOKED_INTO[kind](thing, held, (*within, thing))
    # what may be written to is told by what it holds only where it is made anew
    if build is None and kind in (list, dict):
        held.others.append(thing)
        return (object, id(thing)), None
    return (kind, key), build


def _of_tuple(thing: Sequence[Any], held: Held, within: tuple[Any, ...]) -> Part:
    parts = [_part(each, held, within) for each in thing]
    key = tuple(key for key, _ in parts)
    if not any(build for _, build in parts):
        return key, None
    builds = [build or (lambda _, x=x: x) for x, (_, build) in zip(thing, parts, strict=True)]
    return key, lambda given: tuple(build(given) for build in builds)


def _of_list(thing: list[Any], held: Held, within: tuple[Any, ...]) -> Part:
    return _then(list, _of_tuple(thing, held, within))


def _of_dict(thing: dict[Any, Any], held: Held, within: tuple[Any, ...]) -> Part:
    return _then(dict, _of_tuple(tuple(thing.items()), held, within))


def _of_partial(thing: Any, held: Held, within: tuple[Any, ...]) -> Part:
    parts = thing.func, thing.args, tuple(thing.keywords.items())
    return _then(
        lambda made: functools.partial(made[0], *made[1], **dict(made[2])),
        _of_tuple(parts, held, within),
    )


def _of_function(thing: FunctionType, held: Held, within: tuple[Any, ...]) -> Part:
    named, attributes = (tuple((d or {}).items()) for d in (thing.__kwdefaults__, vars(thing)))
    contents = tuple(cell.cell_contents for cell in thing.__closure__ or ())
    parts = thing.__defaults__, named, contents, attributes
    key, build = _then(
        functools.partial(_function, thing.__code__, thing.__globals__, _names(thing)),
        _of_tuple(parts, held, within),
    )
    return (thing.__code__, id(thing.__globals__), key), build


def _names(function: FunctionType) -> dict[str, str]:
    return {name: getattr(function, name) for name in ("__name__", "__qualname__", "__module__")}


def _function(
    code: CodeType, space: dict[str, Any], names: dict[str, str], parts: tuple[Any, ...]
) -> FunctionType:
    defaults, named, contents, attributes = parts
    made = FunctionType(code, space, None, defaults, tuple(map(CellType, contents)))
    made.__kwdefaults__ = dict(named) or None  # type: ignore[assignment]
    for name, thing in (*names.items(), *attributes):
        setattr(made, name, thing)
    return made


def _then(outer: Callable[[Any], Any], part: Part) -> Part:
    """A part that is made of another one."""
    key, build = part
    return key, None if build is None else lambda given: outer(build(given))


_LOOKED_INTO: dict[type, Callable[[Any, Held, tuple[Any, ...]], Part]] = {
    tuple: _of_tuple,
    torch.Size: _of_tuple,
    list: _of_list,
    dict: _of_dict,
    functools.partial: _of_partial,
    FunctionType: _of_function,
}
