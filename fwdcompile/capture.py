"""Capture: a model and example inputs become one functional ATen graph, by `torch.export`."""

from __future__ import annotations

import inspect
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from operator import getitem
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.export.exported_program import ExportedProgram, default_decompositions
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    InputSpec,
    OutputKind,
)
from torch.fx.proxy import TracerBase
from torch.utils import _pytree as pytree

from . import rule
from .errors import CaptureError
from .objective import Objective
from .program import OutSpec, Program, Slot, identifier, op_name, rename

Model = Callable[..., Any]

_HERE = str(Path(__file__).parent) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_ROOT = "_model_"
_FRAME = re.compile(r'File "(.+?)", line (\d+), in .*(?:\n    (.*))?')

_INPUT_KINDS: Mapping[InputKind, Any] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "input",
}
_OUTPUT_KINDS: Mapping[OutputKind, Any] = {
    OutputKind.USER_OUTPUT: "output",
    OutputKind.BUFFER_MUTATION: "buffer",
    OutputKind.USER_INPUT_MUTATION: "input",
}


def capture(model: Model, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Program:
    """Captures `model(*args, **kwargs)` as a flat functional program.

    Ops that have a row in the rule table stay whole, all others are lowered until rows are met.
    In-place changes of buffers and inputs become extra outputs. Nothing is computed: inputs are
    replaced by fakes of the same shape, dtype and device, and no random number is drawn.

    Args:
        model: a module or a function of tensors and pytrees of tensors.
        args: example positional arguments.
        kwargs: example keyword arguments.

    Raises:
        CaptureError: the model branches on data, uses a torch.autograd.Function, or fails; the
            message names the user's line.

    Example:
        >>> capture(torch.tanh, (torch.zeros(3),), {}).graph.print_tabular()
    """
    root = Root(model)
    exported = _export(root, *_distinct(model, args, kwargs))
    paths = [path for path, _ in input_leaves(model, args, kwargs)]
    return _program(exported, root, paths)


class Root(nn.Module):
    """Wraps a module or function, so that both are captured alike.

    Modules that a function closes over, or whose method it is, become submodules: their
    parameters then are parameters of the program and not constants frozen into it.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        for name, module in modules_of(model).items():
            self.add_module(name or _ROOT, module)
        self._called = (model,)

    @property
    def model(self) -> Model:
        """What was wrapped, hidden in a tuple so that it is not registered a second time."""
        return self._called[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model and registers dataclasses that it returns."""
        out = self.model(*args, **kwargs)
        register_dataclasses(out)
        return out


def modules_of(model: Model) -> dict[str, nn.Module]:
    """The modules a model consists of, by the prefix of their parameters' names."""
    if isinstance(model, nn.Module):
        return {"": model}
    if isinstance(model, Objective):
        loss = modules_of(model.loss_fn) if model.loss_fn else {}
        prefixed = {f"loss_fn_{name}".rstrip("_"): module for name, module in loss.items()}
        return modules_of(model.model) | prefixed
    found: dict[str, nn.Module] = {}
    if isinstance(owner := getattr(model, "__self__", None), nn.Module):
        found[""] = owner
    function = inspect.unwrap(getattr(model, "__func__", model))
    if inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        for name, thing in (*variables.nonlocals.items(), *variables.globals.items()):
            if isinstance(thing, nn.Module):
                found[name] = thing
    return found


def named_state(model: Model, kind: str) -> dict[str, Tensor]:
    """Parameters or buffers by qualified name; a tied one appears under each of its names."""
    state: dict[str, Tensor] = {}
    for prefix, module in modules_of(model).items():
        walk = module.named_parameters if kind == "parameter" else module.named_buffers
        state.update(walk(prefix=prefix, remove_duplicate=False))
    return state


def input_leaves(
    model: Model, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Names each leaf of the inputs by its argument and path: `x`, `batch.image`, `pair.0`."""
    register_dataclasses((args, kwargs))
    positional = _positional_names(model, len(args))
    leaves, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    named = []
    for path, leaf in leaves:
        group, place = (_step(key) for key in path[:2])
        first = positional[place] if group == 0 else place
        named.append((_dotted(first, path[2:]), leaf))
    return named


def register_dataclasses(tree: Any) -> None:
    """Teaches pytree every dataclass found in `tree`, so that its fields are seen."""
    for leaf in pytree.tree_leaves(tree):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            register_dataclasses(leaf)


def user_frame(frames: Sequence[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    """The innermost frame of the model's own code, that is, outside torch and inside capture."""
    for frame in reversed(frames):
        if frame.filename.startswith(_HERE):
            return None
        if not frame.filename.startswith((_TORCH, "<")):
            return frame
    return None


def _distinct(
    model: Model, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs with every tensor an object of its own: export takes equal objects for one."""
    state = named_state(model, "parameter") | named_state(model, "buffer")
    seen = {id(x) for x in state.values()}

    def fresh(x: Tensor) -> Tensor:
        if id(x) in seen:
            return torch.empty_like(x, requires_grad=x.requires_grad)
        seen.add(id(x))
        return x

    inputs = (tuple(args), dict(kwargs))
    distinct: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, fresh, inputs)
    return distinct


def _positional_names(model: Model, count: int) -> list[str]:
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        signature = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return [f"arg{i}" for i in range(count)]
    names = [p.name for p in signature if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in signature if p.kind is p.VAR_POSITIONAL), "arg")
    return [*names, *(f"{rest}.{i}" for i in range(count - len(names)))][:count]


def _dotted(first: str, path: Sequence[Any]) -> str:
    return ".".join([first, *(str(_step(key)) for key in path)])


def _step(key: Any) -> Any:
    """The index, dict key or field name that one entry of a pytree path holds."""
    return next(getattr(key, name) for name in ("idx", "key", "name") if hasattr(key, name))


def _export(root: Root, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            stack.enter_context(_user_source_lines())
            stack.enter_context(_refuse_autograd_functions())
            exported = torch.export.export(root, args, kwargs, strict=False)
            lowering = default_decompositions()
            for op in rule.table:
                lowering.pop(op, None)  # type: ignore[no-untyped-call]
            for op, lower in rule.lowerings.items():
                lowering[op] = lower
            lowered: ExportedProgram = exported.run_decompositions(lowering)
            return lowered
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(_explain(error)) from error


@contextmanager
def _user_source_lines() -> Iterator[None]:
    """Makes torch record the innermost user frame of each op, not only frames named forward."""

    def keep(_: TracerBase, frames: traceback.StackSummary) -> traceback.StackSummary:
        frame = user_frame(frames)
        return traceback.StackSummary.from_list([frame] if frame else [])

    with mock.patch.object(TracerBase, "_filter_traceback_frames", keep):
        yield


@contextmanager
def _refuse_autograd_functions() -> Iterator[None]:
    original = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.startswith("torch."):
            return original(cls, *args, **kwargs)
        frame = user_frame(traceback.extract_stack()[:-1])
        where = f"{frame.filename}:{frame.lineno}: {frame.line}" if frame else "unknown line"
        raise CaptureError(
            f"{where}\n  {cls.__qualname__} is a torch.autograd.Function: capture would inline its "
            "forward and drop its own derivative.\n  Write it as plain torch ops, or make it a "
            "torch.library.custom_op and give that op a row with fwdcompile.rule.jvp."
        )

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)):
        yield


def _explain(error: Exception) -> str:
    frame = user_frame(traceback.extract_tb(error.__traceback__))
    where = f"{frame.filename}:{frame.lineno}: {frame.line}\n  " if frame else ""
    text = str(error).strip().split("\n")[0]
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        return (
            f"{where}The model decides in Python by the value of a tensor ({text}).\n  A program "
            "has one path for all values: use torch.where or torch.cond, or move the decision out "
            "of the model."
        )
    return f"{where}The model cannot be captured: {type(error).__name__}: {text}"


def _program(exported: ExportedProgram, root: Root, paths: list[str]) -> Program:
    graph = fx.Graph()
    results: Any = graph.graph_copy(exported.graph, {})
    for node in list(graph.nodes):
        _mark_source(node)
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # what it asserts holds for every call of this program
    aliases = _aliases(root.model)
    inputs = _inputs(graph, exported, iter(paths), aliases)
    nodes, slots, leaves = _outputs(results, exported, inputs, aliases)
    graph.output(tuple(nodes))
    _rename(graph, inputs)
    return Program(
        graph,
        tuple(inputs),
        tuple(slots),
        OutSpec(exported.call_spec.out_spec, tuple(leaves)),
        getattr(root.model, "__qualname__", type(root.model).__name__),
        {s.name: exported.constants[s.name] for s in inputs if s.kind == "constant"},
        aliases,
    )


def _rename(graph: fx.Graph, inputs: Mapping[Slot, fx.Node]) -> None:
    """Inputs get their slot's name, ops that of the op, items of a result `<op>_out0`."""
    names = {node: identifier(_qualified(slot.name)) for slot, node in inputs.items()}
    calls = [node for node in graph.nodes if node.op == "call_function"]
    rename(graph, names | {node: _tidy(node) for node in calls if node.target is not getitem})
    items = {node: node.args for node in calls if node.target is getitem}
    named = {node: node.name for node in graph.nodes if node not in items}
    rename(graph, named | {n: f"{source.name}_out{i}" for n, (source, i) in items.items()})  # type: ignore


def _tidy(node: fx.Node) -> str:
    """The op's name without what only torch's internals need."""
    name = op_name(node).removesuffix("_functional").removesuffix("_no_training")
    return name.removesuffix("_legit").removeprefix("native_")


def _mark_source(node: fx.Node) -> None:
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if frames:
        file, line, code = frames[-1]
        node.meta["source"] = ("/".join(Path(file).parts[-2:]), int(line), code.strip())
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    node.meta["module"] = _qualified(modules[-1][0]) if modules else ""


def _qualified(target: str) -> str:
    """Takes the name that Root gave the whole model off a qualified name."""
    return target.removeprefix(f"{_ROOT}.") if target != _ROOT else ""


def _aliases(model: Model) -> dict[str, str]:
    """Each further name of a tied parameter or buffer, with the name it was first met by."""
    state = named_state(model, "parameter") | named_state(model, "buffer")
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: first[id(t)] for name, t in state.items() if first[id(t)] != name}


def _inputs(
    graph: fx.Graph, exported: ExportedProgram, names: Iterator[str], aliases: dict[str, str]
) -> dict[Slot, fx.Node]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs: dict[Slot, fx.Node] = {}
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        slot = _input_slot(spec, names, aliases)
        if not isinstance(spec.arg, ConstantArgument) and slot not in inputs:
            inputs[slot] = node
            continue
        constant = getattr(spec.arg, "value", None)
        node.replace_all_uses_with(inputs.get(slot, constant))
        graph.erase_node(node)
    return inputs


def _input_slot(spec: InputSpec, names: Iterator[str], aliases: dict[str, str]) -> Slot:
    if spec.kind not in _INPUT_KINDS:
        raise CaptureError(f"inputs of kind {spec.kind.name} are not supported: {spec}")
    kind = _INPUT_KINDS[spec.kind]
    if kind == "input":
        return Slot(kind, next(names))
    if kind == "constant":
        return Slot(kind, spec.target or "")
    name = _qualified(spec.target or "")
    return Slot(kind, aliases.get(name, name))


def _outputs(
    results: Sequence[Any],
    exported: ExportedProgram,
    inputs: dict[Slot, fx.Node],
    aliases: dict[str, str],
) -> tuple[list[fx.Node], list[Slot], list[tuple[bool, Any]]]:
    signature = exported.graph_signature
    out_spec = exported.call_spec.out_spec
    paths, _ = pytree.tree_flatten_with_path(
        pytree.tree_unflatten(range(out_spec.num_leaves), out_spec)
    )
    out_names = iter([_dotted("out", path) for path, _ in paths])
    named = {node.name: slot.name for slot, node in inputs.items()}
    nodes, slots, leaves = [], [], []
    for result, spec in zip(results, signature.output_specs, strict=True):
        if spec.kind not in _OUTPUT_KINDS:
            raise CaptureError(f"outputs of kind {spec.kind.name} are not supported: {spec}")
        kind = _OUTPUT_KINDS[spec.kind]
        target = spec.target or ""
        name = named[target] if kind == "input" else _qualified(target)
        if kind == "output":
            name = next(out_names)
            leaves.append((True, name) if isinstance(result, fx.Node) else (False, result))
        if isinstance(result, fx.Node):
            nodes.append(result)
            slots.append(Slot(kind, aliases.get(name, name)))
    return nodes, slots, leaves
