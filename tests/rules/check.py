"""Checks one row of the rule table: against torch.func.jvp and against central differences."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import fwdcompile.rules  # noqa: F401  (fills the table)
import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from fwdcompile.nesting import as_primal
from fwdcompile.program import OutSpec, Program, Slot, is_differentiable
from fwdcompile.remake import remake
from fwdcompile.simplify import simplify
from fwdcompile.transform import transform

RTOL, ATOL = 1e-9, 1e-10
# Words of the errors where torch knows no derivative by reverse mode.
TORCH_REFUSES = ("not differentiable with respect to", "derivative for", "not support dtype")


def program_of(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """A program of one op whose tensors are inputs `t0`, `t1`, ... and whose rest is fixed."""
    graph, fakes = fx.Graph(), FakeTensorMode(allow_non_fake_inputs=True)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    slots, nodes = [], []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            node = graph.placeholder(f"t{len(slots)}")
            node.meta["val"] = fakes.from_tensor(leaf)
            slots.append(Slot("input", node.name))
            nodes.append(node)
        else:
            nodes.append(leaf)
    node_args, node_kwargs = pytree.tree_unflatten(nodes, spec)
    node = graph.call_function(op, node_args, node_kwargs)
    with fakes:
        out = op(*fx.map_arg(node_args, _val), **fx.map_arg(node_kwargs, _val))
    node.meta["val"] = out
    results = [node]
    if isinstance(out, list | tuple):
        results = [graph.call_function(operator.getitem, (node, i)) for i in range(len(out))]
        for result, item in zip(results, out, strict=True):
            result.meta["val"] = item
    results = [result for result in results if isinstance(result.meta["val"], Tensor)]
    graph.output(tuple(results))
    names = [f"out{i}" for i in range(len(results))]
    tree = pytree.tree_structure(tuple(names))
    outputs = tuple(Slot("output", name) for name in names)
    return Program(
        graph, tuple(slots), outputs, OutSpec(tree, tuple((True, n) for n in names)), "op"
    )


def run(program: Program, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Runs a program by interpreting its graph; a random op draws the same each time."""
    torch.manual_seed(0)
    return fx.Interpreter(fx.GraphModule({}, program.graph)).run(*tensors)


def jvp_by_rule(
    op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], dots: dict[int, Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Primal outputs and tangents by the row; `dots` holds tangents by number of the tensor."""
    program = program_of(op, args, kwargs)
    twin = transform(program, [f"t{i}" for i in dots])
    simplify(twin.graph)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    flat = run(twin, *tensors, *(dots[i] for i in sorted(dots)))
    count = len(program.outputs)
    found = {s.name: x for s, x in zip(twin.outputs[count:], flat[count:], strict=True)}
    return list(flat[:count]), [found.get(slot.name) for slot in program.outputs]


def devices_of(
    op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], wrt: tuple[int, ...]
) -> set[str]:
    """Where the tensors are that the row makes of arguments on torch's device without memory."""
    moved = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
    twin = transform(program_of(op, *moved), [f"t{i}" for i in wrt])
    made = pytree.tree_leaves([node.meta.get("val") for node in twin.graph.nodes])
    return {x.device.type for x in made if isinstance(x, Tensor)}


def active_sets(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[int, ...]]:
    """Every differentiable tensor alone, and all together."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    active = [i for i, t in enumerate(tensors) if is_differentiable(t)]
    alone = [(i,) for i in active]
    return iter(alone if len(alone) < 2 else [*alone, tuple(active)])


def check(
    op: OpOverload,
    *args: Any,
    wrt: tuple[int, ...] | None = None,
    oracle: str = "jvp",
    second: bool = True,
    rtol: float = RTOL,
    atol: float = ATOL,
    **kwargs: Any,
) -> None:
    """Compares the row of `op` with an oracle, for each tensor alone and all together.

    Args:
        op: the overload; random ops must be seeded by the caller's choice of a deterministic case.
        args: arguments, float64 tensors (or complex128) where differentiable.
        wrt: numbers of the tensors (in flattened order) that may have a tangent; default all.
        oracle: "jvp" is torch.func.jvp, "difference" central differences.
        second: also checks jvp of jvp against central differences of the first-order result.
        kwargs: keyword arguments of the op.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for active in active_sets(args, kwargs) if wrt is None else [*((i,) for i in wrt), wrt]:
        dots = {i: _direction(tensors[i], generator) for i in active}
        outs, got = jvp_by_rule(op, args, kwargs, dots)
        expected_outs, expected = _oracle(oracle)(op, args, kwargs, dots)
        loose = oracle == "difference"
        for out, plain in zip(outs, expected_outs, strict=True):
            torch.testing.assert_close(out, plain, rtol=RTOL, atol=ATOL, equal_nan=True)
        for mine, theirs in zip(got, expected, strict=True):
            if mine is None:
                assert theirs is None or not is_differentiable(theirs)
                continue
            torch.testing.assert_close(
                mine,
                theirs,
                rtol=1e-5 if loose else rtol,
                atol=1e-6 if loose else atol,
                equal_nan=True,
            )
        if second:
            check_second(op, args, kwargs, dots)


def check_second(
    op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], dots: dict[int, Tensor]
) -> None:
    """Checks the second derivative along `dots` against central differences of the first."""
    program = program_of(op, args, kwargs)
    names = [f"t{i}" for i in sorted(dots)]
    first = as_primal(transform(program, names))
    second = transform(first, names)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    v = [dots[i] for i in sorted(dots)]
    flat = run(second, *tensors, *v, *v)
    found = {s.name: x for s, x in zip(second.outputs, flat, strict=True) if s.kind == "tangent"}

    def shifted(step: float) -> dict[str, Tensor]:
        moved = [t + step * dots[i] if i in dots else t for i, t in enumerate(tensors)]
        return {s.name: x for s, x in zip(first.outputs, run(first, *moved, *v), strict=True)}

    eps = 1e-5
    plus, minus = shifted(eps), shifted(-eps)
    for name, mine in found.items():
        if name.endswith("_dot"):
            theirs = (plus[name] - minus[name]) / (2 * eps)
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6, equal_nan=True)
    dotted = {name: d for name, d in found.items() if name.endswith("_dot")}
    check_autograd(first, tensors, dots, dotted)


def check_autograd(
    first: Program, tensors: list[Tensor], dots: dict[int, Tensor], second: dict[str, Tensor]
) -> None:
    """Checks autograd through a program, u'(H v) = (grad of u'y_dot)'v, against its transform."""
    first = first.copy()
    if remake(first.graph) or _has_triangle(first):
        return
    moved = [t.clone().requires_grad_() if i in dots else t for i, t in enumerate(tensors)]
    generator = torch.Generator().manual_seed(2)
    u = {name: _direction(d, generator) for name, d in second.items()}
    theirs = sum((u[name].conj() * d).sum().real for name, d in second.items())
    try:
        outs = run(first, *moved, *(dots[i] for i in sorted(dots)))
        found = {s.name: x for s, x in zip(first.outputs, outs, strict=True)}
        total = sum((u[name].conj() * found[name]).sum().real for name in u)
        if not isinstance(total, Tensor) or not total.requires_grad:
            assert isinstance(theirs, int) or not theirs.any()
            return
        wanted = [moved[i] for i in sorted(dots)]
        grads = torch.autograd.grad(total, wanted, materialize_grads=True)
    except RuntimeError as error:
        if not any(text in str(error) for text in TORCH_REFUSES):
            raise
        return
    mine = sum((g.conj() * dots[i]).sum().real for g, i in zip(grads, sorted(dots), strict=True))
    if not torch.as_tensor(mine).isnan():  # as where torch.where leaves out a division by zero
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)


def _has_triangle(program: Program) -> bool:
    """Whether an op reads one triangle alone; torch's gradient has numbers in the other, too."""
    ops = {torch.ops.aten.cholesky_solve.default, torch.ops.aten.cholesky_inverse.default}
    return any(node.target in ops for node in program.graph.nodes)


def _val(node: fx.Node) -> Any:
    return node.meta["val"]


def _direction(t: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(t.shape, dtype=t.dtype, generator=generator)


def _oracle(name: str) -> Any:
    return {"jvp": _torch_jvp, "difference": _difference}[name]


def _call(op: OpOverload, args: Any, kwargs: Any, changed: dict[int, Tensor]) -> list[Tensor]:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    for number, tensor in changed.items():
        leaves[places[number]] = tensor
    new_args, new_kwargs = pytree.tree_unflatten(leaves, spec)
    torch.manual_seed(0)
    out = op(*new_args, **new_kwargs)
    outs = list(out) if isinstance(out, list | tuple) else [out]
    return [x for x in outs if isinstance(x, Tensor)]


def _torch_jvp(op: OpOverload, args: Any, kwargs: Any, dots: dict[int, Tensor]) -> Any:
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    numbers = sorted(dots)

    def function(*changed: Tensor) -> tuple[Tensor, ...]:
        return tuple(_call(op, args, kwargs, dict(zip(numbers, changed, strict=True))))

    outs, tangents = torch.func.jvp(
        function, tuple(leaves[i] for i in numbers), tuple(dots[i] for i in numbers)
    )
    return list(outs), list(tangents)


def _difference(op: OpOverload, args: Any, kwargs: Any, dots: dict[int, Tensor]) -> Any:
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    eps = 1e-6

    def at(step: float) -> list[Tensor]:
        return _call(op, args, kwargs, {i: leaves[i] + step * d for i, d in dots.items()})

    pairs = zip(at(eps), at(-eps), strict=True)
    tangents = [(a - b) / (2 * eps) if is_differentiable(a) else None for a, b in pairs]
    return at(0.0), tangents
