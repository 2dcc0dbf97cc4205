"""Inside: a transform that a model calls, whose program becomes a part of the model's own.

A physics-informed loss is a model whose forward calls `laplacian`; a forward gradient of it goes
through the inner program as through any other ops. That program has to be there when the model is
captured, for one capture cannot run inside another: the first call of it ends the outer capture,
the inner program is made, and the outer capture begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import SymInt, Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .hazards import here

T = TypeVar("T")


class _Wanted(BaseException):
    """Not for users: a model that is captured calls a program that is not made yet."""

    def __init__(self, make: Callable[[], object]) -> None:
        self.make = make
        self.line = here()


_MOST = 256  # programs that a model calls
_capturing: ContextVar[bool] = ContextVar("capturing", default=False)


def is_capturing() -> bool:
    """Whether a model is being captured here."""
    return _capturing.get()


def captured_with_inner(capture: Callable[[], T]) -> T:
    """What a capture gives, as soon as the programs that the model calls are made.

    Raises:
        CaptureError: it asks for more and more of them.
    """
    for _ in range(_MOST):
        token = _capturing.set(True)
        try:
            return capture()
        except _Wanted as wanted:
            make, line = wanted.make, wanted.line
        finally:
            _capturing.reset(token)
        make()
    raise CaptureError(_told(line, "what it is made of is another thing in each call"))


def refuse_open_sizes(inputs: Any) -> None:
    """Refuses inputs of an inner program whose sizes the outer capture leaves open.

    Raises:
        CaptureError: one has such a size.
    """
    tensors = (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
    if any(isinstance(n, SymInt) for x in tensors for n in (*x.shape, *x.stride())):
        raise refused("with dynamic=True the sizes of its inputs are open")


def ask_for(make: Callable[..., object], args: Any, kwargs: Any) -> NoReturn:
    """Ends the capture that runs, to make a program for inputs like these first."""
    inputs = pytree.tree_map_only(Tensor, _Like.of, (args, kwargs))
    raise _Wanted(lambda: make(*_empty(inputs)))


@contextmanager
def outside_of_torch_func(inputs: Any) -> Iterator[Any]:
    """Lets a capture that torch.func.grad, vmap and their like call run as if they did not.

    Args:
        inputs: pytrees of the tensors of a call, which may be wrapped.

    Yields:
        Inputs as the innermost transform sees them: of no values, where there is a transform.
    """
    if peek_interpreter_stack() is None:
        yield inputs
        return
    likes = pytree.tree_map_only(Tensor, _Like.of, inputs)
    with temporarily_clear_interpreter_stack():
        yield _empty(likes)


def _empty(likes: Any) -> Any:
    return pytree.tree_map_only(_Like, _Like.empty, likes)


@dataclass(frozen=True)
class _Like:
    """What remains of a tensor of the capture that ends."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> _Like:
        return _Like(tuple(x.shape), x.stride(), x.dtype, x.device)

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


def refused(reason: str) -> CaptureError:
    """The error of a transform that cannot be a part of a model."""
    return CaptureError(_told(here(), reason))


def _told(line: str, reason: str) -> str:
    return f"{line}\n  The model calls a transform here: {reason}."
