"""Tape: `torch.autograd.grad` in a captured function, whose ops and their backward are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._functorch import eager_transforms
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from .binding import state_homes
from .errors import CaptureError
from .hazards import here
from .parts import aliases_of, named_state

aten = torch.ops.aten

_ENGINE = "_engine_run_backward"


class TapeError(Exception):
    """Not for users: the captured function calls torch.autograd.grad."""


@contextmanager
def stopped_at_tapes() -> Iterator[None]:
    """Stops where the function calls torch.autograd.grad; transforms of torch.func may.

    Raises:
        CaptureError: it calls `backward`.
    """
    run, gradients = vars(torch.autograd)[_ENGINE], eager_transforms._autograd_grad

    def stop(*_: Any, accumulate_grad: bool, **__: Any) -> Any:
        if not accumulate_grad:
            raise TapeError
        raise CaptureError(
            f"{here()}\n  backward() writes gradients to tensors, which a program cannot return.\n"
            "  Take them from torch.autograd.grad or torch.func.grad."
        )

    def transforms(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(torch.autograd, _ENGINE, run):
            return gradients(*args, **kwargs)

    seen = mock.patch.object(eager_transforms, "_autograd_grad", transforms)
    with seen, mock.patch.object(torch.autograd, _ENGINE, stop):
        yield


class Tape:
    """Autograd's tape of a function that is recorded below autograd.

    Args:
        root: the module whose forward is recorded.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    def __init__(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        leaves = _leaves(root, args, kwargs)
        self._asking = {k: x for k, x in leaves.items() if x.requires_grad and x.is_leaf}
        self._tied = aliases_of(root)

    @contextmanager
    def off(self) -> Iterator[None]:
        """No tensor requires gradients: torch would record a backward of the whole function."""
        for x in self._asking.values():
            x.requires_grad_(False)
        try:
            yield
        finally:
            for x in self._asking.values():
                x.requires_grad_(True)

    @contextmanager
    def on(self, root: nn.Module, args: Any, kwargs: Any) -> Iterator[None]:
        """Around the forward: what required gradients does, and autograd saves tensors as they are.

        Hooks that would change, move or recompute what is saved are left out.
        """
        _tie(root, self._tied)
        leaves = _leaves(root, args, kwargs)
        for name in self._asking:
            leaves[name].requires_grad_(True)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(mock.patch.object(torch.autograd, _ENGINE, _with_graph()))
            for end in ("__enter__", "__exit__"):
                stack.enter_context(mock.patch.object(saved_tensors_hooks, end, return_value=None))
            yield


def drop_aliases(graph: fx.Graph) -> None:
    """Reads a tensor itself where autograd, or `_with_graph`, has made an alias of it."""
    for node in graph.find_nodes(op="call_function", target=aten.alias.default):
        if all(user.op != "output" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _with_graph() -> Any:
    """Runs the engine with create_graph=True always, so that backward is made of plain ops.

    Without it there are fused kernels for some. Gradients that were asked for without a graph have
    none, but have their tangents, as under torch.autograd.forward_ad.
    """
    run = vars(torch.autograd)[_ENGINE]

    def with_graph(outs: Any, gs: Any, retain: Any, create: bool, *args: Any, **kwargs: Any) -> Any:
        grads = run(outs, gs, retain, True, *args, **kwargs)
        if create:
            return grads
        with torch._C._AutoDispatchBelowAutograd():
            return pytree.tree_map_only(Tensor, aten.alias.default, grads)

    return with_graph


def _leaves(root: nn.Module, args: Any, kwargs: Any) -> dict[Any, Tensor]:
    """Parameters and buffers by name, inputs by place."""
    state = named_state(root, "parameter") | named_state(root, "buffer")
    inputs = enumerate(pytree.tree_leaves((args, kwargs)))
    return state | {place: x for place, x in inputs if isinstance(x, Tensor)}


def _tie(root: nn.Module, tied: dict[str, str]) -> None:
    """Makes those one tensor again that were: torch records an input for each name."""
    homes = state_homes(root)
    for name, first in tied.items():
        (home, key), (owner, own) = homes[name], homes[first]
        if isinstance(home, dict):  # and not within a tensor, which is tied as a whole
            home[key] = owner[own]
