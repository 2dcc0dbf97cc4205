"""How torch.compile is asked for a program: its options, and steps that CUDA graphs run."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# kernels that read one tensor, as all updates do, are tried for fusion when no further apart:
# torch's own 64 found no more in steps of many layers, and took much longer
NEIGHBOURS = 16

_ON_TENSORS = functools.partial(torch.compiler.keep_tensor_guards_unsafe, keep_parameters=True)


def check_mode(mode: str) -> None:
    """Refuses a mode that torch.compile does not have.

    Raises:
        ValueError: there is none of that name.
    """
    if mode not in torch._inductor.list_mode_options():
        raise ValueError(f"torch.compile must know the mode, and has none called {mode!r}")


def compiled_step(
    function: Callable[..., Any], mode: str, dynamic: bool | None, device: torch.device
) -> Callable[..., Any]:
    """A step on a device compiled as one graph in a mode of torch.compile; records no CUDA graph.

    Of torch's guards those on tensors are kept. All else that a step reads is fixed or part of
    the key of its plan, and looking at it takes a tenth of a small model's step.
    """
    # Inductor takes a second to import
    from .inductor import StepPasses
    from .kernels import StepKernels

    options = torch._inductor.list_mode_options(mode) | {"guard_filter_fn": _ON_TENSORS}
    options["triton.cudagraphs"] = False
    options["post_grad_custom_pre_pass"] = StepPasses()
    # a product and a sum are one instruction, as on GPUs: polynomials consist of them
    options["cpp.enable_floating_point_contract_flag"] = "fast"
    options["max_fusion_buffer_group_pairwise_attempts"] = NEIGHBOURS
    if device.type == "cpu":
        options |= {"_post_fusion_custom_pass": StepKernels(), "reorder_for_peak_memory": False}
    fresh = with_own_code(function)
    return torch.compile(fresh, fullgraph=True, dynamic=dynamic, options=options)


class Replayed:
    """A step that a CUDA graph runs: one launch for all of its kernels.

    torch.compile's own CUDA graphs take some hundred microseconds of the host for each run, more
    than the kernels of a small model take of the GPU.

    Args:
        run: from a list of tensors and some further ones to results, by kernels alone.
        moving: places in the list of those that are others at each call: the graph reads copies.
            The rest it reads and writes where they are, and is recorded anew where they move.
        written: the moving ones that a run writes to.

    The first run for some memory and some shapes launches its kernels by itself: it compiles, and
    libraries take what they need. The second is recorded. Results are the caller's own.
    """

    def __init__(
        self, run: Callable[..., Any], moving: Sequence[int], written: Sequence[int]
    ) -> None:
        self._run, self._moving, self._written = run, frozenset(moving), tuple(written)
        self._kept: tuple[int, ...] = ()
        self._tensors: dict[Any, list[Tensor]] = {}
        self._replays: dict[Any, Callable[[], Any]] = {}
        self._pool: Any = None

    def __call__(self, tensors: Sequence[Tensor], *numbers: Tensor) -> Any:
        """The results of the step, as `run` returns them."""
        kept = tuple(x.data_ptr() for i, x in enumerate(tensors) if i not in self._moving)
        if kept != self._kept:
            self._kept, self._tensors, self._replays = kept, {}, {}
        shapes = tuple(tensors[i].shape for i in self._moving)
        known = shapes in self._tensors
        if not known:
            self._tensors[shapes] = [
                torch.empty_like(x) if i in self._moving else x for i, x in enumerate(tensors)
            ]
        own = self._tensors[shapes]
        for i in self._moving:
            own[i].copy_(tensors[i])
        if known and shapes not in self._replays:
            run = functools.partial(self._run, own, *numbers)
            self._replays[shapes] = self._record(run, [*own, *numbers])
        results = self._replays[shapes]() if known else self._run(own, *numbers)
        for i in self._written:
            tensors[i].copy_(own[i])
        return pytree.tree_map_only(Tensor, torch.clone, results) if known else results

    def _record(self, run: Callable[[], Any], tensors: Sequence[Tensor]) -> Callable[[], Any]:
        """A graph of `run`; where there can be none, `run`."""
        devices = {x.device for x in tensors}
        if len(devices) > 1:
            return _unrecorded(run, f"its tensors are on {', '.join(sorted(map(str, devices)))}")
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            return recorded(run, devices.pop(), self._pool)
        except RuntimeError as error:
            return _unrecorded(run, str(error).partition("\n")[0])


def recorded(run: Callable[[], Any], device: torch.device, pool: Any = None) -> Callable[[], Any]:
    """What replays a run as a CUDA graph and gives its results, in the same memory each time.

    Raises:
        RuntimeError: the run asks the GPU for a number, or the like; nothing has run.
    """
    graph, outer = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    # other threads may go on: a loader of data calls the driver, too
    capture = torch.cuda.graph(graph, pool, _stream(device), "thread_local")
    try:
        with torch.cuda.device(device), capture:
            results = run()
    except RuntimeError:
        # a capture that fails leaves its own stream behind
        torch.cuda.set_stream(outer)
        raise

    def replay() -> Any:
        graph.replay()
        return results

    return replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs of a device are recorded: libraries take memory for each stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _unrecorded(run: Callable[[], Any], reason: str) -> Callable[[], Any]:
    warnings.warn(f"a step runs without a CUDA graph: {reason}", stacklevel=4)
    return run


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own: dynamo counts recompilations by it."""
    code, names = function.__code__.replace(), function.__globals__
    return types.FunctionType(code, names, function.__name__, closure=function.__closure__)


@functools.cache
def replays(mode: str) -> bool:
    """Whether a mode of torch.compile asks for CUDA graphs."""
    return bool(torch._inductor.list_mode_options(mode).get("triton.cudagraphs"))


def stay_in_place(tensors: Iterable[Tensor]) -> None:
    """Tells torch.compile's own CUDA graphs that tensors keep their memory between runs.

    A graph then reads and writes them where they are. Of what it is not told, it keeps copies, and
    it refuses to write to it: parameters are known to stay, the buffers of batch norm are not.
    """
    for x in tensors:
        torch._dynamo.mark_static_address(x)  # type: ignore[no-untyped-call]
