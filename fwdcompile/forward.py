"""What `fwdcompile.transform(model)` returns, and how it is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .autocast import without_casts
from .binding import (
    Tangents,
    batch_size,
    by_direction,
    call_values,
    check_name,
    check_tangents,
    dense,
    state_homes,
)
from .compiling import replays
from .costs import Product, calibrate
from .directions import RankOne
from .errors import TangentError
from .inside import is_capturing, refused
from .lowered import Lowered
from .lowering import Lowering
from .parts import input_leaves, named_state
from .program import graphs, is_differentiable
from .remake import refuse_autograd
from .request import Request, factored
from .route import Given, Route, tensors_of
from .stack import forms, groups


class Forward(Lowering):
    """A model with its forward-mode derivative. Make one with `fwdcompile.transform`."""

    def __call__(
        self,
        *args: Any,
        tangents: Tangents | Sequence[Tangents],
        inner: Tangents | Sequence[Tangents] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Computes the model's output and its directional derivative in one forward run.

        Args:
            args: the model's positional arguments.
            tangents: tangents by parameter name, or by the name of an argument of `forward`
                (`x`; `batch.image` inside a pytree), each like its primal in shape, dtype and
                device, or a `RankOne` of factors. Names left out have no tangent. A sequence of
                K such mappings gives K directions that share one primal. With `batched=True` each
                tangent has one axis more, in front: a mapping holds as many directions as that is
                long.
            inner: for a transform of a transform, the tangents of the inner one (innermost first
                where there are several); by default the same as `tangents`, which gives v'Hv.
            kwargs: the model's keyword arguments.

        Returns:
            `(y, y_dot)`, both in the model's own structure; for a sequence of K mappings `y_dot`
            is a tuple of K. Batched, each tangent has the axis of its mapping. A floating-point
            output that no tangent reaches has zeros, any other has None.

        Raises:
            TangentError: a tangent of a wrong name, shape, dtype or device, or none at all.
            CaptureError: the model cannot be captured.
            MissingRuleError: a tangent reaches an op that the rule table has no row for.

        Example:
            >>> fwd = fwdcompile.transform(torch.nn.Linear(3, 2))
            >>> y, y_dot = fwd(torch.ones(3), tangents={"input": torch.ones(3)})
        """
        call = Given.of(args, kwargs, tangents, inner)
        return self._run(call, lambda: self._find(call, args, kwargs, tangents, inner))[:2]

    def _along(
        self, primals: Sequence[Any], kwargs: Mapping[str, Any], call: Given
    ) -> tuple[Any, Any]:
        """The same with a tangent for each leaf of the positional arguments, in order."""

        def find() -> tuple[Route, Sequence[Any]]:
            names = (name for name, _ in input_leaves(self.base, primals, kwargs))
            tangents = dict(zip(names, call.dots, strict=False))
            return self._find(call, primals, kwargs, tangents, None)

        return self._run(call, find)[:2]

    def _find(
        self,
        call: Given,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tangents: Tangents | Sequence[Tangents],
        inner: Tangents | Sequence[Tangents] | None,
    ) -> tuple[Route, Sequence[Any]]:
        """The route of a call that is checked first, and its tangents as the program takes them."""
        values, tied = call_values(self.base, args, kwargs)
        each, several = by_direction(tangents)
        if not each:
            raise TangentError("no tangent given: nothing to differentiate by")
        dots = [check_tangents(one, values, tied, self.batched) for one in each]
        if self.depth > 1:
            dots = [dense(one) for one in dots]
        levels = self._inner_levels(inner, dots, values, tied)
        same = inner is None and bool(levels) and len(dots) == 1
        lowered = self._lowered(args, kwargs, self._request(dots, levels, same))
        return self._route(lowered, call, values, dots, levels if inner else (), several)

    def _route(
        self,
        lowered: Lowered,
        call: Given,
        values: Mapping[str, Any],
        dots: Sequence[Tangents],
        levels: Sequence[Tangents],
        several: bool,
    ) -> tuple[Route, Sequence[Any]]:
        leaves = [*values][len(values) - len(call.leaves) :]
        homes, every = state_homes(self.base), [*dots, *levels]
        route = Route(lowered, homes, leaves, every, len(dots), self.depth, several)
        return route, [x for one in every for x in tensors_of(one)]

    def _run(
        self, call: Given, find: Callable[[], tuple[Route, Sequence[Any]]]
    ) -> tuple[Any, Any, Any]:
        """Runs the program of a call, by a route that is found once for calls of a kind."""
        lasts = not (is_capturing() or torch.compiler.is_compiling())
        key = (*self.state_key(), call.kind) if lasts else ()
        route, dots = self._routes.find(key), call.dots
        if route is None:
            route, dots = find()
            if lasts and call.has(dots):
                self._routes.keep(key, route)
        self._last = route.lowered
        pool = route.pool(call.leaves, dots)
        tensors = route.tensors(pool)
        return route.results(self._outputs(route, tensors), pool)

    def _outputs(self, route: Route, tensors: list[Tensor]) -> tuple[Any, ...]:
        """Runs a program, as a part of the one that is being captured if there is one."""
        lowered = route.lowered
        if is_capturing():
            if lowered.program.calls:
                raise refused(lowered.program.sealed)
            with torch.compiler.set_stance("force_eager"), without_casts():
                return lowered.function(*tensors)
        if self.compile and replays(self.mode):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        if self.compile and self.dynamic:
            route.opened(tensors)
        refuse_autograd(lowered.program, tensors)
        with without_casts():
            return lowered.function(*tensors)

    def lower(
        self,
        *args: Any,
        tangents: str | Iterable[str] = "parameters",
        directions: int = 1,
        rank_one: bool = False,
        **kwargs: Any,
    ) -> Lowered:
        """Captures and generates ahead of the first call; nothing is computed.

        Args:
            args: example positional arguments.
            tangents: names that will have tangents, or `"parameters"` (all that require grad), or
                `"inputs"` (all floating-point inputs).
            directions: how many directions a call will give, in one mapping if `batched`.
            rank_one: the tangents of two or more dimensions will be `RankOne`.
            kwargs: example keyword arguments.

        Returns:
            The generated program; `code`, `stages` and `graph()` of this object show it, too.
        """
        values, tied = call_values(self.base, args, kwargs)
        names = self._chosen(tangents, values)
        kept = tuple(dict.fromkeys(tied.get(name, name) for name in names))
        outer = tuple(name for name in kept if rank_one and values[name].ndim > 1)
        moved = (kept,) * (1 if self.batched else directions)
        sizes = (directions,) if self.batched else ()
        inner = (kept,) * (self.depth - 1)
        same = self.depth > 1 and not self.batched
        return self._lowered(args, kwargs, Request(moved, inner, same, outer, sizes))

    def _request(
        self, dots: Sequence[Tangents], levels: Sequence[Tangents] = (), same: bool = False
    ) -> Request:
        """What a call asks for by tangents of each direction, and of inner levels."""
        moved, inner = (tuple(map(tuple, each)) for each in (dots, levels))
        sizes = tuple(map(batch_size, dots)) if self.batched else ()
        return Request(moved, inner, same, factored(dots), sizes)

    def calibrate(self, *args: Any, **kwargs: Any) -> list[Product]:
        """Measures the products of the program on their device; later programs take the fastest.

        Args:
            *args: as of `lower`.
            **kwargs: as of `lower`.

        Returns:
            What was measured. It is kept for other runs: in $FWDCOMPILE_COSTS, or
            fwdcompile/costs.json in the cache of the user.
        """
        passes = [name for name in self.passes if name != "stack"]
        lowered = self._plain(passes).lower(*args, **kwargs)
        products = [g.product for graph in graphs(lowered.program.graph) for g in groups(graph)]
        calibrate(products, forms)
        self._routes.clear()
        self._cache.clear()
        self._asked.clear()
        return products

    def _plain(self, passes: Sequence[str]) -> Forward:
        return Forward(self.model, passes=passes)

    def _chosen(self, tangents: str | Iterable[str], values: dict[str, Any]) -> list[str]:
        state = named_state(self.base, "parameter")
        if tangents == "parameters":
            names = [name for name, x in state.items() if x.requires_grad]
        elif tangents == "inputs":
            state |= named_state(self.base, "buffer")
            names = [n for n, x in values.items() if n not in state and is_differentiable(x)]
        else:
            names = [tangents] if isinstance(tangents, str) else list(tangents)
        for name in names:
            check_name(name, values)
        return names

    def _inner_levels(
        self,
        inner: Tangents | Sequence[Tangents] | None,
        dots: list[dict[str, Tensor | RankOne]],
        values: dict[str, Any],
        tied: dict[str, str],
    ) -> list[dict[str, Tensor | RankOne]]:
        count = self.depth - 1
        if count and inner is None and self.batched:
            raise TangentError("inner transforms have one direction, not a batch: give inner=")
        if inner is None:
            return [dots[0]] * count
        levels, _ = by_direction(inner)
        if len(levels) != count:
            raise TangentError(f"inner needs tangents for {count} inner transforms")
        return [dense(check_tangents(level, values, tied)) for level in levels]


class StepForward(Forward):
    """A transform whose programs run in steps, where autograd does not go."""

    differentiable = False


importlib.import_module("fwdcompile.rules")  # fills the table
importlib.import_module("fwdcompile.registered")  # and tells what makes further rows
