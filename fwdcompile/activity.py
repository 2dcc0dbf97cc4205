"""Activity perturbation: directions for what layers put out, gradients from what they take in.

A direction in the outputs of a layer has fewer dimensions than one in its weights, and each example
of a batch has its own: the estimate is far less noisy (Ren, Kornblith, Liao and Hinton, "Scaling
forward gradient with local losses", 2023, section 3). With y = x W' and e the direction of y, the
forward gradient of y is u = (d f / d e) e, and that of W is u' x: the layer's own chain rule.
Where a rectifier follows, u passes through that, too: a unit that is off has the gradient zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from . import rule
from .apply import through
from .errors import LossError
from .forward import StepForward
from .lowered import Lowered
from .parts import Model
from .program import (
    Program,
    Slot,
    identifier,
    origin,
    output_nodes,
    outputs_reached,
    rename,
    value,
)
from .request import Request
from .trace import Recorder, bind_call, fake_mode, label
from .transform import transform

aten = torch.ops.aten
_OUTPUT = ".output"
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """One product by a trained weight, whose output is perturbed.

    Attributes:
        node: name of the node in the captured graph and in the transformed one.
        gates: names of the rectifiers that follow it, in order.
        slot: name of the tangent input that is the output's direction.
        parameters: by argument of the op, the names of the parameters that get a gradient.
    """

    node: str
    gates: tuple[str, ...]
    slot: str
    parameters: Mapping[str, str]


def _linear(u: Tensor, call: Mapping[str, Any]) -> Gradients:
    u, x = u.flatten(0, -2), call["input"].flatten(0, -2)
    return {"weight": u.mT @ x, "bias": u.sum(0)}


def _convolution(u: Tensor, call: Mapping[str, Any]) -> Gradients:
    x, weight = call["input"], call["weight"]
    options = [call[name] for name in ("stride", "padding", "dilation")]
    shape = [False, [0] * (x.ndim - 2), call["groups"], [False, True, True]]
    sizes = [weight.shape[0]]
    _, *gradients = aten.convolution_backward(u, x, weight, sizes, *options, *shape)
    return dict(zip(("weight", "bias"), gradients, strict=True))


def _embedding(u: Tensor, call: Mapping[str, Any]) -> Gradients:
    rows = call["weight"].shape[0]
    options = [call[name] for name in ("padding_idx", "scale_grad_by_freq")]
    return {"weight": aten.embedding_dense_backward(u, call["indices"], rows, *options)}


# The gradients of an op's parameters, from that of its output and its arguments.
_GRADIENTS: dict[Any, Callable[[Tensor, Mapping[str, Any]], Gradients]] = {
    aten.linear.default: _linear,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.embedding.default: _embedding,
}
# Their derivative is zero or one, and so its own square: it takes the noise out of what is zero.
_GATES = {
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.threshold.default,
    aten.hardshrink.default,
    aten.softshrink.default,
}
_BATCHED = {aten.linear.default: 2, aten.embedding.default: 2}


def perturb(program: Program, trained: Collection[str]) -> tuple[Program, list[Layer]]:
    """Adds an input to the output of every layer that a trained parameter belongs to.

    Args:
        program: a captured program.
        trained: names of parameters. Those that are read otherwise than as the weight or bias of
            linear layers, convolutions and embeddings, cast or not, belong to no layer.

    Returns:
        A program with further inputs `<node>.output`, which count as zero and only have tangents,
        and the layers.
    """
    program = program.copy()
    graph = program.graph
    owned: dict[Any, str] = {}
    for parameter, slot in program.placeholders():
        forms = {parameter, *filter(_is_cast, parameter.users)}
        readers = {user for form in forms for user in form.users} - forms
        if slot.name in trained and all(_has_for_weight(reader, forms) for reader in readers):
            owned |= dict.fromkeys(forms, slot.name)
    layers, slots = [], []
    for node in [n for n in graph.nodes if _is_layer(n)]:
        bound = bind_call(node.target, node.args, node.kwargs)
        known = ((arg, bound.get(arg)) for arg in ("weight", "bias"))
        parameters = {arg: owned[x] for arg, x in known if x in owned}
        if parameters:
            gates = tuple(gate.name for gate in _gates(node))
            layers.append(Layer(node.name, gates, f"{node.name}{_OUTPUT}", parameters))
            slots.append(Slot("input", layers[-1].slot))
            _shift(graph, node)
    return replace(program, inputs=(*program.inputs, *slots)), layers


def _is_cast(node: fx.Node) -> bool:
    return node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}


def _has_for_weight(node: fx.Node, forms: Collection[fx.Node]) -> bool:
    """Whether this is a layer that takes none of the forms of a parameter for its data."""
    if not _is_layer(node):
        return False
    bound = bind_call(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    return bound.get("input", bound.get("indices")) not in forms


def _is_layer(node: fx.Node) -> bool:
    """Whether this is a product of a batch by a weight."""
    if node.target not in _GRADIENTS:
        return False
    op: Any = node.target
    weight = bind_call(op, node.args, node.kwargs)["weight"]
    return bool(value(node).ndim >= _BATCHED.get(op, value(weight).ndim))


def _gates(node: fx.Node) -> list[fx.Node]:
    """Functions of slope zero or one, each the only user of the one before."""
    users = list(node.users)
    return [users[0], *_gates(users[0])] if len(users) == 1 and users[0].target in _GATES else []


def _shift(graph: fx.Graph, node: fx.Node) -> None:
    """Writes y + shift for the users of y; the sum takes the name of y."""
    name, after = node.name, list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(after):
        shift = graph.placeholder(f"{name}_shift")
    with graph.inserting_after(node):
        total = graph.call_function(aten.add.Tensor, (node, shift))
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    shift.meta["val"] = total.meta["val"] = value(node)
    total.meta |= origin(node)
    rename(graph, {total: name, node: f"{name}_of_input"})


def settle_shifts(program: Program, layers: Sequence[Layer]) -> Program:
    """Takes the shifts out of a transformed program: as primals they are zero."""
    slots = {layer.slot for layer in layers}
    kept, names = [], {}
    for node, slot in list(program.placeholders()):
        if slot.kind != "input" or slot.name not in slots:
            kept.append(slot)
            continue
        (total,) = node.users
        product = total.args[0]
        names[product] = total.name
        total.replace_all_uses_with(product)  # type: ignore[arg-type]
        for gone in (total, node):
            program.graph.erase_node(gone)
    rename(program.graph, names)  # type: ignore[arg-type]
    return replace(program, inputs=tuple(kept))


def gradients(program: Program, layers: Sequence[Layer], clip: float | None = None) -> Program:
    """Appends the gradients of the layers' parameters, means over the directions of each.

    A loss is a number, or holds one number for each example: its mean is then what is
    differentiated, and an output whose first dimension is that of the examples takes from each
    only its own loss. Of several losses a layer takes those that depend on it.
    """
    graph, out = program.graph, program.graph.output_node()
    recorder = Recorder(graph, fake_mode(graph), keep=rule.table)
    inputs = {(s.name, s.direction): n for n, s in program.placeholders() if s.kind == "tangent"}
    slopes = {(s.name, s.direction): n for n, s in program.results() if s.kind == "tangent"}
    reached = outputs_reached(program)
    dtypes = {slot.name: value(node).dtype for node, slot in program.placeholders()}
    nodes = {node.name: node for node in graph.nodes}
    found: dict[str, Tensor] = {}
    for layer in (layer for layer in layers if reached[layer.slot]):
        before = out.prev
        with graph.inserting_before(out), recorder.active():
            own = [k for name, k in inputs if name == layer.slot]
            terms = [
                _weighted(
                    recorder.fake(inputs[layer.slot, k]), recorder.fake(slopes[name, k]), clip
                )
                for k in own
                for name in reached[layer.slot]
            ]
            u = sum(terms[1:], terms[0])
            node = nodes[layer.node]
            bound = bind_call(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
            u = u if len(own) == 1 else u / len(own)
            for name in reversed(layer.gates):
                u = through(nodes[name], u, recorder)
            grads = _GRADIENTS[node.target](u, fx.map_arg(bound, recorder.fake))  # type: ignore
            for argument, name in layer.parameters.items():
                new = grads[argument].to(dtypes[name])
                found[name] = found[name] + new if name in found else new
        out.meta |= origin(node)
        label(out, before)
    results = {recorder.node(x): name for name, x in found.items()}
    for result in results:
        result.meta["role"] = "tangent"
    rename(graph, {node: f"{identifier(name)}_grad" for node, name in results.items()})
    graph.output((*output_nodes(graph), *results))
    graph.erase_node(out)
    slots = tuple(Slot("gradient", name) for name in results.values())
    return replace(program, outputs=program.outputs + slots)


def _weighted(direction: Tensor, slope: Tensor, clip: float | None) -> Tensor:
    slope = slope if clip is None else slope.clamp(-clip, clip)
    if slope.ndim and direction.shape[0] == slope.shape[0]:
        each = slope / slope.shape[0]
        return direction * each.view(-1, *[1] * (direction.ndim - 1))
    return direction * (slope.mean() if slope.ndim else slope)


class ActivityForward(StepForward):
    """A program of an objective that returns gradients by activity perturbation beside the loss."""

    def __init__(
        self, model: Model, clip: float | None = None, samples: Sequence[int] | None = None
    ) -> None:
        super().__init__(model)
        self.clip, self.samples = clip, samples

    def _transformed(self, captured: Program, request: Request) -> Program:
        active = list(request.ways)
        perturbed, layers = perturb(captured, active)
        owned = {name for layer in layers for name in layer.parameters.values()}
        names = [name for name in active if name not in owned]
        outer = [name for name in request.rank_one if name in names]
        moved = self._directions([layer.slot for layer in layers], names, len(request.moved))
        program = transform(perturbed, moved, len(request.moved), outer)
        return gradients(settle_shifts(program, layers), layers, self.clip)

    def _directions(
        self, shifted: list[str], names: list[str], count: int
    ) -> dict[str, Collection[int]]:
        """The directions in which each output and each parameter of no layer moves."""
        if self.samples is None:
            return {name: range(count) for name in (*names, *shifted)}
        groups = [[slot] for slot in shifted] + ([names] if names else [])
        if len(groups) != len(self.samples):
            layers = ", ".join(slot.removesuffix(_OUTPUT) for slot in shifted) or "(none is found)"
            others = f", and one number for {', '.join(names)}" if names else ""
            raise ValueError(
                f"samples has {len(self.samples)} numbers for {len(groups)}: one for each of the "
                f"layers {layers}{others}"
            )
        ends = list(itertools.accumulate(self.samples))
        return {
            name: range(end - own, end)
            for group, own, end in zip(groups, self.samples, ends, strict=True)
            for name in group
        }


@torch.no_grad()
def check_examples(lowered: Lowered, tensors: Sequence[Tensor]) -> bool:
    """Refuses losses of examples that depend on other examples: their gradients would be wrong.

    Moves the outputs of some examples and looks whether losses of others follow, for sets that part
    every two examples. It does so at other weights than the model's, where these give finite
    numbers: behind a head of zeros nothing follows.

    Returns:
        Whether the slopes were finite: others say nothing.

    Raises:
        LossError: they do, as with batch norm in training.
    """
    program = lowered.program
    losses = [value(node) for node, slot in program.results() if slot.kind == "output"]
    counts = {len(loss) for loss in losses if loss.ndim}
    if not counts:
        return True
    if len(counts) > 1:
        raise LossError(f"losses of examples have one length, not {sorted(counts)}")
    (count,) = counts
    kinds = [slot.kind for slot in program.inputs if slot.kind not in ("tangent", "constant")]
    with torch.random.fork_rng():
        pairs = zip(tensors, kinds, strict=True)
        elsewhere = [_moved(x) if kind == "parameter" else x for x, kind in pairs]
        known = _look(lowered, tensors, [torch.arange(count) < 1])
        if not _look(lowered, elsewhere, _parting(count)):
            known = _look(lowered, tensors, _parting(count))
    return known


def _look(lowered: Lowered, tensors: Sequence[Tensor], sets: Iterable[Tensor]) -> bool:
    """Looks whether losses follow examples of sets that they are not of; whether all is finite."""
    for moving in sets:
        slopes = _slopes(lowered, tensors, moving)
        if not all(slope.isfinite().all() for slope in slopes):
            return False
        if any(slope[~moving.to(slope.device)].any() for slope in slopes if slope.ndim):
            raise LossError(
                "the loss of one example depends on the activations of another (batch norm in "
                "training?), or the first dimension of a layer's output is not that of the "
                "examples: return the mean loss in place of one for each example."
            )
    return True


def _slopes(lowered: Lowered, tensors: Sequence[Tensor], moving: Tensor) -> list[Tensor]:
    """The slopes of all losses as the layers' outputs move at random for some examples."""
    program, plain, values = lowered.program, iter(tensors), []
    for node, slot in program.placeholders():
        if slot.kind == "tangent":
            like = value(node)
            dot = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
            if slot.name.endswith(_OUTPUT) and len(dot) == len(moving):
                dot[moving.to(dot.device)] = torch.randn_like(dot[moving.to(dot.device)])
            values.append(dot)
        elif slot.kind != "constant":
            values.append(next(plain))
    outs = lowered.function(*values)
    return [out for out, s in zip(outs, program.outputs, strict=True) if s.kind == "tangent"]


def _parting(count: int) -> Iterator[Tensor]:
    """Sets of examples, of which one has the first and not the second of every two."""
    numbers = torch.arange(count)
    for bit in range((count - 1).bit_length()):
        one = (numbers >> bit) % 2 == 1
        yield one
        yield ~one


def _moved(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x) if x.is_floating_point() else x
