"""Kept: what `jvp` and `jacfwd` have made of the functions that they were called with last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import BuiltinMethodType, MethodType
from typing import Any

from .errors import TangentError
from .forward import Forward

_MOST = 32
_kept: OrderedDict[tuple[Any, ...], Forward] = OrderedDict()


def forward_of(func: Callable[..., Any], **options: Any) -> Forward:
    """The transform of a function; those of the last 32 functions are kept, and what they hold."""
    # a bound method is another object each time it is asked for; equal objects of other kinds may
    # differ in what they compute, and those in the table are alive, so that no id comes twice
    named = isinstance(func, MethodType | BuiltinMethodType)
    key = (func if named else id(func), *options.items())
    forward = _kept.pop(key, None) or Forward(func, **options)
    _kept[key] = forward
    if len(_kept) > _MOST:
        _kept.popitem(last=False)
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
