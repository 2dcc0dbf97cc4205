"""Literals: a model may decide by tensors that it makes of numbers, as their values are known.

Torch knows the value of a tensor of one number while it captures, and of what is computed from
such tensors alone. Here it knows those of more, so that the times of an ODE solver, the levels of a
noise schedule or the offsets of a window can be compared, looped over and counted. Where a model
decides by tensors that it closes over, such as the graphs that nodes belong to, it knows those as
well, and the program holds until someone writes to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._ops import OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode, fake_tensor
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from .errors import CaptureError
from .hazards import here, written_by

aten = torch.ops.aten

Fixed = list[tuple[Tensor, int]]

LARGEST = 4096  # numbers in a tensor
_MADE = (
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default,
    aten.eye.default, aten.eye.m, aten.full.default, aten.ones.default, aten.zeros.default,
)  # fmt: skip


@contextmanager
def known_literals(fixed: Fixed | None = None) -> Iterator[None]:
    """Gives values to small tensors that are made of numbers, as long as a model is captured.

    Args:
        fixed: takes the small tensors that the model closes over, with their versions: these have
            values, too. None where they are to have none.
    """
    dispatch = FakeTensorMode.dispatch
    held: dict[int, FakeTensor] = {}  # torch itself holds on to no fake of a constant

    def valued(
        mode: FakeTensorMode, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(type(x) is Tensor for x in written_by(op, args, kwargs)):
            raise CaptureError(
                f"{here()}\n  {op} writes to a tensor that the model closes over, which a program "
                "takes for a constant.\n  Make it a buffer, by register_buffer, or an input."
            )
        if fixed is not None:
            for x in tree_leaves((args, kwargs)):
                if type(x) is Tensor and id(x) not in held and _is_fixed(x):
                    held[id(x)] = mode.fake_tensor_converter.from_real_tensor(mode, x)
                    _give(mode, held[id(x)], x.clone)
                    fixed.append((x, x._version))
        out = dispatch(mode, op, types, args, kwargs)  # type: ignore[no-untyped-call]
        if op in _MADE and isinstance(out, FakeTensor) and _is_small(out, args):
            _give(mode, out, lambda: op(*args, **(kwargs or {})))
        return out

    with ExitStack() as stack:
        for module in (fake_tensor, proxy_tensor):
            stack.enter_context(mock.patch.object(module, "CONSTANT_NUMEL_LIMIT", LARGEST))
        stack.enter_context(mock.patch.object(FakeTensorMode, "dispatch", valued))
        yield


def _is_fixed(x: Tensor) -> bool:
    versioned = not x.is_inference()
    return versioned and not x.requires_grad and x.device.type == "cpu" and x.numel() <= LARGEST


def _give(mode: FakeTensorMode, fake: FakeTensor, value: Callable[[], Tensor]) -> None:
    with _disable_current_modes():
        fake.constant = value()
    mode.fake_tensor_converter.add_constant_storage_mapping(fake)


def _is_small(x: FakeTensor, numbers: Any) -> bool:
    there = x.device.type == "cpu" or (x.is_cuda and torch.cuda.is_available())
    known = not any(isinstance(n, SymInt | SymFloat | SymBool) for n in tree_leaves(numbers))
    return there and known and isinstance(x.numel(), int) and x.numel() <= LARGEST
