"""Exported: what torch.export gives becomes a program, its ends named as the user names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.export.exported_program import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    InputSpec,
    OutputKind,
)
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .explain import no_tensor
from .hazards import source_of, user_line
from .parts import Model, dotted, named_state, names_in_exports, tied_names
from .program import OutSpec, Program, Slot, identifier, op_name, rename, value
from .sizes import Sym
from .subgraph import adopt

ROOT = "_model_"  # what the wrapper of a model calls it

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


def adopted(exported: ExportedProgram, model: Model, paths: list[str]) -> Program:
    """A program of what was exported, its inputs named by `paths`."""
    graph = fx.Graph()
    results: Any = graph.graph_copy(exported.graph, {})
    _mark_sources(graph)
    state = named_state(model, "parameter") | named_state(model, "buffer")
    aliases = tied_names(state)
    names = {old: aliases.get(new, new) for old, new in names_in_exports(state).items()} | aliases
    inputs, plain = _inputs(graph, exported, iter(paths), names)
    nodes, slots, leaves = _outputs(results, exported, inputs, names)
    graph.output(tuple(nodes))
    _rename(graph, {node: identifier(_qualified(slot.name)) for slot, node in inputs.items()})
    adopt(graph, exported.graph_module, _tidy_inner)
    return Program(
        graph,
        tuple(inputs),
        tuple(slots),
        OutSpec(exported.call_spec.out_spec, tuple(leaves)),
        getattr(model, "__qualname__", type(model).__name__),
        {s.name: exported.constants[s.name] for s in inputs if s.kind == "constant"},
        aliases,
        plain=plain,
    )


def _tidy_inner(graph: fx.Graph, names: list[str]) -> None:
    """Names and sources in a program that a higher-order op calls."""
    _mark_sources(graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    _rename(graph, dict(zip(inputs, names, strict=True)))


def _rename(graph: fx.Graph, inputs: Mapping[fx.Node, str]) -> None:
    """Inputs get the names given, ops that of the op, items of a result `<op>_out0`."""
    names = dict(inputs)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    rename(graph, names | {node: _tidy(node) for node in calls if node.target is not getitem})
    items = {node: node.args for node in calls if node.target is getitem}
    named = {node: node.name for node in graph.nodes if node not in items}
    rename(graph, named | {n: f"{source.name}_out{i}" for n, (source, i) in items.items()})  # type: ignore


def _tidy(node: fx.Node) -> str:
    """The op's name without what only torch's internals need."""
    name = op_name(node).removesuffix("_functional").removesuffix("_no_training")
    name = name.removesuffix("_impl")
    return name.removesuffix("_legit").removeprefix("native_")


def _mark_sources(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        _mark_source(node)
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # what it asserts holds for every call of this program


def _mark_source(node: fx.Node) -> None:
    if isinstance(value(node), Sym):
        return  # torch's own passes read sizes, not a line of the user's
    if source := source_of(node):
        node.meta["source"] = source
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    node.meta["module"] = _qualified(modules[-1][0]) if modules else ""


def _qualified(target: str) -> str:
    """Takes the name that Root gave the whole model off a qualified name."""
    return target.removeprefix(f"{ROOT}.") if target != ROOT else ""


def _inputs(
    graph: fx.Graph, exported: ExportedProgram, paths: Iterator[str], names: dict[str, str]
) -> tuple[dict[Slot, fx.Node], dict[str, Any]]:
    """The placeholders that stay, by what they stand for, and plain arguments by their names."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs: dict[Slot, fx.Node] = {}
    plain: dict[str, Any] = {}
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        slot = _input_slot(node, spec, paths, names)
        if not isinstance(spec.arg, ConstantArgument) and slot not in inputs:
            inputs[slot] = node
            continue
        if slot not in inputs:
            plain[slot.name] = getattr(spec.arg, "value", None)
        node.replace_all_uses_with(inputs.get(slot, plain.get(slot.name)))
        graph.erase_node(node)
    return inputs, plain


def _input_slot(
    node: fx.Node, spec: InputSpec, paths: Iterator[str], names: dict[str, str]
) -> Slot:
    if spec.kind not in _INPUT_KINDS:
        kind = getattr(spec.arg, "class_fqn", spec.kind.name)
        where = user_line(next(iter(node.users), node))
        raise CaptureError(f"{where}\n  {no_tensor(kind)}")
    kind = _INPUT_KINDS[spec.kind]
    if kind == "input":
        return Slot(kind, next(paths))
    if kind == "constant":
        return Slot(kind, spec.target or "")
    name = _qualified(spec.target or "")
    return Slot(kind, names.get(name, name))


def _outputs(
    results: Sequence[Any],
    exported: ExportedProgram,
    inputs: dict[Slot, fx.Node],
    names: dict[str, str],
) -> tuple[list[fx.Node], list[Slot], list[tuple[bool, Any]]]:
    signature = exported.graph_signature
    out_spec = exported.call_spec.out_spec
    paths, _ = pytree.tree_flatten_with_path(
        pytree.tree_unflatten(range(out_spec.num_leaves), out_spec)
    )
    out_names = iter([dotted("out", path) for path, _ in paths])
    named = {node.name: slot.name for slot, node in inputs.items()}
    given = [spec for spec in signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    if len(given) > len(paths):
        raise CaptureError("The model returns a tensor of a subclass; let it return a plain one.")
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
            slots.append(Slot(kind, names.get(name, name)))
    return nodes, slots, leaves
