"""How torch.compile is asked for a program: its options, and what CUDA graphs want of a step."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_ON_TENSORS = functools.partial(torch.compiler.keep_tensor_guards_unsafe, keep_parameters=True)


def compiled_step(
    function: Callable[..., Any], mode: str, dynamic: bool | None
) -> Callable[..., Any]:
    """A step compiled as one graph in a mode of torch.compile; its results are the caller's own.

    Of torch's guards those on tensors are kept. All else that a step reads is fixed or part of
    the key of its plan, and looking at it takes a tenth of a small model's step.
    """
    options = torch._inductor.list_mode_options(mode) | {"guard_filter_fn": _ON_TENSORS}
    fresh = with_own_code(function)
    graph = torch.compile(fresh, fullgraph=True, dynamic=dynamic, options=options)
    if not replays(mode):
        return graph

    def replay(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return pytree.tree_map_only(Tensor, torch.clone, graph(*args))

    return replay


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own: dynamo counts recompilations by it."""
    code, names = function.__code__.replace(), function.__globals__
    return types.FunctionType(code, names, function.__name__, closure=function.__closure__)


@functools.cache
def replays(mode: str) -> bool:
    """Whether a mode records CUDA graphs, each run of which writes over the results of the last."""
    return bool(torch._inductor.list_mode_options(mode).get("triton.cudagraphs"))


def stay_in_place(tensors: Iterable[Tensor]) -> None:
    """Tells CUDA graphs that tensors keep their memory between runs.

    A graph then reads and writes them where they are. Of what it is not told, it keeps copies, and
    it refuses to write to it: parameters are known to stay, the buffers of batch norm are not.
    """
    for x in tensors:
        torch._dynamo.mark_static_address(x)  # type: ignore[no-untyped-call]
