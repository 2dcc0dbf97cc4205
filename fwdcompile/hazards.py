"""Hazards of capture: what torch.export would lose without a word is kept, or refused."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import getitem
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._ops import OpOverload
from torch.export.exported_program import ExportedProgram
from torch.fx.proxy import TracerBase
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import rule
from .errors import CaptureError
from .program import is_differentiable, is_random, value

aten = torch.ops.aten

_HERE = str(Path(__file__).parent) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_CAPTURE = f"{_HERE}capture.py"
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
_FRAME = re.compile(r'File "(.+?)", line (\d+), in .*(?:\n    (.*))?')


def is_user_file(path: str) -> bool:
    """Whether code is neither torch's nor ours."""
    return not path.startswith((_TORCH, _HERE, "<"))


def user_frame(frames: Sequence[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    """The innermost frame of the model's own code, that is, outside torch and inside capture."""
    for frame in reversed(frames):
        if frame.filename == _CAPTURE:
            return None
        if is_user_file(frame.filename):
            return frame
    return None


@contextmanager
def user_source_lines() -> Iterator[None]:
    """Makes torch record the innermost user frame of each op, not only frames named forward."""

    def keep(_: TracerBase, frames: traceback.StackSummary) -> traceback.StackSummary:
        frame = user_frame(frames)
        return traceback.StackSummary.from_list([frame] if frame else [])

    with mock.patch.object(TracerBase, "_filter_traceback_frames", keep):
        yield


def line_of(frame: traceback.FrameSummary | None) -> str:
    """A frame's line, as messages show it."""
    return f"{frame.filename}:{frame.lineno}: {frame.line}" if frame else "unknown line"


def here() -> str:
    """The user's line that led to the function which asks."""
    return line_of(user_frame(traceback.extract_stack()[:-2]))


@contextmanager
def known_shapes() -> Iterator[None]:
    """Tells torch the output shapes that only `rule.shapes` knows, as long as it captures."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for op, empty in rule.shapes.items():
            name: str = op.name()  # type: ignore[no-untyped-call]
            library._register_fake(name.removeprefix("aten::"), empty, allow_override=True)
        yield


@contextmanager
def kept_random_ops() -> Iterator[None]:
    """Keeps random ops that nothing uses: the stream of random numbers stays the model's."""
    eliminate = fx.Graph.eliminate_dead_code

    def kept(graph: fx.Graph, is_impure: Any = None) -> bool:
        impure = is_impure or fx.Node.is_impure
        return eliminate(graph, lambda node: is_random(node) or impure(node))

    with mock.patch.object(fx.Graph, "eliminate_dead_code", kept):
        yield


def source_of(node: fx.Node) -> tuple[str, int, str] | None:
    """The user's file, line and code that caused a node, where torch recorded them."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return None
    own = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    file, line, code = (own or frames)[-1]
    return "/".join(Path(file).parts[-2:]), int(line), code.strip()


def refuse_hidden_writes(exported: ExportedProgram) -> None:
    """Refuses `detach_`, and writes in place that reach a tensor through `detach`.

    Both part a tensor's value from its tangent, which a functional program has no op for: capture
    would drop the first and take the value after the second for a constant.

    Raises:
        CaptureError: with the user's line.
    """
    buffers = exported.graph_signature.inputs_to_buffers
    modules = [m for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]
    for node in (node for module in modules for node in module.graph.nodes):
        if node.target is aten.detach_.default and not _is_new(node.args[0]):
            raise _taken_off(user_line(node))
        for written in written_by_node(node):
            detached, origin = _origin(written)
            if detached and origin.name not in buffers and is_differentiable(value(written)):
                raise _hidden(node.target, user_line(node))


class _HiddenWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at ops as they run, and refuses a write to memory that a detached tensor shares."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._detached: dict[int, Any] = {}  # storages by address, kept so that none is used again

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for x in written_by(func, args, kwargs):
            if is_differentiable(x) and x.untyped_storage()._cdata in self._detached:
                raise _hidden(func, here())
        detaches = func is aten.detach.default
        if detaches and not torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD):
            return aten.alias.default(*args)  # autograd itself, as it keeps a result for backward
        out = func(*args, **kwargs)
        if detaches:
            storage = out.untyped_storage()
            self._detached[storage._cdata] = storage
        return out


@contextmanager
def refused_hidden_writes() -> Iterator[None]:
    """`refuse_hidden_writes` for what is recorded below autograd, into a program without writes.

    `Tensor.detach_` is no op there, and is refused where Python calls it.
    """
    with mock.patch.object(torch.Tensor, "detach_", _detach_), _HiddenWrites():
        yield


def _detach_(x: torch.Tensor) -> None:
    raise _taken_off(here())


def literals_of(exported: ExportedProgram) -> frozenset[str]:
    """The constants that a model makes of numbers, and no one else can change."""
    names = {spec.arg.name: str(spec.target) for spec in exported.graph_signature.input_specs}
    nodes = exported.graph.find_nodes(op="placeholder")
    made = (node for node in nodes if node.users and all(map(_is_new, node.users)))
    return frozenset(names[node.name] for node in made)


def _is_new(node: fx.Node) -> bool:
    """Whether this is torch.tensor(...) in the model, which torch itself detaches in place."""
    return node.target in (aten.lift_fresh.default, aten.lift_fresh_copy.default)


def user_line(node: fx.Node) -> str:
    """The user's line that caused a node, as messages show it."""
    file, line, code = source_of(node) or ("unknown file", 0, "")
    return f"{file}:{line}: {code}"


def _taken_off(where: str) -> CaptureError:
    instead = "Use x = x.detach() and write to the result."
    return _told(where, aten.detach_.default, "takes the tangent off a tensor", instead)


def _hidden(op: Any, where: str) -> CaptureError:
    effect = "changes the value of a tensor, through a detached one, but not its tangent"
    instead = "Use x.detach().clone() and write to the result."
    if op is aten.embedding_renorm_.default:
        instead = "Leave max_norm out and bound the rows yourself, in a copy or between the steps."
    return _told(where, op, effect, instead)


def _told(where: str, op: Any, effect: str, instead: str) -> CaptureError:
    return CaptureError(
        f"{where}\n  {op} {effect}, in place: a captured program cannot say that.\n  {instead}"
    )


def written_by_node(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node's op writes to."""
    written: list[fx.Node] = []
    if node.op == "call_function":
        fx.map_arg(written_by(node.target, node.args, node.kwargs), written.append)
    return written


def written_by(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> list[Any]:
    """The tensors among the arguments of an op that it writes to."""
    if not isinstance(op, OpOverload) or not op._schema.is_mutable:
        return []
    arguments = op._schema.arguments
    given = dict(zip((a.name for a in arguments), args, strict=False)) | dict(kwargs or {})
    written = (a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return pytree.tree_leaves([given[name] for name in written if name in given])


def _origin(node: fx.Node) -> tuple[bool, fx.Node]:
    """Follows views back to the tensor that owns the memory; whether a detach is on the way.

    A result of a torch.autograd.Function is followed into its forward, whose inputs are detached.
    """
    detached = False
    while node.args and isinstance(source := node.args[0], fx.Node):
        if source.target is torch.ops.fwdcompile.attached.default:
            node = source.args[0][node.args[1]].args[0]  # type: ignore
            continue
        views = node.target is getitem
        if isinstance(node.target, OpOverload):
            views = any(result.alias_info is not None for result in node.target._schema.returns)
        if not views:
            break
        detached |= node.target is aten.detach.default
        node = source
    return detached, node
