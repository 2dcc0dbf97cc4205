"""What FGD and ForwardGradient share: capture, sampling, and the checks around a step."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .binding import arrange, signature_of, state_homes
from .directions import Directions, RankOne, stream_keys
from .errors import LossError, NonFiniteError, TangentError
from .forward import Forward, Lowered
from .objective import Objective
from .parts import Model, input_leaves, modules_of
from .program import output_nodes, value
from .sizes import mark_open

NonFinite = Literal["raise", "skip"]
_ON_TENSORS = functools.partial(torch.compiler.keep_tensor_guards_unsafe, keep_parameters=True)
Drawn = dict[str, Tensor | RankOne]
# What a direction is drawn for: shape, dtype, and whether it comes as two factors.
Kinds = dict[str, tuple[tuple[int, ...], torch.dtype, bool]]


@dataclass(frozen=True, eq=False)
class Plan:
    """A compiled step for one kind of input, and the tensors it reads and writes."""

    run: Callable[..., Any]
    lowered: Lowered
    state: dict[str, tuple[dict[str, Any], str]]
    leaves: dict[str, int]

    def tensors(self, inputs: Sequence[Any]) -> list[Tensor]:
        """What the program reads, in its order; state is looked up anew, it may be replaced."""
        found = []
        for slot in self.lowered.program.inputs:
            if slot.kind in ("parameter", "buffer"):
                home, key = self.state[slot.name]
                found.append(home[key])
            elif slot.kind == "input":
                found.append(inputs[self.leaves[slot.name]])
        return found

    def trained(self) -> list[Tensor]:
        """The parameters that have tangents, in the order of their keys, then all others."""
        program = self.lowered.program
        names = [slot.name for slot in program.inputs if slot.kind == "tangent"]
        names += [slot.name for slot in program.outputs if slot.kind == "gradient"]
        homes = (self.state[name] for name in dict.fromkeys(names) if name in self.state)
        return [home[key] for home, key in homes]


class Stepper:
    """What FGD and ForwardGradient share: capture, sampling, and the checks around a step."""

    def __init__(
        self,
        model: Model,
        loss_fn: Callable[..., Any] | None,
        directions: Directions,
        samples: int,
        seed: int,
        compile: bool,
        mode: str,
        nonfinite: NonFinite,
        dynamic: bool,
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, not {samples}")
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f'nonfinite is "raise" or "skip", not {nonfinite!r}')
        if mode not in torch._inductor.list_mode_options():
            raise ValueError(f"torch.compile must know the mode, and has none called {mode!r}")
        self.objective = Objective(model, loss_fn)
        self._directions, self._samples = directions, samples
        self._dense = replace(directions, rank_one=False)
        self.nonfinite = nonfinite
        self.iteration = 0
        self._compile, self._mode = compile, mode
        self._forward = Forward(self.objective, dynamic=dynamic)
        self._modules = [m for root in modules_of(self.objective).values() for m in root.modules()]
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
        """Directions a step; fixed, for steps are compiled for it."""
        return self._samples

    @property
    def code(self) -> str:
        """Source text of the forward-mode program generated last."""
        return self._forward.code

    def calibrate(self, *inputs: Any, **kwargs: Any) -> None:
        """Measures the matrix products and convolutions of a step; later steps take the fastest.

        Args:
            *inputs: as of a step.
            **kwargs: as of a step.

        What was measured is kept in a file of the user, for other runs, too: `costs_path()`.
        """
        self._forward.calibrate(*inputs, **self._asked(), **kwargs)
        self._plans.clear()

    def state_dict(self) -> dict[str, float]:
        """All that a resumed run needs beside the model and its optimizer: iteration and seed."""
        return {"iteration": self.iteration, "seed": int(self._seed)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continues where `state_dict` was taken: the same directions follow."""
        self.iteration = int(state["iteration"])
        self._step.fill_(self.iteration)
        self._seed.fill_(int(state["seed"]))

    def _asked(self) -> dict[str, Any]:
        return {"directions": self.samples, "rank_one": self.directions.rank_one}

    def _parameters(self) -> list[Tensor]:
        roots = modules_of(self.objective).values()
        found = {id(p): p for root in roots for p in root.parameters() if p.requires_grad}
        return list(found.values())

    def _plan(self, inputs: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Plan, list[Any]]:
        leaves, spec = _flatten(inputs, kwargs)
        key = (tuple(map(signature_of, leaves)), spec, tuple(m.training for m in self._modules))
        if key not in self._plans:
            lowered = self._forward.lower(*inputs, **self._asked(), **kwargs)
            known = (plan for plan in self._plans.values() if plan.lowered is lowered)
            self._plans[key] = next(known, None) or self._planned(lowered, inputs, kwargs)
        return self._plans[key], leaves

    def _planned(self, lowered: Lowered, inputs: Sequence[Any], kwargs: dict[str, Any]) -> Plan:
        self._check(lowered)
        run = self._compiled(self._body(lowered))
        named = dict(input_leaves(self.objective, inputs, kwargs))
        mark_open(lowered.program, named)
        places = {name: i for i, name in enumerate(named)}
        return Plan(run, lowered, state_homes(self.objective), places)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function compiled, with a code object of its own: dynamo counts recompilations by it.

        Of torch's guards those on tensors are kept. All else that a step reads is fixed or part of
        the key of its plan, and looking at it takes a tenth of a small model's step.
        """
        if not self._compile:
            return function
        code = function.__code__.replace()
        fresh = types.FunctionType(
            code, function.__globals__, function.__name__, closure=function.__closure__
        )
        options = torch._inductor.list_mode_options(self._mode) | {"guard_filter_fn": _ON_TENSORS}
        dynamic = None if self._forward.dynamic else False
        return torch.compile(fresh, fullgraph=True, dynamic=dynamic, options=options)

    def _check(self, lowered: Lowered) -> None:
        check_loss(lowered)

    def _admit(self, plan: Plan, tensors: list[Tensor]) -> None:
        """Refuses inputs before anything changes."""

    def _body(self, lowered: Lowered) -> Callable[..., Any]:
        raise NotImplementedError

    def _estimate(
        self, lowered: Lowered, kinds: Kinds, tensors: list[Tensor], seed: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], list[Drawn], list[Tensor], Sequence[Tensor]]:
        """Loss, whether all is finite, trained parameters, directions, slopes, and all outputs.

        Also writes the buffers that the model changes, unless something is not finite.
        """
        program = lowered.program
        plain = [slot for slot in program.inputs if slot.kind not in ("tangent", "constant")]
        values = {slot.name: x for slot, x in zip(plain, tensors, strict=True)}
        trained = {name: values[name] for name in kinds if name in values}
        drawn = self._draw(kinds, seed, step)
        outs = lowered.function(*arrange(program.inputs, values, drawn))
        pairs = list(zip(program.outputs, outs, strict=True))
        (loss,) = (_mean(out) for slot, out in pairs if slot.kind == "output")
        slopes = [_mean(out) for slot, out in pairs if slot.kind == "tangent"]
        finite = torch.isfinite(torch.stack([loss, *slopes])).all()
        for slot, out in pairs:
            if slot.kind in ("buffer", "input"):
                values[slot.name].copy_(torch.where(finite, out, values[slot.name]))
        return loss, finite, trained, drawn, slopes, outs

    def _draw(self, kinds: Kinds, seed: Tensor, step: Tensor) -> list[Drawn]:
        """The directions of one step: for each sample, those of all that has one, by name."""
        keys = stream_keys(seed, step, self.samples, len(kinds))
        return [
            {
                name: (self.directions if outer else self._dense).draw(shape, key=key, dtype=dtype)
                for key, (name, (shape, dtype, outer)) in zip(sample, kinds.items(), strict=True)
            }
            for sample in keys
        ]

    @torch.no_grad()
    def _run(self, inputs: Sequence[Any], kwargs: dict[str, Any], *extra: Tensor) -> Any:
        plan, leaves = self._plan(inputs, kwargs)
        tensors = plan.tensors(leaves)
        self._admit(plan, tensors)
        if self._mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        loss, finite, *rest = plan.run(tensors, self._seed, self._step, *extra)
        if self.nonfinite == "raise" and not finite:
            raise NonFiniteError(
                f"iteration {self.iteration}: the loss ({float(loss):g}) or its directional "
                "derivative is not finite; parameters and buffers are as they were. Lower the "
                'learning rate, or pass nonfinite="skip" to leave such steps out.'
            )
        self.iteration += 1
        self._step += 1
        return plan, loss, finite, *rest


def kinds_of(lowered: Lowered) -> Kinds:
    """What a step draws directions for, in the order of their keys."""
    kinds: Kinds = {}
    for node, slot in lowered.program.placeholders():
        if slot.kind == "tangent" and slot.direction == 0:
            known, x = kinds.get(slot.name, ((),))[0], value(node)
            kinds[slot.name] = (*known, *x.shape), x.dtype, bool(slot.factor)
    return kinds


def _mean(x: Tensor) -> Tensor:
    return x.mean() if x.ndim else x


def _flatten(inputs: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Leaves and structure; plain tensors spare a small model a tenth of its step."""
    if not kwargs and all(isinstance(x, Tensor) for x in inputs):
        return list(inputs), len(inputs)
    return pytree.tree_flatten((inputs, kwargs))


def check_loss(lowered: Lowered, most: int = 0) -> None:
    """Refuses an objective that is not one floating-point tensor of at most `most` dimensions."""
    program = lowered.program
    outs = [value(n) for n, slot in zip(output_nodes(program.graph), program.outputs, strict=True)
            if slot.kind == "output"]  # fmt: skip
    if len(program.out_spec.leaves) != 1 or len(outs) != 1:
        raise LossError("the objective must return one tensor, the loss; give a loss_fn")
    if outs[0].ndim > most or not outs[0].is_floating_point():
        shape, dtype = list(outs[0].shape), outs[0].dtype
        raise LossError(f"the loss must be a floating scalar tensor, not {dtype} of shape {shape}")
