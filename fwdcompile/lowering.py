"""Lowering: from a model to a program, once for each kind of call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from .autocast import casts, without_casts
from .batch import batch
from .binding import call_values
from .calls import own_results, settle
from .capture import capture
from .compiling import check_mode
from .custom import FUNCTION, dissolve
from .errors import TangentError
from .inside import (
    ask_for,
    is_capturing,
    outside_of_torch_func,
    refuse_open_sizes,
    refused,
)
from .lifted import Derived
from .lowered import Function, Lowered, Shown, generate
from .nesting import as_primal, tie
from .parts import Model
from .program import Program
from .pushforward import derive
from .remake import remake
from .request import Request, fixed, inputs_key, suffix
from .route import Routes
from .simplify import PASSES, check_passes, detach_tangents, simplify
from .sizes import serves
from .transform import transform
from .watch import Watch


class Lowering(Derived, Shown):
    """A model, how its programs shall be made, and those that have been made of it.

    Args:
        model: or another lowering, whose programs are transformed again.
        tracks_grad: as of `fwdcompile.transform`, like the rest.
        compile: runs programs through torch.compile.
        mode: of torch.compile.
        passes: simplifying passes to take, in order.
        dynamic: one program serves every batch size from 2.
        batched: tangents have an axis of directions in front.

    Raises:
        ValueError: an inner transform has fixed sizes, and this one open ones, or is batched; or
            torch.compile has no such mode, or this package no such pass.
        TangentError: the model is a transform that cannot be transformed.
    """

    nests = True  # whether a transform of it is possible
    differentiable = True  # whether autograd may go through its programs

    def __init__(
        self,
        model: Model | Lowering,
        *,
        tracks_grad: bool = True,
        compile: bool = False,
        mode: str = "default",
        passes: Sequence[str] = tuple(PASSES),
        dynamic: bool = False,
        batched: bool = False,
    ) -> None:
        if dynamic and isinstance(model, Lowering) and not model.dynamic:
            raise ValueError("give dynamic=True to the innermost transform, which captures")
        if isinstance(model, Lowering) and not (self.nests and model.nests):
            raise TangentError("a Laplacian is that of a model, and no transform is one of it")
        if isinstance(model, Lowering) and model.batched:
            raise ValueError("only the outermost transform can be batched")
        check_mode(mode)
        check_passes(passes)
        self.lasts = not is_capturing()
        self.model = model
        self.base: Model = model.base if isinstance(model, Lowering) else model
        self.depth: int = model.depth + 1 if isinstance(model, Lowering) else 1
        self.tracks_grad = tracks_grad
        self.compile = compile
        self.mode = mode
        self.passes = tuple(passes)
        self.batched: bool = batched
        self.dynamic: bool = model.dynamic if isinstance(model, Lowering) else dynamic
        self._forget()

    def _forget(self) -> None:
        """Begins without a program."""
        self.watch = Watch(self.base)
        self._cache: dict[Any, Lowered] = {}
        self._asked: set[Any] = set()
        self._routes = Routes()
        self._last = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of; it makes programs of its own."""
        made = ("watch", "_cache", "_asked", "_routes", "_last")
        return {name: thing for name, thing in vars(self).items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def programs(self) -> int:
        """How many have been made, for calls and states of the model."""
        return len(self._cache)

    def _lowered(self, args: Sequence[Any], kwargs: Mapping[str, Any], request: Request) -> Lowered:
        if is_capturing():
            refuse_open_sizes((args, kwargs))
        key = (self.state_key(), request, *inputs_key(args, kwargs))
        if key not in self._cache or self._cache[key].program.is_stale:
            if is_capturing():
                self._ask(key, args, kwargs, request)
            served = self._served(key, args, kwargs) if self.dynamic else None
            self._cache[key] = served or self._lower(args, kwargs, request)
            self.watch.accept()
        if is_capturing() and self._cache[key].program.fixed:
            raise refused("the numbers of a tensor decide what it computes")
        self._last = self._cache[key]
        return self._last

    def _ask(self, key: Any, args: Any, kwargs: Any, request: Request) -> None:
        """Has a program made for the model that calls this one, outside of its capture."""
        if not self.lasts:
            raise refused("it is made anew in each call; make it once, outside of forward")
        if key in self._asked:
            raise refused("forward sets training flags, or autocast, that do not hold outside")

        def make(args: Any, kwargs: Any) -> None:
            self._lowered(args, kwargs, request)
            self._asked.add(key)

        ask_for(make, args, kwargs)

    def _served(
        self, key: tuple[Any, ...], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Lowered | None:
        """A program made for other sizes that is right for these as well."""
        values, _ = call_values(self.base, args, kwargs)
        for (state, request, leaves, spec), lowered in self._cache.items():
            alike = (state, request, spec) == (key[0], key[1], key[3])
            alike = alike and not lowered.program.is_stale
            if alike and fixed(leaves) == fixed(key[2]) and serves(lowered.program, values):
                return lowered
        return None

    def state_key(self) -> Any:
        """What decides which programs of the model are right, beside the inputs of a call."""
        mode = torch.is_inference_mode_enabled(), torch.get_default_dtype()
        return self.watch.version(), self.watch.state(), casts(), mode

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _lower(self, args: Sequence[Any], kwargs: Mapping[str, Any], request: Request) -> Lowered:
        with outside_of_torch_func((args, kwargs)) as (args, kwargs):
            return self._made(args, kwargs, request)

    def _made(self, args: Sequence[Any], kwargs: Mapping[str, Any], request: Request) -> Lowered:
        captured = self._captured(args, kwargs, request)
        with without_casts():
            transformed = self._transformed(captured, request)
            if request.same:
                transformed = tie(transformed, suffix(len(request.inner)))
            # what is stacked is measured for the products of a batch
            passes = tuple(p for p in self.passes if p != "stack" or not request.sizes)
            nestable = transformed.copy()
            simplify(nestable.graph, passes)
            program = (transformed if transformed.calls else nestable).copy()
            if program.calls:
                dissolve(program.graph)
                simplify(program.graph, passes)
            if request.sizes:
                program = batch(program, request.sizes)
                simplify(program.graph, self.passes)
        stages = {"capture": captured.graph, "transform": transformed.graph}
        sealed = self._sealed(program)
        if not self.tracks_grad:
            detach_tangents(program.graph)
        settle(program.graph)
        own_results(program)
        stages["simplify"] = program.graph
        program = replace(program, sealed=sealed)
        return generate(program, nestable, stages, self.passes, self._compiled)

    def _sealed(self, program: Program) -> str:
        """Lets autograd through a program, or says why it cannot go."""
        if program.calls:
            return f"of {program.calls[0].name}, {FUNCTION}"
        return remake(program.graph) if self.tracks_grad and self.differentiable else ""

    def _captured(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], request: Request
    ) -> Program:
        if not isinstance(self.model, Lowering):
            active = {name for level in (*request.inner, *request.moved) for name in level}
            return derive(capture(self.model, args, kwargs, self.dynamic, active))
        *deeper, last = request.inner
        inner = Request((last,), tuple(deeper), request.same and len(deeper) > 0)
        source = self.model._lowered(args, kwargs, inner).nestable
        return as_primal(source, suffix(len(request.inner)))

    def _transformed(self, captured: Program, request: Request) -> Program:
        return transform(captured, request.ways, len(request.moved), request.rank_one)

    def _compiled(self, function: Function) -> Function:
        if not self.compile:
            return function
        dynamic = None if self.dynamic else False
        return torch.compile(function, fullgraph=True, dynamic=dynamic, mode=self.mode)
