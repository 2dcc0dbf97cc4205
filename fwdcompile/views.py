"""Views: where the code of a model can look, found by the names that it loads.

From the model on, each thing is followed to those that its code can reach: the attributes that it
loads, the globals and variables of its functions, modules within modules, hooks, items of lists.
Of plain objects the attributes count that code loads by name, and those that their own methods load
which are called by name; not what these call in turn. Code of torch, numpy and Python's own library
is taken to stay as it is.
"""

from __future__ import annotations

import array
import functools
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import (
    CellType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules import module as torch_module

from .lifted import Derived, Lifted
from .objective import Objective
from .scope import CONTAINERS, Scope, is_code, is_library, loads
from .scripts import Scripted

LONGEST = 64  # items of a list or dict that is looked at
FARTHEST = 4096  # things that are followed, the nearest first
_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
# that a program may be made for, and that change in place
_NUMBERS = (np.ndarray, np.random.Generator, np.random.RandomState, random.Random, array.array)
_OF_ALL_MODULES = frozenset(vars(nn.Module())) - {"training"}


@dataclass(frozen=True, eq=False)
class View:
    """How to look at one thing.

    Attributes:
        thing: whose view it is.
        keys: what its code calls the first things that are seen.
        look: gives all that is seen.
        space: what grows where there is more to see.
        still: whether one look is enough.
        blind: whether there may be more to see that is not looked at.
    """

    thing: Any
    keys: Sequence[str]
    look: Callable[[], Sequence[Any]]
    space: Any = None
    still: bool = False
    blind: bool = False

    def labels(self) -> list[str]:
        """For each thing that is seen what a person calls it."""
        title = getattr(self.thing, "__qualname__", type(self.thing).__qualname__)
        more = len(self.look()) - len(self.keys)
        return [*(f"{title}.{key}" for key in self.keys), *[f"what {title} consists of"] * more]


def views_of(model: Any) -> list[View]:
    """The views of all that the code of a model can reach."""
    scope = Scope(model)
    reached = {id(thing): thing for thing in (model, *_HOOKS)}
    known = 0
    views: list[View] = []
    while known < scope.size():  # of which code that is found has more
        known, views, things = scope.size(), [], [*reached.values()]
        for thing in things:
            if (view := _view(thing, scope)) is None:
                continue
            views.append(view)
            seen = view.look()
            scope.hand(seen, thing)
            new = {id(x): x for x in seen if id(x) not in reached}
            if len(reached) < FARTHEST:
                reached |= new
                things += new.values()
            elif new:
                views.append(_unseen(thing))
    return views


def is_viewed_as_items(thing: Any) -> bool:
    """Whether a thing is no more than what it holds."""
    return type(thing) in CONTAINERS and len(thing) <= LONGEST


def _view(thing: Any, scope: Scope) -> View | None:
    if isinstance(thing, Tensor):
        return None
    return next(view(thing, scope) for kind, view in _VIEWS.items() if isinstance(thing, kind))


def _of_module(module: nn.Module, scope: Scope) -> View:
    space = vars(module)
    keys = sorted(key for key in space if key in scope.names and key not in _OF_ALL_MODULES)
    lists = [space[key] for key in ("_modules", "_forward_hooks", "_forward_pre_hooks")]

    def look() -> list[Any]:
        seen = [space[key] for key in keys]
        for things in lists:
            seen += things.values()
        return [*seen, type(module)]

    return View(module, keys, look, space)


def _of_function(function: FunctionType, scope: Scope) -> View:
    if is_library(function.__module__):
        return View(function, (), tuple, still=True)
    space, cells = function.__globals__, function.__closure__ or ()
    keys = [key for key in loads(function.__code__)[1] if key in space]

    def look() -> list[Any]:
        seen = [*(space[key] for key in keys), *map(_content, cells)]
        return [*seen, function.__defaults__, function.__kwdefaults__]

    return View(function, (*keys, *function.__code__.co_freevars), look)


def _of_class(kind: type, scope: Scope) -> View | None:
    is_module = issubclass(kind, nn.Module) and kind is not nn.Module
    if kind is object or (is_library(kind.__module__) and not is_module):
        return None
    space, runs = vars(kind), is_module or kind in scope.run
    keys = [key for key in space if key in scope.names and (runs or not is_code(space[key]))]
    return View(kind, keys, lambda: [*(space[key] for key in keys), *kind.__bases__], space)


def _of_object(thing: Any, scope: Scope) -> View | None:
    """Of a Python module, or an object with attributes of its own."""
    kind = type(thing)
    space: dict[str, Any] = {}
    with suppress(AttributeError):
        space = object.__getattribute__(thing, "__dict__")
    if is_library(thing.__name__ if kind is ModuleType else kind.__module__):
        return _unseen(thing) if isinstance(thing, _NUMBERS) else None
    spaces = [vars(base) for base in kind.__mro__ if "__slots__" in vars(base)]  # no C type has it
    slots = {key: x for space in spaces for key, x in space.items() if _is_slot(x)}
    names = scope.names if kind is ModuleType else scope.names | scope.loaded(thing)
    keys = [key for key in space if key in names]
    kept = [x for key, x in slots.items() if key in names and _is_filled(x, thing)]

    def look() -> list[Any]:
        return [*(space[key] for key in keys), *(slot.__get__(thing) for slot in kept), kind]

    return View(thing, keys, look, space)


def _of_items(thing: Any, scope: Scope) -> View | None:
    if len(thing) > LONGEST:  # words, such as the names of classes, are no numbers
        things = thing.values() if isinstance(thing, dict) else thing
        return None if all(isinstance(x, str) for x in things) else _unseen(thing)
    if isinstance(thing, dict):
        return View(thing, (), lambda: [*thing, *thing.values()])
    return View(thing, (), lambda: [*thing])


def _of_script(script: Any, scope: Scope) -> View:
    return View(script, (), lambda: [getattr(part, "training", None) for part in script.modules()])


def _by(*attributes: str) -> Callable[[Any, Scope], View]:
    """The view of what consists of some attributes."""
    return lambda thing, _: View(
        thing, attributes, lambda: [getattr(thing, key) for key in attributes], still=True
    )


# the first kind that a thing is of counts
_VIEWS: dict[type, Callable[[Any, Scope], View | None]] = {
    Objective: _by("model", "loss_fn"),
    Derived: _by("base"),
    Lifted: _by("like"),
    Scripted: lambda thing, scope: _of_script(thing.script, scope),
    ScriptModule: _of_script,
    nn.Module: _of_module,
    FunctionType: _of_function,
    MethodType: _by("__self__", "__func__"),
    functools.partial: _by("func", "args", "keywords"),
    functools.cached_property: _by("func"),
    type(functools.cache(len)): _by("__wrapped__"),
    property: _by("fget"),
    staticmethod: _by("__func__"),
    classmethod: _by("__func__"),
    **dict.fromkeys(CONTAINERS, _of_items),
    type: _of_class,
    object: _of_object,
}


def _unseen(thing: Any) -> View:
    return View(thing, (), tuple, still=True, blind=True)


def _is_slot(thing: Any) -> bool:
    return isinstance(thing, MemberDescriptorType)


def _is_filled(slot: MemberDescriptorType, thing: Any) -> bool:
    with suppress(AttributeError):
        slot.__get__(thing)
        return True
    return False


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
