"""Oracles for a model's program: torch.func.jvp, reverse mode by u'(Jv) = (J'u)'v, differences."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from nets import directions
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

import fwdcompile
from fwdcompile.lowered import Lowered
from fwdcompile.parts import inner_tensors, input_leaves
from fwdcompile.program import is_differentiable, is_random

# The torch that programs, pages and samples were reviewed with; the code runs on 2.11, too.
REVIEWED = torch.__version__.startswith("2.13.")
# float32 carries seven digits, of which sums over 640 million parameters lose three.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
# Torch's backward of hardsigmoid has 1/6 in float32, whatever its input.
ROUGH, ROUGH_TOLERANCE = torch.ops.aten.hardsigmoid.default, 1e-7
DIFFERENCE_TOLERANCE = 1e-6
# Of models that compute in float32 here and there, whatever their weights are.
NARROW_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A model with what it is called with: inputs, and a tangent for each of `named`."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, Tensor]
    dots: dict[str, Tensor]

    @staticmethod
    def of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Case:
        """Directions in all plain parameters and inputs that have a derivative."""
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs or {}))
        leaves = input_leaves(model, args, kwargs)
        inputs = {name: x for name, x in leaves if is_differentiable(x)}
        parameters = {n: p for n, p in model.named_parameters() if not inner_tensors(p)}
        named = parameters | inputs
        return Case(model, args, kwargs, named, directions(named))

    def outputs(self) -> Any:
        return self.model(*self.args, **self.kwargs)

    @property
    def dtype(self) -> torch.dtype:
        return next((x.dtype for x in self.named.values()), torch.float64)


@dataclass(frozen=True)
class Compared:
    """How far a program is from its oracle.

    Attributes:
        oracle: "jvp", "reverse" or "difference".
        primal_error: of outputs and buffers, relative to the largest number in each.
        error: of u'(Jv) = (J'u)'v, relative to the norm of the parts of (J'u)'v, one for each
            parameter and input; or of Jv, relative to its largest number, by the other oracles.
        tolerance: what `error` may be.
        narrow: the model has float64 weights and float32 results on the way.
        seconds: capture, transform, passes and printing.
        lowered: the program.
    """

    oracle: str
    primal_error: float
    error: float
    tolerance: float
    narrow: bool
    seconds: float
    lowered: Lowered = field(repr=False)

    def is_right(self, dtype: torch.dtype) -> bool:
        least = NARROW_TOLERANCE if self.narrow else 0.0
        primal = self.primal_error <= max(TOLERANCE[dtype], least)
        return primal and self.error <= max(self.tolerance, least)


def compare(case: Case, oracles: tuple[str, ...] = ("reverse",)) -> Compared:
    """Runs the generated program and an oracle on equal weights, inputs and random numbers.

    Args:
        case: buffers of its model are as after one call in the end.
        oracles: names of `ORACLES`; the first that does not refuse is asked. Reverse mode is
            always the first where random numbers are drawn: torch.func.jvp lays intermediate
            results out in other ways than the model, so that dropout hits other elements.
    """
    fwd = fwdcompile.transform(case.model)
    began = time.perf_counter()
    lowered = fwd.lower(*case.args, tangents=list(case.dots), **case.kwargs)
    seconds = time.perf_counter() - began
    graph = lowered.stages["capture"]
    if any(map(is_random, graph.nodes)):
        oracles = ("reverse", *oracles)
    before = _buffers(case.model)
    torch.manual_seed(5)
    with torch.no_grad():
        outs, tangents = fwd(*case.args, tangents=case.dots, **case.kwargs)
    after = _buffers(case.model)
    oracle, expected, error = _ask(case, oracles, before, _floats(tangents))
    pairs = [*zip(_tensors(outs), _tensors(expected), strict=True)]
    pairs += [(after[name], b) for name, b in _buffers(case.model).items()]
    primal_error = max((relative(a, b) for a, b in pairs), default=0.0)
    tolerance = DIFFERENCE_TOLERANCE if oracle == "difference" else TOLERANCE[case.dtype]
    if any(node.target is ROUGH for node in graph.nodes):
        tolerance = max(tolerance, ROUGH_TOLERANCE)
    narrow = case.dtype == torch.float64 and any(map(_is_narrow, graph.nodes))
    return Compared(oracle, primal_error, error, tolerance, narrow, seconds, lowered)


def _is_narrow(node: fx.Node) -> bool:
    x = node.meta.get("val")
    return node.op == "call_function" and isinstance(x, Tensor) and x.dtype == torch.float32


def _ask(
    case: Case, oracles: tuple[str, ...], buffers: dict[str, Tensor], tangents: list[Tensor]
) -> tuple[str, Any, float]:
    """The first oracle that does not refuse, the model's outputs, and the error."""
    for oracle in oracles:
        for name, buffer in case.model.named_buffers():
            buffer.detach().copy_(buffers[name])
        torch.manual_seed(5)
        try:
            return (oracle, *ORACLES[oracle](case, tangents))
        except (RuntimeError, NotImplementedError):
            if oracle is oracles[-1]:
                raise
    raise ValueError("no oracle was named")


def by_reverse(case: Case, tangents: list[Tensor]) -> tuple[Any, float]:
    """The model's outputs, and how far u'(Jv) is from (J'u)'v for a random u.

    Each gradient is dropped as soon as its product with the direction is taken, so that no two
    are in memory.
    """
    parts: list[Tensor] = []

    def take(x: Tensor, dot: Tensor) -> None:
        parts.append((x.grad * dot.conj()).sum().real)
        x.grad = None

    hooks = []
    for name, x in case.named.items():
        x.requires_grad_(True)
        dot = case.dots[name]
        hooks.append(x.register_post_accumulate_grad_hook(lambda x, dot=dot: take(x, dot)))
    outs = case.outputs()
    weights = [torch.randn_like(y) / y.numel() for y in _floats(outs)]
    forward = _inner(weights, tangents)
    total = _inner(weights, _floats(outs))
    if total.requires_grad:
        total.backward()
    for hook in hooks:
        hook.remove()
    reverse = torch.stack([total.new_zeros(()), *parts])
    return outs, float((forward - reverse.sum()).abs() / reverse.norm().clamp_min(1e-30))


def by_jvp(case: Case, tangents: list[Tensor]) -> tuple[Any, float]:
    """The model's outputs, and how far Jv is from that of torch.func.jvp."""
    state = dict(case.model.named_parameters())
    leaves, spec = pytree.tree_flatten((case.args, case.kwargs))
    places = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf)]
    names = [name for name in case.named if name not in state]

    def function(parameters: dict[str, Tensor], inputs: list[Tensor]) -> Any:
        changed = dict(zip(places, inputs, strict=True))
        flat = [changed.get(i, leaf) for i, leaf in enumerate(leaves)]
        return functional_call(case.model, parameters, *pytree.tree_unflatten(flat, spec))

    dots = ({name: case.dots[name] for name in state}, [case.dots[name] for name in names])
    outs, expected = torch.func.jvp(function, (state, [leaves[i] for i in places]), dots)
    pairs = zip(tangents, _floats(expected), strict=True)
    return outs, max((relative(a, b) for a, b in pairs), default=0.0)


def by_difference(case: Case, tangents: list[Tensor], step: float = 1e-6) -> tuple[Any, float]:
    """The model's outputs, and how far Jv is from central differences."""

    def moved(distance: float) -> list[Tensor]:
        for name, x in case.named.items():
            x += distance * case.dots[name]
        return [x.clone() for x in _floats(case.outputs())]

    with torch.no_grad():
        outs = case.outputs()
        plus, minus = moved(step), moved(-2 * step)
        moved(step)
    triples = zip(tangents, plus, minus, strict=True)
    return outs, max((relative(d, (a - b) / (2 * step)) for d, a, b in triples), default=0.0)


Oracle = Callable[[Case, list[Tensor]], tuple[Any, float]]
ORACLES: dict[str, Oracle] = {
    "jvp": by_jvp,
    "reverse": by_reverse,
    "difference": by_difference,
}


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the largest number of `b`.

    Infinities and NaNs must be at the same places. Values below 1e-30 count as zero.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    a, b = a.detach(), b.detach()
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return math.inf
    a, b = (x[finite].to(torch.complex128) for x in (a, b))
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if a.numel() else 0.0


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _floats(tree: Any) -> list[Tensor]:
    return [x for x in _tensors(tree) if is_differentiable(x)]


def _inner(weights: list[Tensor], tensors: list[Tensor]) -> Tensor:
    pairs = zip(weights, tensors, strict=True)
    return torch.stack([(u.conj() * x).sum().real for u, x in pairs]).sum()
