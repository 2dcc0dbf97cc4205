"""Kept: what `jvp` and `jacfwd` have made of the functions that they were called with last."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, ref

import torch

from .errors import CaptureError, RuleError, TangentError
from .forward import Forward
from .inside import is_capturing
from .lifted import HELD, lifted

T = TypeVar("T")
F = TypeVar("F", bound=Forward)

_MOST = 32  # functions
_PROGRAMS = 64  # of one of them
_kept: OrderedDict[Any, Forward] = OrderedDict()
_made_of: WeakKeyDictionary[Forward, Any] = WeakKeyDictionary()  # the first function of each
_unlifted: OrderedDict[Any, None] = OrderedDict()  # that are captured with the tensors they hold


def served(
    func: Callable[..., Any],
    run: Callable[[Forward, dict[str, Any]], T],
    own: Forward | None = None,
    **options: Any,
) -> T:
    """Runs what serves a function: its transform, or that of one which held other tensors.

    Args:
        func: the function. One that is written in a loop need not be captured in each round.
        run: what to do with a transform, and arguments that it takes beside those of `func`.
        own: the function's own transform, if it is there already.
        options: of the transform.
    """
    inside = is_capturing()
    traced = torch.compiler.is_compiling() and not inside  # by dynamo, which is told no ids
    made = None if traced else lifted(func, inside)
    if made is None or (inside and not made.lasts):
        return run(own or forward_of(func, **options), {})
    key = (made.key, *options.items())
    forward = None if key in _unlifted else _kept_by(key, lambda: Forward(made.model(), **options))
    if forward is not None and _is_its_own(forward, func):
        forward.lasts = True
        try:
            return run(forward, {HELD: made.tensors} if made.tensors else {})
        except (CaptureError, RuleError):  # it may decide by tensors it holds, not by arguments
            if inside or not made.tensors:
                raise
            _unlifted[key] = None
    return run(own or forward_of(func, **options), {})


def _is_its_own(forward: Forward, func: Callable[..., Any]) -> bool:
    """Whether a kept transform may serve a function: another, if nothing can change unseen."""
    first = _made_of.setdefault(forward, _weak(func))
    return first() is func or not forward.watch.is_blind


def _weak(func: Callable[..., Any]) -> Callable[[], Any]:
    """What tells whether a function is this one, and lets it go if that is possible."""
    with suppress(TypeError):
        return ref(func)
    return lambda: func


def transform_of(kind: type[F], model: Callable[..., Any], **options: Any) -> F:
    """A transform; in a model that is captured, the one that it made when capture began before."""
    found = lifted(model, inside=True) if is_capturing() else None
    if found is None or found.tensors or not found.lasts:
        return kind(model, **options)
    forward = _kept_by((kind, found.key, *options.items()), lambda: kind(model, **options))
    forward.lasts = True
    return cast(F, forward)


def own(func: Callable[..., Any], **options: Any) -> Forward:
    """A function's own transform; `served` looks for one among those that are kept."""
    is_written_anew = type(func) in (FunctionType, functools.partial)
    return (Forward if is_written_anew else forward_of)(func, **options)


def forward_of(func: Callable[..., Any], **options: Any) -> Forward:
    """The transform of a function, by the object that it is."""
    # a bound method is another object each time it is asked for; equal objects of other kinds may
    # differ in what they compute, and those in the table are alive, so that no id comes twice
    named = isinstance(func, MethodType | BuiltinMethodType)
    key = (func if named else id(func), *options.items())
    return _kept_by(key, lambda: Forward(func, **options))


def _kept_by(key: Any, make: Callable[[], Forward]) -> Forward:
    """The transform of a key; those of the last 32 are kept, and what they hold."""
    forward = _kept.pop(key, None)
    if forward is None or forward.programs > _PROGRAMS:
        forward = make()
    _kept[key] = forward
    for table in (_kept, _unlifted):
        if len(table) > _MOST:
            table.popitem(last=False)
    return forward


def check_aux(out: Any) -> None:
    """Refuses what is no `(output, aux)`.

    Raises:
        TangentError: a function gives something else, and has been called with `has_aux`.
    """
    if not isinstance(out, tuple) or len(out) != 2:
        raise TangentError(
            f"has_aux=True: the function must return a tuple (output, aux), not {_kind(out)}"
        )


def _kind(thing: Any) -> str:
    name = type(thing).__name__
    return f"a {name} of {len(thing)}" if isinstance(thing, tuple | list) else f"a {name}"
