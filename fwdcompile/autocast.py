"""Autocast: a program has the casts of where it was captured, and runs without any more."""

from __future__ import annotations

from contextlib import ExitStack

import torch

_DEVICES = ("cpu", "cuda", "xpu", "mps")


def casts() -> tuple[tuple[str, torch.dtype], ...]:
    """The devices on which `torch.autocast` is at work here, each with the dtype it casts to."""
    on = (device for device in _DEVICES if torch.is_autocast_enabled(device))
    return tuple((device, torch.get_autocast_dtype(device)) for device in on)


def without_casts() -> ExitStack:
    """A context in which nothing is cast: a captured program does its casts itself."""
    with ExitStack() as stack:
        for device, _ in casts():
            stack.enter_context(torch.autocast(device, enabled=False))
        return stack.pop_all()
