"""What `fwdcompile.laplacian(model)` returns: first derivatives and a sum of second ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .binding import Tangents, call_values, check_name, check_tangents, dense
from .errors import TangentError
from .forward import Forward
from .kept import transform_of
from .lowered import Lowered
from .parts import Model
from .program import Program
from .request import Request
from .route import Given, Route
from .second import second_order
from .simplify import PASSES


class Laplacian(Forward):
    """A model with sums of its second derivatives. Make one with `fwdcompile.laplacian`."""

    nests = False

    def __call__(  # type: ignore[override]
        self,
        *args: Any,
        tangents: Sequence[Tangents],
        first: Sequence[Tangents] = (),
        **kwargs: Any,
    ) -> tuple[Any, tuple[Any, ...], Any]:
        """Computes output, directional derivatives and a sum of second ones in one forward run.

        Args:
            args: the model's positional arguments.
            tangents: the directions v of the sum, each a mapping as of `transform`. Along the axes
                of one input they give its Laplacian; scaled by sqrt(c), an axis counts c times.
            first: further directions, of which only the first derivative is computed.
            kwargs: the model's keyword arguments.

        Returns:
            `(y, y_dots, y_ddot)` in the model's structure. `y_dots` is a tuple with J v for each of
            `tangents` and of `first`, `y_ddot` the sum over `tangents` of v' H v, for the Hessian H
            of each element of y.

        Raises:
            TangentError, CaptureError, MissingRuleError: as `transform`.

        Example:
            >>> lap = fwdcompile.laplacian(lambda x: (x ** 3).sum(-1))
            >>> axes = [{"x": e.expand(4, 2)} for e in torch.eye(2)]
            >>> y, (y_0, y_1), y_ddot = lap(torch.ones(4, 2), tangents=axes)   # y_ddot: 12 each
        """
        if not isinstance(tangents, list | tuple) or not tangents:
            raise TangentError(
                "tangents is a sequence with a mapping for each direction, or batch of them"
            )
        call = Given.of(args, kwargs, tangents, first)

        def find() -> tuple[Route, Sequence[Any]]:
            values, tied = call_values(self.base, args, kwargs)
            every = (*tangents, *first)
            dots = [dense(check_tangents(one, values, tied, self.batched)) for one in every]
            request = replace(self._request(dots), curved=len(tangents))
            lowered = self._lowered(args, kwargs, request)
            return self._route(lowered, call, values, dots, (), several=True)

        return self._run(call, find)

    def lower(  # type: ignore[override]
        self,
        *args: Any,
        tangents: Sequence[str | Sequence[str]],
        first: Sequence[str | Sequence[str]] = (),
        directions: int = 1,
        **kwargs: Any,
    ) -> Lowered:
        """Captures and generates ahead of the first call; nothing is computed.

        Args:
            args: example positional arguments.
            tangents: for each direction of a call the name, or names, that have a tangent.
            first: the same of further directions.
            directions: how many each of them will stand for, if `batched`.
            kwargs: example keyword arguments.

        Returns:
            The generated program; `code`, `stages` and `graph()` of this object show it, too.
        """
        values, tied = call_values(self.base, args, kwargs)
        moved = []
        for names in (*tangents, *first):
            each = (names,) if isinstance(names, str) else tuple(names)
            for name in each:
                check_name(name, values)
            moved.append(tuple(dict.fromkeys(tied.get(name, name) for name in each)))
        sizes = (directions,) * len(moved) if self.batched else ()
        request = Request(tuple(moved), sizes=sizes, curved=len(tangents))
        return self._lowered(args, kwargs, request)

    def _plain(self, passes: Sequence[str]) -> Forward:
        return Laplacian(self.model, passes=passes)

    def _transformed(self, captured: Program, request: Request) -> Program:
        count, curved = len(request.moved), range(request.curved)
        return second_order(captured, request.ways, count, curved, batched=bool(request.sizes))


def laplacian(
    model: Model,
    *,
    tracks_grad: bool = True,
    compile: bool = False,
    mode: str = "default",
    passes: Sequence[str] = tuple(PASSES),
    dynamic: bool = False,
    batched: bool = False,
) -> Laplacian:
    """Makes the version of a model that computes a Laplacian; nothing is traced before a call.

    Second derivatives along K directions are added up as they pass through the model, so that they
    take K + 2 times the model's linear work, where a transform of a transform takes 3 K, and the
    trace of a Hessian by reverse mode more. The program is differentiable by autograd, as the loss
    of a physics-informed network needs it.

    Args:
        model: an nn.Module, or a function of tensors and pytrees.
        tracks_grad: as of `transform`, like the rest.
        compile: runs the program through torch.compile.
        mode: of torch.compile.
        passes: simplifying passes to take, in order.
        dynamic: one program serves every batch size from 2.
        batched: tangents have an axis of directions in front, as of `transform`.

    Returns:
        A callable `lap(*inputs, tangents=[...], first=[...])` that gives `(y, y_dots, y_ddot)`.

    Raises:
        ValueError: settings that cannot be, as a mode or a pass that there is not.
        TangentError: `model` is a transform.

    Example:
        >>> lap = fwdcompile.laplacian(model)
        >>> u, (u_x, u_t), u_xx = lap(x, t, tangents=[{"x": ones}], first=[{"t": ones}])

    Source: Li et al. (2023), "Forward Laplacian: a new computational framework for neural
    network-based variational Monte Carlo", and Dangel et al. (2025), "Collapsing Taylor Mode
    Automatic Differentiation".
    """
    return transform_of(
        Laplacian,
        model,
        tracks_grad=tracks_grad,
        compile=compile,
        mode=mode,
        passes=tuple(passes),
        dynamic=dynamic,
        batched=batched,
    )
