"""Autocast: a program has the casts of where it was captured, and runs without any more."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch._ops import OpOverload

from . import rule

# made of products or convolutions, which autocast casts
_OF_PRODUCTS = frozenset(
    {"einsum", "tensordot", "inner", "linalg_multi_dot", "bilinear", "conv1d", "conv2d", "conv3d"}
    | {"cov", "corrcoef", "rnn_tanh", "rnn_relu", "gru", "lstm"}
)
_IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd
_EXPLICIT = torch._C.DispatchKey.CompositeExplicitAutogradNonFunctional
_DEVICES = ("cpu", "cuda", "xpu", "mps")


def casts() -> tuple[tuple[str, torch.dtype], ...]:
    """The devices on which `torch.autocast` is at work here, each with the dtype it casts to."""
    if not torch._C._is_any_autocast_enabled():  # one look in place of four: every step asks
        return ()
    on = (device for device in _DEVICES if torch.is_autocast_enabled(device))
    return tuple((device, torch.get_autocast_dtype(device)) for device in on)


def without_casts() -> AbstractContextManager[object]:
    """A context in which nothing is cast: a captured program does its casts itself."""
    on = casts()
    return _off(on) if on else nullcontext()


@contextmanager
def _off(on: tuple[tuple[str, torch.dtype], ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for device, _ in on:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def composites_cast() -> Iterator[None]:
    """Lets ops that torch composes of others be these where autocast is at work.

    Recorded whole, as those with a row are, they would lose the casts of what they consist of.
    """
    with torch.library._scoped_library("aten", "IMPL") as library:
        for op, taken_apart, key in _composites():
            name: str = op.name()  # type: ignore[no-untyped-call]
            library.impl(name.removeprefix("aten::"), taken_apart, key)
        yield


@functools.lru_cache(maxsize=1)
def _composites() -> list[tuple[OpOverload, Callable[..., Any], str]]:
    """Composite ops with what they are made of, and the keys for which torch has no kernel."""
    made = {
        op: rule.lowerings.get(op) or functools.partial(op._op_dk, _IMPLICIT)
        for op in (*rule.table, *rule.lowerings)
        if op.namespace == "aten" and op._opname in _OF_PRODUCTS
        if op.has_kernel_for_dispatch_key(_IMPLICIT)
    }
    bilinear = torch.ops.aten._trilinear.default
    made[bilinear] = functools.partial(bilinear._op_dk, _EXPLICIT)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [
        (op, taken_apart, key)
        for op, taken_apart in made.items()
        for key in ("AutocastCPU", "AutocastCUDA")
        if not has_kernel(op.name(), key)  # type: ignore[no-untyped-call]
    ]
