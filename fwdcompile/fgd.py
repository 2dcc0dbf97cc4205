"""The forward gradient: sample a direction, differentiate along it, update, in one graph."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .binding import arrange, signature_of, state_homes
from .directions import Directions, Normal, RankOne, scaled, stream_keys
from .errors import LossError, NonFiniteError, TangentError
from .forward import Forward, Lowered
from .objective import Objective
from .parts import Model, input_leaves, modules_of
from .program import output_nodes, value

NonFinite = Literal["raise", "skip"]


@dataclass(frozen=True)
class _Plan:
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


class _Stepper:
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
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, not {samples}")
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f'nonfinite is "raise" or "skip", not {nonfinite!r}')
        self.objective = Objective(model, loss_fn)
        self.directions = directions
        self.samples = samples
        self.nonfinite = nonfinite
        self.iteration = 0
        self._compile, self._mode = compile, mode
        self._forward = Forward(self.objective)
        self._modules = [m for root in modules_of(self.objective).values() for m in root.modules()]
        self._plans: dict[Any, _Plan] = {}
        trained = self._parameters()
        if not trained:
            raise TangentError("the model has no parameter that requires a gradient")
        device = trained[0].device
        self._seed = torch.tensor(seed, dtype=torch.int64, device=device)
        self._step = torch.tensor(0, dtype=torch.int64, device=device)

    @property
    def code(self) -> str:
        """Source text of the forward-mode program generated last."""
        return self._forward.code

    def _parameters(self) -> list[Tensor]:
        roots = modules_of(self.objective).values()
        found = {id(p): p for root in roots for p in root.parameters() if p.requires_grad}
        return list(found.values())

    def _plan(self, inputs: Sequence[Any], kwargs: dict[str, Any]) -> tuple[_Plan, list[Any]]:
        leaves, spec = _flatten(inputs, kwargs)
        key = (tuple(map(signature_of, leaves)), spec, tuple(m.training for m in self._modules))
        if key not in self._plans:
            lowered = self._forward.lower(
                *inputs, directions=self.samples, rank_one=self.directions.rank_one, **kwargs
            )
            _check_loss(lowered)
            run = _fresh(self._body(lowered))
            if self._compile:
                run = torch.compile(run, fullgraph=True, dynamic=False, mode=self._mode)
            names = [name for name, _ in input_leaves(self.objective, inputs, kwargs)]
            places = {name: i for i, name in enumerate(names)}
            self._plans[key] = _Plan(run, lowered, state_homes(self.objective), places)
        return self._plans[key], leaves

    def _body(self, lowered: Lowered) -> Callable[..., Any]:
        raise NotImplementedError

    def _estimate(
        self, lowered: Lowered, tensors: list[Tensor], seed: Tensor, step: Tensor
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, list[Tensor | RankOne]]], list[Tensor]]:
        """Loss, whether all is finite, each parameter with its directions, and the slopes.

        Also writes the buffers that the model changes, unless something is not finite.
        """
        program = lowered.program
        plain = [slot for slot in program.inputs if slot.kind not in ("tangent", "constant")]
        values = {slot.name: x for slot, x in zip(plain, tensors, strict=True)}
        names = dict.fromkeys(slot.name for slot in program.inputs if slot.kind == "tangent")
        keys = stream_keys(seed, step, self.samples, len(names))
        drawn = [
            {
                name: self.directions.draw(
                    values[name].shape, key=keys[sample, number], dtype=values[name].dtype
                )
                for number, name in enumerate(names)
            }
            for sample in range(self.samples)
        ]
        outs = lowered.function(*arrange(program.inputs, values, drawn))
        pairs = list(zip(program.outputs, outs, strict=True))
        (loss,) = (out for slot, out in pairs if slot.kind == "output")
        slopes = [out for slot, out in pairs if slot.kind == "tangent"]
        finite = torch.isfinite(torch.stack([loss, *slopes])).all()
        for slot, out in pairs:
            if slot.kind in ("buffer", "input"):
                values[slot.name].copy_(torch.where(finite, out, values[slot.name]))
        per_parameter = [(values[name], [dots[name] for dots in drawn]) for name in names]
        return loss, finite, per_parameter, slopes

    @torch.no_grad()
    def _run(self, inputs: Sequence[Any], kwargs: dict[str, Any], *extra: Tensor) -> Any:
        plan, leaves = self._plan(inputs, kwargs)
        tensors = plan.tensors(leaves)
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


class FGD(_Stepper):
    """Forward gradient descent, Algorithm 1 of Baydin et al. (2022), as one graph a step.

    Each step draws v, computes the loss f and its derivative d along v in one forward run, and
    moves the parameters by -lr d v. There is no backward pass and nothing is stored for one.

    Args:
        model: the model to train; parameters that do not require a gradient stay fixed.
        loss_fn: `loss_fn(model(*inputs), target)`; None where the model returns the loss itself.
        lr: learning rate at iteration 0.
        decay: k in lr exp(-k i), the decay of section 5.
        directions: where v comes from.
        samples: directions per step, averaged; they share one primal.
        seed: of the directions; equal seeds give equal runs.
        compile: compiles the whole step by torch.compile.
        mode: torch.compile's mode.
        nonfinite: "raise" stops at a loss or derivative that is not finite, "skip" leaves the step
            out; parameters and buffers are unchanged in either case.

    Example:
        >>> fgd = fwdcompile.FGD(model, torch.nn.functional.cross_entropy, lr=2e-4, decay=1e-4)
        >>> loss = fgd.step(x, target)
    """

    def __init__(
        self,
        model: Model,
        loss_fn: Callable[..., Any] | None = None,
        *,
        lr: float,
        decay: float = 0.0,
        directions: Directions | None = None,
        samples: int = 1,
        seed: int = 0,
        compile: bool = True,
        mode: str = "default",
        nonfinite: NonFinite = "raise",
    ) -> None:
        if not lr > 0 or decay < 0:
            raise ValueError(f"lr must be positive and decay not negative, not {lr} and {decay}")
        chosen = Normal() if directions is None else directions
        super().__init__(model, loss_fn, chosen, samples, seed, compile, mode, nonfinite)
        self._lr = torch.tensor(lr, dtype=torch.float64, device=self._seed.device)
        self._decay = torch.tensor(decay, dtype=torch.float64, device=self._seed.device)

    @property
    def lr(self) -> float:
        """Learning rate of the next step, lr exp(-decay i)."""
        return float(self._lr * torch.exp(-self._decay * self.iteration))

    def step(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """One iteration: changes the parameters in place.

        Args:
            inputs: the model's arguments, and the target behind them if there is a `loss_fn`.
            kwargs: the model's keyword arguments.

        Returns:
            The loss before the update, a detached tensor of no dimensions.

        Raises:
            NonFiniteError: the loss or derivative is infinite or NaN; nothing has changed.
            LossError: the loss is not a floating-point tensor of no dimensions.
        """
        loss: Tensor = self._run(inputs, kwargs, self._lr, self._decay)[1]
        return loss.clone() if self._mode == "reduce-overhead" else loss

    def state_dict(self) -> dict[str, float]:
        """All that a resumed run needs beside the model: iteration, seed, learning rate, decay."""
        return {
            "iteration": self.iteration,
            "seed": int(self._seed),
            "lr": float(self._lr),
            "decay": float(self._decay),
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continues where `state_dict` was taken."""
        self.iteration = int(state["iteration"])
        self._step.fill_(self.iteration)
        self._seed.fill_(int(state["seed"]))
        self._lr.fill_(state["lr"])
        self._decay.fill_(state["decay"])

    def _body(self, lowered: Lowered) -> Callable[..., Any]:
        def step(tensors: Any, seed: Tensor, count: Tensor, lr: Tensor, decay: Tensor) -> Any:
            loss, finite, parameters, slopes = self._estimate(lowered, tensors, seed, count)
            rate = lr * torch.exp(-decay * count)
            steps = [torch.where(finite, -rate / len(slopes) * d, 0.0) for d in slopes]
            for parameter, dots in parameters:
                for move, dot in zip(steps, dots, strict=True):
                    parameter.add_(scaled(dot, move))
            return loss, finite

        return step


class ForwardGradient(_Stepper):
    """Fills `p.grad` with the forward gradient, where `loss.backward()` stood.

    The forward gradient (d f / d v) v is an unbiased estimate of the gradient (Theorem 1 of Baydin
    et al. 2022). Gradients accumulate as autograd's do: call `optimizer.zero_grad()` before.

    Args:
        model, loss_fn, directions, samples, seed, compile, mode, nonfinite: as for `FGD`; "skip"
            leaves the gradients as they are.

    Example:
        >>> grad = fwdcompile.ForwardGradient(model, loss_fn, directions=fwdcompile.Rademacher())
        >>> optimizer.zero_grad()
        >>> loss = grad(x, target)
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: Model,
        loss_fn: Callable[..., Any] | None = None,
        *,
        directions: Directions | None = None,
        samples: int = 1,
        seed: int = 0,
        compile: bool = True,
        mode: str = "default",
        nonfinite: NonFinite = "raise",
    ) -> None:
        chosen = Normal() if directions is None else directions
        super().__init__(model, loss_fn, chosen, samples, seed, compile, mode, nonfinite)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Adds the forward gradient at these inputs to `p.grad` and returns the loss.

        Raises:
            NonFiniteError: the loss or derivative is infinite or NaN; nothing has changed.
            LossError: the loss is not a floating-point tensor of no dimensions.
        """
        plan, loss, finite, gradients = self._run(inputs, kwargs)
        if self.nonfinite == "raise" or finite:
            names = (s.name for s in plan.lowered.program.inputs if s.kind == "tangent")
            for name, gradient in zip(dict.fromkeys(names), gradients, strict=True):
                home, key = plan.state[name]
                parameter = home[key]
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return loss  # type: ignore[no-any-return]

    def _body(self, lowered: Lowered) -> Callable[..., Any]:
        def gradient(tensors: Any, seed: Tensor, count: Tensor) -> Any:
            loss, finite, parameters, slopes = self._estimate(lowered, tensors, seed, count)
            weights = [d / len(slopes) for d in slopes]
            gradients = [
                sum(scaled(dot, weight) for weight, dot in zip(weights, dots, strict=True))
                for _, dots in parameters
            ]
            return loss, finite, gradients

        return gradient


def _flatten(inputs: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Leaves and structure; plain tensors spare a small model a tenth of its step."""
    if not kwargs and all(isinstance(x, Tensor) for x in inputs):
        return list(inputs), len(inputs)
    return pytree.tree_flatten((inputs, kwargs))


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own: torch.compile counts recompilations by code."""
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _check_loss(lowered: Lowered) -> None:
    program = lowered.program
    outs = [value(n) for n, slot in zip(output_nodes(program.graph), program.outputs, strict=True)
            if slot.kind == "output"]  # fmt: skip
    if len(program.out_spec.leaves) != 1 or len(outs) != 1:
        raise LossError("the objective must return one tensor, the loss; give a loss_fn")
    if outs[0].ndim or not outs[0].is_floating_point():
        shape, dtype = list(outs[0].shape), outs[0].dtype
        raise LossError(f"the loss must be a floating scalar tensor, not {dtype} of shape {shape}")
