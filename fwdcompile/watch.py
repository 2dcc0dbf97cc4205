"""Watch: what Python tells a model besides its parameters and buffers.

A program has the numbers, flags and functions of its model written into it. They are looked at
before each call; where one is another, the model is captured anew.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from enum import Enum
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .binding import signature_of
from .parts import Model, modules_of
from .scripts import Scripted
from .views import View, is_viewed_as_items, views_of

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
_MANY = 16  # programs of which one may not know


class Watch:
    """Tells apart what a model is, by all that its Python code can read of it.

    Args:
        model: a module, a function or another object that is called.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._views: list[View] = []
        self._looks: list[Callable[[], Sequence[Any]]] = []
        self._spaces: list[Any] = []
        self._homes: list[dict[str, Any]] = []  # of parameters, of buffers, module by module
        self._tensors: list[Tensor] = []
        self._kinds: list[Any] = []
        self._states: dict[Any, int] = {}
        self._state = -1
        self._seen: list[Any] = []
        self._sizes: list[int] = []
        self._tokens: list[Any] = []
        self._versions: dict[tuple[Any, ...], int] = {}
        self._version = -1
        # whether the code can read what is not looked at, such as the numbers of an array
        self.is_blind = False

    def version(self) -> int:
        """The number of what the model is now: what it was before has the number of then."""
        if self._version < 0 or self._is_another():
            self._number()
        return self._version

    def accept(self) -> None:
        """Takes what is seen now for the version that was captured: capture itself has run code."""
        if self._is_another():
            self._see()
            self._versions[tuple(self._tokens)] = self._version

    def state(self) -> int:
        """The number of what of parameters and buffers decides a program, and of which are tied."""
        tensors = [x for home in self._homes for x in home.values() if x is not None]
        kinds = [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]
        if kinds != self._kinds or not all(map(is_, tensors, self._tensors)):
            first: dict[int, int] = {}
            ties = tuple(first.setdefault(id(x), i) for i, x in enumerate(tensors))
            found = ties, tuple(map(signature_of, tensors))
            self._state = self._states.setdefault(found, len(self._states))
            self._tensors, self._kinds = tensors, kinds
        return self._state

    def trained(self) -> tuple[bool, ...]:
        """Which parameters of the modules last seen require gradients."""
        parameters = (p for home in self._homes[::2] for p in home.values())
        return tuple([p.requires_grad for p in parameters if p is not None])

    def _is_another(self) -> bool:
        seen, sizes = self._look()
        same = len(seen) == len(self._seen) and sizes == self._sizes
        return not (same and all(map(is_, seen, self._seen)))

    def _look(self) -> tuple[list[Any], list[int]]:
        seen: list[Any] = []
        try:
            for look in self._looks:
                seen += look()
        except (KeyError, AttributeError):  # something is not there any more
            return [], []
        return seen, [*map(len, self._spaces)]

    def _see(self) -> None:
        self._views = views_of(self._model)
        own = dict.fromkeys(nn.ModuleList(modules_of(self._model).values()).modules())
        self._homes = [home for m in own for home in (m._parameters, m._buffers)]
        self._views += [_constants(v.thing) for v in self._views if _is_foreign(v.thing, own)]
        self.is_blind = any(view.blind for view in self._views)
        self._looks = [view.look for view in self._views if not view.still]
        self._spaces = [view.space for view in self._views if view.space is not None]
        self._seen, self._sizes = self._look()
        self._tokens = [_token(thing) for view in self._views for thing in view.look()]

    def _number(self) -> None:
        before = self._tokens
        self._see()
        count = len(self._versions)
        self._version = self._versions.setdefault(tuple(self._tokens), count)
        if len(self._versions) == _MANY > count:
            warnings.warn(
                f"{_MANY} programs have been captured, one for each state of the model; last "
                f"{self._changed(before)} changed. Make it a buffer, or an input.",
                stacklevel=2,
            )

    def _changed(self, before: list[Any]) -> str:
        """What the first token that is another one is called."""
        labels = (label for view in self._views for label in view.labels())
        pairs = zip(labels, self._tokens, before, strict=False)
        return next((label for label, new, old in pairs if new != old), "what it consists of")


def _is_foreign(thing: Any, own: Collection[nn.Module]) -> bool:
    """Whether a module is none of the model's own, so that its tensors are constants."""
    return isinstance(thing, nn.Module) and thing not in own


def _constants(module: nn.Module) -> View:
    homes = module._parameters, module._buffers
    return View(
        module,
        [key for home in homes for key in home],
        lambda: [x for home in homes for x in home.values()],
    )


class _Same:
    """An object by its identity, kept alive only where there is no other way."""

    def __init__(self, thing: Any) -> None:
        self._id = id(thing)
        self._thing: Callable[[], Any] = lambda: thing
        with suppress(TypeError):
            self._thing = weakref.ref(thing)

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        thing = self._thing()
        return isinstance(other, _Same) and thing is not None and thing is other._thing()


def _token(thing: Any) -> Any:
    """What is equal for things of which a program is the same; containers are looked into."""
    if isinstance(thing, _PLAIN):
        return type(thing), repr(thing)
    if isinstance(thing, Scripted):
        return _Same(thing.script)
    return type(thing) if is_viewed_as_items(thing) else _Same(thing)
