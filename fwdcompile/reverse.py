"""Reverse mode in a captured function: `torch.func.grad` and its like, `torch.autograd.grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._functorch import eager_transforms
from torch.export._trace import _export
from torch.export.exported_program import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from .hazards import refused_hidden_writes
from .tape import Tape, TapeError, drop_aliases, stopped_at_tapes

Around = Callable[[nn.Module, Any, Any], AbstractContextManager[None]]

# where grad, vjp and jvp of torch.func begin a level of their own
_LEVELS = ("grad_increment_nesting", "jvp_increment_nesting")


class _TransformError(Exception):
    """Not for users: the captured function calls a transform of torch.func."""


def recorded(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> ExportedProgram:
    """What `torch.export.export` gives, also for a function that differentiates by itself.

    Export records above autograd, and there loses what reverse mode computes. Such a function is
    recorded below autograd, as the ops of its forward and its backward run; attention then by its
    parts, as torch has no derivative of a fused kernel's backward. Where it calls
    `torch.autograd.grad`, autograd keeps a tape meanwhile.

    Args:
        root: whose forward is recorded.
        args: example positional arguments.
        kwargs: example keyword arguments.
        shapes: as `dynamic_shapes` of `torch.export.export`.

    Raises:
        CaptureError: the function calls `backward`.
    """

    def below(around: Around) -> ExportedProgram:
        forward = type(root).forward

        def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with around(self, args, kwargs), refused_hidden_writes():
                return forward(self, *args, **kwargs)

        with sdpa_kernel(SDPBackend.MATH), mock.patch.object(type(root), "forward", watched):
            exported: ExportedProgram = _export(
                root, args, kwargs, dynamic_shapes=shapes, strict=False, pre_dispatch=False
            )
            return exported

    try:
        with stopped_at_tapes():
            try:
                with _stopped_at_transforms():
                    return torch.export.export(
                        root, args, kwargs, dynamic_shapes=shapes, strict=False
                    )
            except _TransformError:
                return below(lambda *_: nullcontext())
    except TapeError:
        tape = Tape(root, args, kwargs)
        with tape.off():
            exported = below(tape.on)
        drop_aliases(exported.graph)
        return exported


@contextmanager
def _stopped_at_transforms() -> Iterator[None]:
    def stop() -> Any:
        raise _TransformError

    with ExitStack() as stack:
        for level in _LEVELS:
            stack.enter_context(mock.patch.object(eager_transforms, level, stop))
        yield
