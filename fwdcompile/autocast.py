"""Autocast: a program has the casts of where it was captured, and runs without any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

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
