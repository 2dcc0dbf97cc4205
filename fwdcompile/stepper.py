"""What FGD and ForwardGradient share: capture, sampling, and the checks around a step."""

from __future__ import annotations

import operator
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .autocast import without_casts
from .binding import arrange, signature_of, state_homes
from .compiling import Replayed, check_mode, compiled_step, replays
from .directions import Directions, Normal
from .drawing import Draw, Drawn, Kinds
from .errors import LossError, NonFiniteError, TangentError
from .forward import StepForward
from .lowered import Lowered
from .objective import Objective
from .parts import Model, input_leaves, modules_of
from .plan import Plan, moving, plain_slots
from .program import Reached, value
from .redraw import Redraw
from .route import flatten
from .sizes import mark_open

NonFinite = Literal["raise", "skip"]


class Stepper:
    """What FGD and ForwardGradient share: capture, sampling, and the checks around a step."""

    def __init__(
        self,
        model: Model,
        loss_fn: Callable[..., Any] | None,
        *,
        directions: Directions | None,
        samples: int | Sequence[int],
        seed: int,
        compile: bool,
        mode: str,
        nonfinite: NonFinite,
        dynamic: bool,
        clip: float | None,
    ) -> None:
        numbers = counted("samples", samples, several=True)
        directions = Normal() if directions is None else directions
        if not isinstance(directions, Directions):
            raise ValueError(f"directions must be fwdcompile.Normal() or the like: {directions!r}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, not {clip}")
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f'nonfinite is "raise" or "skip", not {nonfinite!r}')
        check_mode(mode)
        self.objective = Objective(model, loss_fn)
        self._directions, self._samples = directions, sum(numbers)
        self._first_sample = 0
        self._redraw = Redraw(directions, self._compiled)
        self.clip = clip
        self.nonfinite = nonfinite
        self.iteration = 0
        self._compile, self._mode = compile, mode
        self._forward = StepForward(self.objective, dynamic=dynamic)
        self._plans: dict[Any, Plan] = {}
        trained = self._parameters()
        if not trained:
            raise TangentError("the model has no parameter that requires a gradient")
        device = trained[0].device
        self._seed = torch.tensor(seed, dtype=torch.int64, device=device)
        self._step = torch.tensor(0, dtype=torch.int64, device=device)

    @property
    def directions(self) -> Directions:
        """Where v comes from; fixed, for steps are compiled for it."""
        return self._directions

    @property
    def samples(self) -> int:
        """Directions a step, of all layers together; fixed, for steps are compiled for it."""
        return self._samples

    @property
    def code(self) -> str:
        """Source text of the forward-mode program generated last."""
        return self._forward.code

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the model: iteration and seed."""
        return {"iteration": self.iteration, "seed": int(self._seed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.iteration = int(state["iteration"])
        self._step.fill_(self.iteration)
        self._seed.fill_(int(state["seed"]))

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of; it makes programs of its own."""
        return vars(self) | {"_plans": {}, "_redraw": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._redraw = Redraw(self._directions, self._compiled)

    def calibrate(self, *inputs: Any, **kwargs: Any) -> None:
        """Measures the matrix products and convolutions of a step; later steps take the fastest.

        Args:
            *inputs: as of a step.
            **kwargs: as of a step.

        What was measured is kept for other runs: in $FWDCOMPILE_COSTS, or fwdcompile/costs.json in
        the cache of the user.
        """
        self.objective.check(inputs, kwargs)
        self._forward.calibrate(*inputs, **self._asked(), **kwargs)
        self._plans.clear()

    def _asked(self) -> dict[str, Any]:
        return {"directions": self.samples, "rank_one": self.directions.rank_one}

    def _numbers(self) -> list[Tensor]:
        """What a step reads beside the model and its inputs."""
        return [self._seed, self._step]

    def _parameters(self) -> list[Tensor]:
        roots = modules_of(self.objective).values()
        found = {id(p): p for root in roots for p in root.parameters() if p.requires_grad}
        return list(found.values())

    def _plan(self, inputs: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Plan, list[Any]]:
        leaves, spec = flatten(inputs, kwargs)
        state = self._forward.state_key(), self._forward.watch.trained()
        key = (tuple(map(signature_of, leaves)), spec, state)
        if key not in self._plans or self._plans[key].lowered.program.is_stale:
            lowered = self._lowered(inputs, kwargs)
            known = (plan for plan in self._plans.values() if plan.lowered is lowered)
            self._plans[key] = next(known, None) or self._planned(lowered, inputs, kwargs)
        return self._plans[key], leaves

    def _lowered(self, inputs: Sequence[Any], kwargs: dict[str, Any]) -> Lowered:
        """The program of a step, for arguments and an objective that fit."""
        self.objective.check(inputs, kwargs)
        lowered = self._forward.lower(*inputs, **self._asked(), **kwargs)
        self._check(lowered)
        for node, slot in lowered.program.placeholders():
            if slot.kind == "tangent" and value(node).is_complex():
                raise TangentError(
                    f"{slot.name!r} is complex, and directions are real: train its real and "
                    "imaginary parts, as one parameter that torch.view_as_complex reads"
                )
        return lowered

    def _planned(self, lowered: Lowered, inputs: Sequence[Any], kwargs: dict[str, Any]) -> Plan:
        run = self._launched(lowered)
        named = dict(input_leaves(self.objective, inputs, kwargs))
        slots = (slot for slot in plain_slots(lowered) if slot.kind == "input")
        mark_open(lowered.program, ((slot, named[slot.name]) for slot in slots))
        places = {name: i for i, name in enumerate(named)}
        if self._as_graph():
            run = Replayed(run, *moving(lowered))
        return Plan(run, lowered, state_homes(self.objective), places)

    def _as_graph(self) -> bool:
        """Whether steps are CUDA graphs."""
        return self._compile and replays(self._mode) and self._seed.is_cuda

    def _launched(self, lowered: Lowered) -> Callable[..., Any]:
        """All that a step launches."""
        return self._compiled(self._body(lowered))

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function compiled, if that was asked for."""
        dynamic = None if self._forward.dynamic else False
        if not self._compile:
            return function
        return compiled_step(function, self._mode, dynamic, self._seed.device)

    def _check(self, lowered: Lowered) -> None:
        check_loss(lowered)

    def _admit(self, plan: Plan, tensors: list[Tensor]) -> None:
        """Refuses inputs before anything changes."""

    def _body(self, lowered: Lowered) -> Callable[..., Any]:
        raise NotImplementedError

    def _estimate(
        self, lowered: Lowered, draw: Draw, tensors: list[Tensor], seed: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], list[Drawn], dict[str, Tensor], Sequence[Tensor]]:
        """Loss, whether all is finite, trained parameters, directions, slopes, and all outputs.

        Slopes are vectors over the samples, one for each loss. Also writes the buffers that the
        model changes, unless something is not finite.
        """
        program = lowered.program
        names = [slot.name for slot in plain_slots(lowered)]
        values = dict(zip(names, tensors, strict=True))
        trained = {name: values[name] for name in draw.kinds if name in values}
        drawn = draw(seed, step)
        outs = lowered.function(*arrange(program.inputs, values, drawn))
        pairs = list(zip(program.outputs, outs, strict=True))
        losses = {slot.name: _mean(out) for slot, out in pairs if slot.kind == "output"}
        slopes: dict[str, list[Tensor]] = {name: [] for name in losses}
        for slot, out in pairs:
            if slot.kind == "tangent":
                slopes[slot.name].append(_mean(out))
        known = {name: torch.stack(each) for name, each in slopes.items() if each}
        finite = torch.isfinite(torch.cat([torch.stack([*losses.values()]), *known.values()])).all()
        for slot, out in pairs:
            if slot.kind in ("buffer", "input"):
                values[slot.name].copy_(torch.where(finite, out, values[slot.name]))
        loss = sum_of(losses.values()).clone()  # it may be a parameter, which moves
        return loss, finite, trained, drawn, known, outs

    def _weights(
        self, slopes: Mapping[str, Tensor], drawn: list[Drawn], reached: Reached
    ) -> dict[tuple[str, ...], Tensor]:
        """The slopes that samples are weighted by, by the losses that one can move."""
        mixing = self.directions.mixing(drawn)
        each = {name: self._weigh(slope, mixing) for name, slope in slopes.items()}
        return {names: sum_of(each[name] for name in names) for names in reached.values() if names}

    def _weigh(self, slope: Tensor, mixing: Tensor | None) -> Tensor:
        """What samples are weighted by for one loss, from its slopes along them."""
        slope = slope if mixing is None else mixing.to(slope.dtype) @ slope
        slope = slope if self.clip is None else slope.clamp(-self.clip, self.clip)
        return slope if mixing is None else mixing.mT.to(slope.dtype) @ slope

    def _draw(self, kinds: Kinds) -> Draw:
        """What draws the directions of a step."""
        device = self._seed.device
        return Draw(self.directions, kinds, self.samples, self._first_sample, device)

    @torch.no_grad()
    def _run(self, inputs: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        plan, leaves = self._plan(inputs, kwargs)
        tensors = plan.tensors(leaves)
        with without_casts():
            self._admit(plan, tensors)
            loss, finite, *rest = plan.run(tensors, *self._numbers())
        if self.nonfinite == "raise" and not finite:
            raise self._refusal(loss)
        self._advance()
        return plan, loss, finite, *rest

    def _advance(self) -> None:
        self.iteration += 1
        self._step += 1

    def _refusal(self, loss: Tensor, where: str = "") -> NonFiniteError:
        return NonFiniteError(
            f"iteration {self.iteration}{where}: the loss ({float(loss):g}) or its directional "
            "derivative is not finite; parameters and buffers are as they were. Lower the "
            'learning rate, or pass nonfinite="skip" to leave such steps out.'
        )


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """The sum, without the addition of a zero."""
    first, *rest = terms
    return sum(rest, first)


def _mean(x: Tensor) -> Tensor:
    return x.mean() if x.ndim else x


def counted(name: str, number: Any, several: bool = False) -> tuple[int, ...]:
    """A whole number of at least 1, or `several` in a sequence, as a tuple of ints.

    Raises:
        ValueError: it is none.
    """
    numbers = tuple(number) if several and isinstance(number, Sequence) else (number,)
    if not numbers or not all(map(_is_whole, numbers)):
        raise ValueError(f"{name} must be a whole number, not {number!r}")
    if min(numbers) < 1:
        raise ValueError(f"{name} must be at least 1, not {number!r}")
    return tuple(map(operator.index, numbers))


def _is_whole(number: Any) -> bool:
    try:
        operator.index(number)
    except TypeError:
        return False
    return not isinstance(number, bool)


def check_loss(lowered: Lowered, most: int = 0) -> None:
    """Refuses an objective that is not floating-point tensors of at most `most` dimensions."""
    program = lowered.program
    outs = {slot.name: value(node) for node, slot in program.results() if slot.kind == "output"}
    is_named = program.out_spec.tree.type not in (None, tuple, list, namedtuple)
    if not outs or is_named or len(program.out_spec.leaves) != len(outs):
        raise LossError(
            "the objective must return the loss, or several in a tuple or list; give a loss_fn"
        )
    for name, out in outs.items():
        if not isinstance(out, Tensor):
            raise LossError(f"the loss {name!r} is a number of Python: return the tensor")
        if out.ndim > most or not out.is_floating_point():
            raise LossError(
                f"a loss must be a floating scalar tensor, not {kind_of(out)} as {name!r} is; a "
                "loss_fn may pick the loss of what the model returns"
            )


def kind_of(x: Tensor) -> str:
    """Dtype and shape, in the words of messages and histories."""
    return f"{x.dtype} of shape {list(x.shape)}"
