"""Scope: which attributes and globals the code of a model loads, and which of what.

Names are taken for all code alike, but for the methods of plain objects: one counts where code that
has the object at hand loads its name.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections import deque
from collections.abc import Sequence, Set
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from .lifted import Lifted
from .objective import Objective

CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_ENTRIES = frozenset({"forward", "training", "__call__", "__getattr__", "__getitem__"})
_OPERATIONS = frozenset(
    {"__len__", "__iter__", "__contains__", "__bool__", "__float__", "__int__"}
    | {"__mul__", "__rmul__", "__add__", "__radd__", "__sub__", "__rsub__", "__truediv__"}
)
_CODE = (FunctionType, property, staticmethod, classmethod, functools.cached_property)
_CODELESS = (str, int, float, complex, bytes, type(None), Tensor, nn.Module, type, FunctionType)
_CARRIERS = (FunctionType, MethodType, functools.partial, *CONTAINERS)
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "fwdcompile"} - {"types", "argparse"}


class Scope:
    """What code is known to load, and where.

    Args:
        model: of which all methods are taken to run.

    Attributes:
        names: that any code loads.
        run: classes whose methods are all taken to run.
    """

    def __init__(self, model: Any) -> None:
        self.names = set(_ENTRIES)
        self.run = set(_classes_of(model))
        self._at: dict[int, set[str]] = {}  # what is loaded by code that has a thing at hand
        self._of: dict[int, set[str]] = {}  # what a function loads, and those that it may call
        self._methods: dict[type, dict[str, frozenset[str]]] = {}

    def size(self) -> int:
        """Grows with what is known."""
        return sum(map(len, (self.names, *self._at.values(), *self._of.values())))

    def hand(self, things: Sequence[Any], owner: Any) -> None:
        """Lets the code of an owner, or code that has it at hand, have at hand what it holds."""
        if isinstance(owner, FunctionType):
            self.names |= loads(owner.__code__)[0]
        if isinstance(owner, _CARRIERS):
            code = loads(owner.__code__)[0] if isinstance(owner, FunctionType) else ()
            of = self._of.setdefault(id(owner), set(code))
            of.update(*(self._of.get(id(thing), ()) for thing in things))
        within = self._within(owner)
        for thing in things:
            if not isinstance(thing, _CODELESS):
                self._at.setdefault(id(thing), set()).update(within)

    def loaded(self, thing: Any) -> Set[str]:
        """The names that are loaded by code which has a plain object at hand, its own included."""
        called = self._at.get(id(thing), set())
        own = self._methods_of(type(thing))
        loaded, waiting = set[str](), own.keys() & (called | _ENTRIES | _OPERATIONS)
        while waiting:
            loaded.update(*(own[key] for key in waiting))
            waiting = {key for key in own.keys() & loaded if not own[key] <= loaded}
        return called | loaded

    def _within(self, owner: Any) -> Set[str]:
        if isinstance(owner, FunctionType):
            return self._of[id(owner)]
        if isinstance(owner, nn.Module | type | ModuleType):
            return self.names
        if isinstance(owner, _CARRIERS):
            return self._at.get(id(owner), set())
        return self.loaded(owner)

    def _methods_of(self, kind: type) -> dict[str, frozenset[str]]:
        """What each method of a class loads."""
        if kind not in self._methods:
            spaces = [vars(base) for base in kind.__mro__ if not is_library(base.__module__)]
            methods = {key: x for space in spaces[::-1] for key, x in space.items() if is_code(x)}
            self._methods[kind] = {
                key: frozenset().union(*(loads(code)[0] for code in _codes(x)))
                for key, x in methods.items()
            }
        return self._methods[kind]


def _classes_of(model: Any) -> Sequence[type]:
    """The classes of the objects that a model is made of, and their bases."""
    if isinstance(model, Objective):
        return [*_classes_of(model.model), *_classes_of(model.loss_fn)]
    if isinstance(model, Lifted):
        return _classes_of(model.like)
    if isinstance(model, functools.partial):
        return _classes_of(model.func)
    return type(getattr(model, "__self__", model)).__mro__


def _codes(method: Any) -> list[CodeType]:
    parts = [getattr(method, part, None) for part in ("fget", "__func__", "func")]
    return [f.__code__ for f in (method, *parts) if isinstance(f, FunctionType)]


def is_code(thing: Any) -> bool:
    """Whether an item of a class is a method or a property."""
    return isinstance(thing, _CODE)


def is_library(module: str | None) -> bool:
    """Whether a module is one whose code is taken to stay as it is."""
    return (module or "").partition(".")[0] in _LIBRARIES


@functools.cache
def loads(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The attributes and the globals that code can load by name."""
    attributes, spaces = set[str](), set[str]()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            spaces.add(step.argval)
        elif step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER")):
            attributes.add(step.argval)
    attributes |= {text for text in code.co_consts if isinstance(text, str)}
    for part in code.co_consts:
        if isinstance(part, CodeType):
            inner = loads(part)
            attributes |= inner[0]
            spaces |= inner[1]
    return frozenset(attributes), frozenset(spaces)
