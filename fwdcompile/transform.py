"""Transform: a program becomes one that also computes directional derivatives.

One walk over the graph. Every node is copied; a node that a tangent reaches gets its own tangent
right after it, made by the op's row of the rule table. Source and result are the same kind of
program, so the transform applies to its own output (second derivatives).
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Mapping
from dataclasses import replace
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from . import rule
from .apply import Site, apply, site_of
from .directions import RankOne
from .dual import dual
from .errors import MissingRuleError, RuleError, TangentError
from .labels import Dot, mark, rename_all
from .program import Program, Slot, can_move, is_differentiable, location, value
from .rule import Rule
from .sizes import same_shape, unify
from .subgraph import CONVENTIONS, operands_of
from .trace import Recorder, behind, bind_call, fake_mode

aten = torch.ops.aten


def transform(
    program: Program,
    active: Collection[str] | Mapping[str, Collection[int]],
    directions: int = 1,
    rank_one: Collection[str] = (),
) -> Program:
    """Rewrites a program so that it returns the jvp beside every output.

    Args:
        program: a captured program, or the result of an earlier transform (see `as_primal`).
        active: names of the inputs and parameters that have a tangent; the others have none, and
            nothing is computed for them. A mapping says in which of the directions each has one.
        directions: how many tangents each active input has. They share one primal.
        rank_one: names in `active` whose tangents come as two factors, `u` and `v`.

    Returns:
        A program with further inputs, `directions` tangents of each active input, and a further
        output of kind `tangent` for each differentiable output and direction.

    Raises:
        MissingRuleError: a tangent reaches an op without a row, or one that refuses.
        RuleError: a row raised, or returned a tangent that does not fit its primal.
        TangentError: a name in `active` is no differentiable input of the program.

    The jvp is that of forward-mode AD, section 2.1 of Baydin et al. (2022).
    """
    if not isinstance(active, Mapping):
        active = {name: range(directions) for name in active}
    return Walk(program, directions).run(active, rank_one)


class Walk:
    """One walk over a program, for `directions` tangents; `second.py` has another kind of it."""

    def __init__(self, program: Program, directions: int) -> None:
        self.program = program
        self.directions = range(directions)
        self.graph = fx.Graph()
        self.recorder = Recorder(self.graph, fake_mode(program.graph), keep=rule.table)
        self.primals: dict[fx.Node, fx.Node] = {}
        self.dots: dict[fx.Node, list[Dot]] = {}
        self.places: dict[fx.Node, list[int]] = {}  # of primal results among those of a dual op

    def run(self, active: Mapping[str, Collection[int]], rank_one: Collection[str]) -> Program:
        """Walks; arguments and result are those of `transform`."""
        tangents = self._inputs(active, rank_one)
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self._copy(node)
                before = self.graph._root.prev
                self._differentiate(node)
                self._mark(node, before)
        outputs = self._outputs()
        rename_all(self.graph, self.primals, self._ending)
        return replace(
            self.program,
            graph=self.graph,
            inputs=self.program.inputs + tuple(tangents),
            outputs=self.program.outputs + tuple(outputs),
        )

    def _inputs(
        self, active: Mapping[str, Collection[int]], rank_one: Collection[str]
    ) -> list[Slot]:
        known = {slot.name: node for node, slot in self.program.placeholders()}
        for name in active:
            if name not in known or not is_differentiable(value(known[name])):
                raise TangentError(f"{name!r} is no floating-point input of {self.program.title}")
        for node in known.values():
            self._copy(node)
        slots, factors = [], {}
        for name, node in known.items():
            if name in active:
                parts = ("u", "v") if name in rank_one else ("",)
                slots += [Slot("tangent", name, k, f) for k in active[name] for f in parts]
                factors[node] = {
                    k: [self._placeholder(node, k, part) for part in parts] for k in active[name]
                }
        for node, dots in factors.items():
            before = self.graph._root.prev
            made = {k: one[0] if len(one) == 1 else self._outer(*one) for k, one in dots.items()}
            self.dots[node] = [made.get(k) for k in self.directions]
            self._mark(node, before)
        return slots

    def _placeholder(self, primal: fx.Node, direction: int, factor: str) -> fx.Node:
        node = self.graph.placeholder(f"{primal.name}_dot{factor}")
        with self.recorder.fakes:
            like = value(primal)
            shape = {"": like.shape, "u": like.shape[:1], "v": like.shape[1:]}[factor]
            node.meta["val"] = torch.empty_like(like) if not factor else like.new_empty(shape)
        node.meta |= {"role": "tangent", "of": primal.name, "direction": direction}
        node.meta["factor"] = factor
        return node

    def _outer(self, u: fx.Node, v: fx.Node) -> fx.Node:
        """The tangent that two factors make; the pass `reassociate` does without it."""
        with self.recorder.active():
            factors = RankOne(self.recorder.fake(u), self.recorder.fake(v))
            outer = self.recorder.node(factors.dense())
        outer.meta["rank_one"] = True
        return outer

    def _copy(self, node: fx.Node) -> fx.Node:
        if node.target is getitem:
            source, index = node.args
            place = self.places[source][index] if source in self.places else index  # type: ignore
            copy = self.recorder.item(self.primals[source], place)  # type: ignore
        else:
            copy = self.graph.node_copy(node, lambda n: self.primals[n])
        copy.meta = dict(node.meta) | {"role": "primal"}
        self.recorder.sizes.learn(copy)
        self.primals[node] = copy
        return copy

    def _mark(self, node: fx.Node, before: fx.Node) -> None:
        """Labels what a rule has added behind `before` for the tangents of `node`."""
        mark(node, self.dots.get(node, ()), behind(before))

    def _differentiate(self, node: fx.Node) -> None:
        if node.target is getitem:
            self._item(node)
            return
        if not any(self._is_active(arg) for arg in node.all_input_nodes):
            return
        if not can_move(node):
            return
        if node.target in CONVENTIONS:
            self._call_dual(node)
            return
        dots = self._dots(self._site(node, self.primals[node]))
        if any(dot is not None for dot in dots):
            self.dots[node] = dots

    def _dots(self, site: Site) -> list[Dot]:
        """The tangents of an op, one for each direction."""
        with self.recorder.active():
            return [self._dot(site, k) for k in self.directions]

    def _again(self, program: Program, active: Collection[str], directions: int) -> Program:
        """A walk over a program that a higher-order op calls."""
        return transform(program, active, directions)

    def _call_dual(self, node: fx.Node) -> None:
        """Lets the copy of a higher-order op compute tangents as well."""
        operands = [arg for group in operands_of(node) for arg in group]
        active = [i for i, arg in enumerate(operands) if arg in self.dots]
        called = dual(node, active, len(self.directions), self._again)
        if called.reached:
            dots = {i: self._begin(operands[i], node) for i in called.active}
            copy = self.primals[node]
            self.places[node], self.dots[node] = called.install(copy, dots, self.recorder)  # type: ignore

    def _begin(self, primal: fx.Node, loop: fx.Node) -> list[fx.Node]:
        """The tangents of an operand; zeros where it has one only from the loop's body on."""
        dots: list[Any] = list(self.dots.get(primal) or [None for _ in self.directions])
        copy = self.primals[loop]
        for k in (k for k in self.directions if dots[k] is None):
            with self.graph.inserting_before(copy), self.recorder.active():
                like = self.recorder.fake(self.primals[primal])
                dots[k] = self.recorder.node(aten.zeros_like.default(like))
            dots[k].meta |= {"role": "tangent", "of": primal.name, "direction": k}
            dots[k].meta["module"] = loop.meta.get("module", "")
        return dots

    def _item(self, node: fx.Node) -> None:
        source, index = node.args
        dots = self.dots.get(source)  # type: ignore[arg-type]
        items = [dot and dot[index] for dot in dots or ()]  # type: ignore[index]
        if any(item is not None for item in items):
            self.dots[node] = items

    def _is_active(self, node: fx.Node) -> bool:
        return node in self.dots

    def _site(self, node: fx.Node, copy: fx.Node) -> Site:
        try:
            row = rule.row_for(node)
        except RuleError as error:
            raise RuleError(f"{_describe(node)}\n  {error}") from error
        if row is None or row.word == "not_implemented":
            raise MissingRuleError(_missing(node, row))
        return site_of(node, copy, row, self.recorder)

    def _dot(self, site: Site, direction: int) -> Dot:
        bound = bind_call(site.row.op, site.node.args, site.node.kwargs)
        present = {
            name: d
            for name, arg in bound.items()
            if (d := self._tangents_of(arg, direction)) is not None
        }
        if not present:
            return None
        if extra := [name for name in present if name not in site.row.wrt]:
            raise MissingRuleError(
                f"{_describe(site.node)}\n  The row at {site.row.where} has no term for argument "
                f"{extra[0]!r}, which has a tangent here. Add one to the row."
            )
        try:
            result = apply(site, present)
            return self._fit(site, result)
        except RuleError as error:
            raise RuleError(f"{_describe(site.node)}\n  Row at {site.row.where}: {error}") from None
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise RuleError(
                f"{_describe(site.node)}\n  Row at {site.row.where} raised {type(error).__name__} "
                f"({frame.filename}:{frame.lineno}): {error}"
            ) from error

    def _tangents_of(self, arg: Any, direction: int) -> Any:
        """The fakes of an argument's tangents; for a list, a list with None for the absent."""
        if isinstance(arg, fx.Node):
            dot = self.dots[arg][direction] if arg in self.dots else None
            return None if dot is None else self.recorder.fake(dot)  # type: ignore[arg-type]
        if isinstance(arg, list | tuple) and any(isinstance(item, fx.Node) for item in arg):
            dots = [self._tangents_of(item, direction) for item in arg]
            return dots if any(dot is not None for dot in dots) else None
        return None

    def _fit(self, site: Site, result: Any) -> Dot:
        """Makes a tangent have its primal's shape and dtype, or refuses it."""
        if isinstance(site.out, Tensor):
            return self._fit_one(result, site.out)
        if result is None:
            return None
        return tuple(self._fit_one(d, x) for d, x in zip(result, site.out, strict=True))

    def _fit_one(self, d: Any, primal: Any) -> fx.Node | None:
        if d is None or not is_differentiable(primal):
            return None
        if not isinstance(d, Tensor):
            raise RuleError(f"returned {type(d).__name__}, not a tensor")
        if d.is_complex() and not primal.is_complex():
            raise RuleError("returned a complex tangent for a real output")
        if d.dtype != primal.dtype or d.device != primal.device:
            d = d.to(device=primal.device, dtype=primal.dtype)
        unify(d, primal)
        if not same_shape(d, primal):
            d = d.expand(primal.shape)
        return self.recorder.node(d)

    def _outputs(self) -> list[Slot]:
        nodes = [self.primals[node] for node, _ in self.program.results()]
        slots = []
        for node, slot in list(self.program.results()):
            if slot.kind == "output" and is_differentiable(value(node)):
                dots = self.dots.get(node) or [None for _ in self.directions]
                nodes += [dot or self._zeros(node) for dot in dots]  # type: ignore[misc]
                slots += [Slot("tangent", slot.name, k) for k in self.directions]
        self.graph.output(tuple(nodes))
        return slots

    def _ending(self, direction: int) -> str:
        """What the name of a tangent has behind that of its primal."""
        return f"_dot{direction}" if len(self.directions) > 1 else "_dot"

    def _zeros(self, node: fx.Node) -> fx.Node:
        with self.recorder.active():
            zeros = self.recorder.node(
                aten.zeros_like.default(self.recorder.fake(self.primals[node]))
            )
        zeros.meta |= {"role": "tangent", "of": node.name, "direction": 0, "absent": True}
        return zeros


def _describe(node: fx.Node) -> str:
    return f"{location(node) or 'unknown line'}\n  op {node.target}, node {node.name!r}"


def _missing(node: fx.Node, row: Rule | None) -> str:
    if row is not None:
        return f"{_describe(node)} has no forward derivative here: {row.reason}"
    name = str(node.target)
    how = f"fwdcompile.rule.jvp(torch.ops.{name}, <argument>=lambda d, ...: ...)"
    if not isinstance(node.target, OpOverload):
        return f"{_describe(node)} is a higher-order op, which fwdcompile cannot differentiate."
    return (
        f"{_describe(node)} has a tangent but no row in the rule table.\n"
        f"  Give it one: {how}; or, where its derivative is zero, fwdcompile.rule.zero."
    )
