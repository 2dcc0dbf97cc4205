"""Views: where the code of a model can look, found by the names that it loads.

From the model on, each thing is followed to those that its code can reach: the attributes that it
loads, the globals and variables of its functions, modules within modules, hooks, items of lists.
Of other objects than the model and modules the attributes count that code loads by name, and those
that their own methods load which are called by name; not what these call in turn.
Code of torch, numpy and Python's own library is taken to stay as it is.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from types import (
    CellType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules import module as torch_module

from .objective import Objective
from .parts import Derived
from .scripts import Scripted

LONGEST = 64  # items of a list or dict that is looked at
FARTHEST = 4096  # things that are followed, the nearest first
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)
_ENTRIES = frozenset({"forward", "training", "__call__", "__getattr__", "__getitem__"})
_OPERATIONS = frozenset(
    {"__len__", "__iter__", "__contains__", "__bool__", "__float__", "__int__"}
    | {"__mul__", "__rmul__", "__add__", "__radd__", "__sub__", "__rsub__", "__truediv__"}
)
_CODE = (FunctionType, property, staticmethod, classmethod, functools.cached_property)
_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
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


@dataclass
class Scope:
    """What code is known to load, where, and the classes whose methods are run.

    Attributes:
        names: that any code loads.
        run: classes whose methods are all taken to run.
        at: for things by their id the names that are loaded by code which has them at hand.
    """

    names: set[str]
    run: set[type]
    at: dict[int, frozenset[str]] = field(default_factory=dict)

    def size(self) -> int:
        """Grows with what is known."""
        return len(self.names) + sum(map(len, self.at.values()))

    def within(self, thing: Any) -> Set[str]:
        """The names that are loaded by code which has at hand what a thing holds."""
        if isinstance(thing, FunctionType):
            return _loads(thing.__code__)[0]
        if isinstance(thing, nn.Module | type | ModuleType):
            return self.names
        if isinstance(thing, MethodType | functools.partial) or type(thing) in _CONTAINERS:
            return self.at.get(id(thing), frozenset())
        return self.loaded(thing)

    def loaded(self, thing: Any) -> Set[str]:
        """The names that are loaded by code which has a plain object at hand, its own included."""
        called = self.at.get(id(thing), frozenset())
        return called | _loads_of_methods(type(thing), called)


def views_of(model: Any) -> list[View]:
    """The views of all that the code of a model can reach."""
    scope = Scope(set(_ENTRIES), set(_classes_of(model)))
    reached = {id(thing): thing for thing in (model, *_HOOKS)}
    known = 0
    views: list[View] = []
    while known < scope.size():  # of which code that is found has more
        known, views, things = scope.size(), [], [*reached.values()]
        for thing in things:
            if (view := _view(thing, scope)) is None:
                continue
            views.append(view)
            if isinstance(thing, FunctionType):
                scope.names |= _loads(thing.__code__)[0]
            within = scope.within(thing)
            new = {}
            for x in view.look():
                scope.at[id(x)] = scope.at.get(id(x), frozenset()) | within
                if id(x) not in reached:
                    new[id(x)] = x
            if len(reached) < FARTHEST:
                reached |= new
                things += new.values()
    return views


def _classes_of(model: Any) -> Sequence[type]:
    """The classes of the objects that a model is made of, and their bases."""
    if isinstance(model, Objective):
        return [*_classes_of(model.model), *_classes_of(model.loss_fn)]
    if isinstance(model, functools.partial):
        return _classes_of(model.func)
    return type(getattr(model, "__self__", model)).__mro__


def is_viewed_as_items(thing: Any) -> bool:
    """Whether a thing is no more than what it holds."""
    return type(thing) in _CONTAINERS and len(thing) <= LONGEST


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
    if _is_library(function.__module__):
        return View(function, (), tuple, still=True)
    space, cells = function.__globals__, function.__closure__ or ()
    keys = [key for key in _loads(function.__code__)[1] if key in space]

    def look() -> list[Any]:
        seen = [*(space[key] for key in keys), *map(_content, cells)]
        return [*seen, function.__defaults__, function.__kwdefaults__]

    return View(function, (*keys, *function.__code__.co_freevars), look)


def _of_class(kind: type, scope: Scope) -> View | None:
    is_module = issubclass(kind, nn.Module) and kind is not nn.Module
    if kind is object or (_is_library(kind.__module__) and not is_module):
        return None
    space, runs = vars(kind), is_module or kind in scope.run
    keys = [key for key in space if key in scope.names and (runs or not _is_code(space[key]))]
    return View(kind, keys, lambda: [*(space[key] for key in keys), *kind.__bases__], space)


def _of_object(thing: Any, scope: Scope) -> View | None:
    """Of a Python module, or an object with attributes of its own."""
    kind = type(thing)
    space = getattr(thing, "__dict__", {})
    if _is_library(thing.__name__ if kind is ModuleType else kind.__module__):
        return None
    slots = {key: x for base in kind.__mro__ for key, x in vars(base).items() if _is_slot(x)}
    names = scope.names if kind is ModuleType else scope.names | scope.loaded(thing)
    keys = [key for key in space if key in names]
    kept = [x for key, x in slots.items() if key in names and hasattr(thing, key)]

    def look() -> list[Any]:
        return [*(space[key] for key in keys), *(slot.__get__(thing) for slot in kept), kind]

    return View(thing, keys, look, space)


def _of_items(thing: Any, scope: Scope) -> View | None:
    if len(thing) > LONGEST:
        return None
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
    **dict.fromkeys(_CONTAINERS, _of_items),
    type: _of_class,
    object: _of_object,
}


def _loads_of_methods(kind: type, names: Set[str]) -> set[str]:
    """What the methods of a class load that have one of these names, or that such a one loads."""
    own = {key: x for base in kind.__mro__ if not _is_library(base.__module__)
           for key, x in vars(base).items() if _is_code(x)}  # fmt: skip
    loaded, waiting = set[str](), own.keys() & (names | _OPERATIONS)
    while waiting:
        found = set().union(*(_loads(code)[0] for key in waiting for code in _codes(own.pop(key))))
        loaded |= found
        waiting = own.keys() & found
    return loaded


def _codes(method: Any) -> list[CodeType]:
    parts = [getattr(method, part, None) for part in ("fget", "__func__", "func")]
    return [f.__code__ for f in (method, *parts) if isinstance(f, FunctionType)]


def _is_slot(thing: Any) -> bool:
    return isinstance(thing, MemberDescriptorType)


def _is_code(thing: Any) -> bool:
    return isinstance(thing, _CODE)


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
