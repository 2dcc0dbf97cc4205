"""Views: where the code of a model can look, found by the names that it loads.

From the model on, each thing is followed to those that its code can reach: the attributes that it
loads, the globals and variables of its functions, modules within modules, hooks, items of lists.
Code of torch, numpy and Python's own library is taken to stay as it is.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule

from .objective import Objective
from .parts import Derived
from .scripts import Scripted

LONGEST = 64  # items of a list or dict that are looked at
_ENTRIES = frozenset({"forward", "training", "__call__", "__getattr__", "__getitem__"})
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "fwdcompile"} - {"types", "argparse"}
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
    """

    thing: Any
    keys: Sequence[str]
    look: Callable[[], Sequence[Any]]
    space: Any = None
    still: bool = False

    def labels(self) -> list[str]:
        """For each thing that is seen what a person calls it."""
        title = getattr(self.thing, "__qualname__", type(self.thing).__qualname__)
        more = len(self.look()) - len(self.keys)
        return [*(f"{title}.{key}" for key in self.keys), *[f"what {title} consists of"] * more]


def views_of(model: Any) -> list[View]:
    """The views of all that the code of a model can reach."""
    names, reached = set(_ENTRIES), {id(model): model}
    while True:
        known = len(names), len(reached)
        views = [view for thing in reached.values() if (view := _view(thing, names))]
        for view in views:
            if isinstance(view.thing, FunctionType):
                names |= _loads(view.thing.__code__)[0]
            reached |= {id(x): x for x in view.look() if id(x) not in reached}
        if (len(names), len(reached)) == known:
            return views


def is_viewed_as_items(thing: Any) -> bool:
    """Whether a thing is no more than what it holds."""
    return type(thing) in (list, tuple, dict) and len(thing) <= LONGEST


def _view(thing: Any, names: set[str]) -> View | None:
    if isinstance(thing, Tensor) or not isinstance(thing, tuple(_VIEWS)):
        return None
    return next(view(thing, names) for kind, view in _VIEWS.items() if isinstance(thing, kind))


def _of_module(module: nn.Module, names: set[str]) -> View:
    space = vars(module)
    keys = sorted(key for key in space if key in names and key not in _OF_ALL_MODULES)
    lists = [space[key] for key in ("_modules", "_forward_hooks", "_forward_pre_hooks")]

    def look() -> list[Any]:
        seen = [space[key] for key in keys]
        for things in lists:
            seen += things.values()
        return [*seen, type(module)]

    return View(module, keys, look, space)


def _of_function(function: FunctionType, names: set[str]) -> View:
    if _is_library(function.__module__):
        return View(function, (), tuple, still=True)
    space, cells = function.__globals__, function.__closure__ or ()
    keys = [key for key in _loads(function.__code__)[1] if key in space]

    def look() -> list[Any]:
        seen = [*(space[key] for key in keys), *map(_content, cells)]
        return [*seen, function.__defaults__, function.__kwdefaults__]

    return View(function, (*keys, *function.__code__.co_freevars), look)


def _of_class(kind: type, names: set[str]) -> View | None:
    is_module = issubclass(kind, nn.Module) and kind is not nn.Module
    if kind is object or (_is_library(kind.__module__) and not is_module):
        return None
    space = vars(kind)
    keys = [key for key in space if key in names]
    return View(kind, keys, lambda: [*(space[key] for key in keys), *kind.__bases__], space)


def _of_object(thing: Any, names: set[str]) -> View | None:
    """Of a Python module, or an object with attributes of its own."""
    kind = type(thing)
    space = getattr(thing, "__dict__", {})
    if _is_library(thing.__name__ if kind is ModuleType else kind.__module__):
        return None
    slots = {key for base in kind.__mro__ for key in getattr(base, "__slots__", ())}
    keys = [key for key in (*space, *slots) if key in names and hasattr(thing, key)]
    return View(thing, keys, lambda: [*(getattr(thing, key) for key in keys), kind], space)


def _of_items(thing: Any, names: set[str]) -> View | None:
    if len(thing) > LONGEST:
        return None
    items = thing.items if isinstance(thing, dict) else None
    return View(thing, (), lambda: [x for pair in items() for x in pair] if items else list(thing))


def _of_script(script: Any, names: set[str]) -> View:
    return View(script, (), lambda: [getattr(part, "training", None) for part in script.modules()])


def _by(*attributes: str) -> Callable[[Any, set[str]], View]:
    """The view of what consists of some attributes."""
    return lambda thing, _: View(
        thing, attributes, lambda: [getattr(thing, key) for key in attributes], still=True
    )


# the first kind that a thing is of counts
_VIEWS: dict[type, Callable[[Any, set[str]], View | None]] = {
    Objective: _by("model", "loss_fn"),
    Derived: _by("base"),
    Scripted: lambda thing, names: _of_script(thing.script, names),
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
    list: _of_items,
    tuple: _of_items,
    dict: _of_items,
    type: _of_class,
    object: _of_object,
}


def _is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


@functools.cache
def _loads(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
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
            inner = _loads(part)
            attributes |= inner[0]
            spaces |= inner[1]
    return frozenset(attributes), frozenset(spaces)
