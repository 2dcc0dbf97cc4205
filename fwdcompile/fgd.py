"""The forward gradient: sample a direction, differentiate along it, update, in one graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .activity import ActivityForward, check_examples
from .autocast import without_casts
from .binding import call_values
from .directions import Directions, RankOne, Sphere, scaled
from .drawing import kinds_of
from .export import Engine, export
from .lowered import Lowered
from .parts import Model
from .plan import Plan, plain_slots
from .program import outputs_reached
from .redraw import move
from .stepper import NonFinite, Stepper, check_loss, counted, sum_of
from .words import stream_keys

Perturbed = Literal["weights", "activations"]


def check_rate(lr: float, decay: float) -> None:
    """Refuses a learning rate lr exp(-decay i) that is not finite, or of another sign."""
    if not (0 < lr < math.inf and 0 <= decay < math.inf):
        raise ValueError(f"lr must be positive and decay not negative, not {lr} and {decay}")


class FGD(Stepper):
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
        store_directions: False draws them a second time for the update, in place of keeping a
            tensor of the size of every parameter from their first use to the end of the step.
        seed: of the directions; equal seeds give equal runs.
        compile: compiles the whole step by torch.compile.
        mode: torch.compile's mode.
        nonfinite: "raise" stops at a loss or derivative that is not finite, "skip" leaves the step
            out; parameters and buffers are unchanged in either case.
        dynamic: one compiled step serves every batch size from 2, such as the short last batch of
            an epoch; see `transform`.
        clip: the most that a directional derivative may be, of either sign; more is cut off. Keeps
            large rates stable and biases the estimate; None leaves it unbiased.

    Several losses, returned as a tuple or a list, are minimised as their sum. Each parameter learns
    from those alone that depend on it: with a gradient stopped between blocks, from its own.

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
        store_directions: bool = True,
        seed: int = 0,
        compile: bool = True,
        mode: str = "default",
        nonfinite: NonFinite = "raise",
        dynamic: bool = False,
        clip: float | None = None,
    ) -> None:
        check_rate(lr, decay)
        super().__init__(
            model,
            loss_fn,
            directions=directions,
            samples=counted("samples", samples),
            seed=seed,
            compile=compile,
            mode=mode,
            nonfinite=nonfinite,
            dynamic=dynamic,
            clip=clip,
        )
        self._store_directions = store_directions
        # not two tensors of no dimensions: dynamo traces twice what reads such float64 on the CPU
        self._rates = torch.tensor([lr, decay], dtype=torch.float64, device=self._seed.device)

    @property
    def lr(self) -> float:
        """Learning rate of the next step, lr exp(-decay i)."""
        return float(_decayed(self._rates, self.iteration))

    @lr.setter
    def lr(self, lr: float) -> None:
        decay = float(self._rates[1])
        check_rate(lr, decay)
        self._rates[0] = lr * math.exp(decay * self.iteration)

    def step(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """One iteration: changes the parameters in place.

        Args:
            inputs: the model's arguments, and the target behind them if there is a `loss_fn`.
            kwargs: the model's keyword arguments.

        Returns:
            The loss before the update, a detached tensor of no dimensions.

        Raises:
            NonFiniteError: the loss or derivative is infinite or NaN; nothing has changed.
            LossError: a loss is not a floating-point tensor of no dimensions.
        """
        loss: Tensor
        _, loss, _ = self._run(inputs, kwargs)
        return loss

    def export(
        self, path: str | Path, *inputs: Any, to: Engine = "torch", **kwargs: Any
    ) -> dict[str, Tensor]:
        """Writes a step to a file that runs without fwdcompile; docs/export.md has its interface.

        Args:
            path: of the file.
            inputs: as of `step`. The file serves their shapes, and with `dynamic` all batch sizes
                from 2.
            to: "torch", a program that `torch.export.load` reads; "inductor", one compiled for this
                machine, which C++ runs, too; "onnx", for inference engines such as onnxruntime.
            kwargs: as of `step`.

        Returns:
            What the exported step takes, by name and in order: the state as it is now, `step`, the
            inputs, `seed`, and `lr`, the rate of this one step: a decay is the caller's business.

        Raises:
            ExportError: the engine has no form of an op (the message names the user's line), or two
                tensors would have one name.

        Example:
            >>> tensors = fgd.export("step.pt2", x, target)
            >>> out = torch.export.load("step.pt2").module()(tensors)
            >>> out["loss"], out["new.fc1.weight"]
        """
        lowered = self._lowered(inputs, kwargs)
        values, _ = call_values(self.objective, inputs, kwargs)
        own = {"seed": self._seed, "step": self._step, "lr": self._rates.new_tensor(self.lr)}
        with without_casts():
            return export(path, lowered, self._update(lowered, store=True), values, own, to)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the model: iteration, seed, learning rate, decay."""
        lr, decay = self._rates.tolist()
        return super().state_dict() | {"lr": lr, "decay": decay}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        super().load_state_dict(state)
        self._rates.copy_(torch.tensor([state["lr"], state["decay"]], dtype=torch.float64))

    def _numbers(self) -> list[Tensor]:
        return [*super()._numbers(), self._rates]

    def _launched(self, lowered: Lowered) -> Callable[..., Any]:
        run = super()._launched(lowered)
        if self._store_directions:
            return run
        places = {slot.name: i for i, slot in enumerate(plain_slots(lowered))}
        trained = [places[name] for name in kinds_of(lowered) if name in places]

        def redrawn(tensors: Sequence[Tensor], *numbers: Tensor) -> Any:
            loss, finite, moves, keys = run(tensors, *numbers)
            for number, (place, factors) in enumerate(zip(trained, moves, strict=True)):
                if factors is not None:
                    self._redraw(tensors[place], keys[:, number], factors)
            return loss, finite

        return redrawn

    def _body(self, lowered: Lowered) -> Callable[..., Any]:
        update = self._update(lowered, self._store_directions)

        def step(tensors: Any, seed: Tensor, count: Tensor, rates: Tensor) -> Any:
            return update(tensors, seed, count, _decayed(rates, count))

        return step

    def _update(self, lowered: Lowered, store: bool) -> Callable[..., Any]:
        """A step at a given rate; without stored directions it leaves the moves to `_redraw`."""
        draw, reached = self._draw(kinds_of(lowered)), outputs_reached(lowered.program)

        def update(tensors: Any, seed: Tensor, count: Tensor, lr: Tensor) -> Any:
            loss, finite, trained, drawn, slopes, _ = self._estimate(
                lowered, draw, tensors, seed, count
            )
            rate = -lr / self.samples
            weights = self._weights(slopes, drawn, reached)
            moves = {names: torch.where(finite, rate * w, 0.0) for names, w in weights.items()}
            if not store:
                each = [moves.get(reached[name]) for name in trained]
                return loss, finite, each, stream_keys(seed, count, self.samples, len(trained))
            for name, parameter in trained.items():
                if names := reached[name]:
                    move(parameter, [dots[name] for dots in drawn], moves[names])
            return loss, finite

        return update


class ForwardGradient(Stepper):
    """Fills `p.grad` with the forward gradient, where `loss.backward()` stood.

    The forward gradient (d f / d v) v is an unbiased estimate of the gradient (Theorem 1 of Baydin
    et al. 2022). Gradients accumulate as autograd's do: call `optimizer.zero_grad()` before.

    Args:
        model, loss_fn, directions, seed, compile, mode, nonfinite, dynamic, clip: as for `FGD`;
            "skip" leaves the gradients as they are.
        samples: directions a step. Where activations are perturbed, a sequence gives each layer as
            many directions of its own, in which no other layer moves, in the order in which layers
            run, and behind them a number for all parameters of no layer. Far less noise: a layer's
            estimate has that of its own outputs alone; and a late layer's directions cost little.
        perturb: "weights", or "activations": the direction is one of the outputs of all linear
            layers, convolutions and embeddings, other for each example, and a layer's gradient
            comes from its own inputs (Ren et al. 2023). Far less noise; the layers' inputs are
            kept. The loss may then be a vector of one loss for each example, as by
            `reduction="none"`: what is differentiated is its mean, and each example learns from
            its own loss alone. Parameters elsewhere keep directions of their own.

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
        samples: int | Sequence[int] = 1,
        seed: int = 0,
        compile: bool = True,
        mode: str = "default",
        nonfinite: NonFinite = "raise",
        dynamic: bool = False,
        clip: float | None = None,
        perturb: Perturbed = "weights",
    ) -> None:
        if perturb not in ("weights", "activations"):
            raise ValueError(f'perturb is "weights" or "activations", not {perturb!r}')
        if perturb == "activations" and dynamic:
            raise ValueError("activity perturbation needs a fixed batch size: leave dynamic out")
        if perturb == "weights" and isinstance(samples, Sequence):
            raise ValueError('several numbers of samples need perturb="activations"')
        if perturb == "activations" and isinstance(directions, Sphere):
            raise ValueError(
                "activity perturbation draws for each example: take Rademacher, Normal"
            )
        super().__init__(
            model,
            loss_fn,
            directions=directions,
            samples=samples,
            seed=seed,
            compile=compile,
            mode=mode,
            nonfinite=nonfinite,
            dynamic=dynamic,
            clip=clip,
        )
        self.perturb = perturb
        self._checked: set[Plan] = set()
        if perturb == "activations":
            self._forward = ActivityForward(
                self.objective, clip, tuple(samples) if isinstance(samples, Sequence) else None
            )

    def __call__(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Adds the forward gradient at these inputs to `p.grad` and returns the loss.

        Raises:
            NonFiniteError: the loss or derivative is infinite or NaN; nothing has changed.
            LossError: the loss is not a floating-point tensor of no dimensions; or, with losses of
                examples, that of one depends on another example.
        """
        plan, loss, finite, gradients = self._run(inputs, kwargs)
        if self.nonfinite == "raise" or finite:
            for parameter, gradient in zip(plan.trained(), gradients, strict=True):
                if gradient is not None:
                    old = parameter.grad
                    parameter.grad = gradient if old is None else old + gradient
        return loss  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_checked": set()}

    def _admit(self, plan: Plan, tensors: list[Tensor]) -> None:
        """Looks once at each program, with the first inputs that give finite numbers."""
        if self.perturb == "activations" and plan not in self._checked:
            if check_examples(plan.lowered, tensors):
                self._checked.add(plan)

    def _check(self, lowered: Lowered) -> None:
        check_loss(lowered, most=int(self.perturb == "activations"))

    def _body(self, lowered: Lowered) -> Callable[..., Any]:
        draw, reached = self._draw(kinds_of(lowered)), outputs_reached(lowered.program)
        known = [slot.kind == "gradient" for slot in lowered.program.outputs]

        def gradient(tensors: Any, seed: Tensor, count: Tensor) -> Any:
            loss, finite, trained, drawn, slopes, outs = self._estimate(
                lowered, draw, tensors, seed, count
            )
            weights = self._weights(slopes, drawn, reached)
            gradients = [
                _combined(
                    [drawn[k][name] for k in draw.kinds[name].samples],
                    weights.get(reached[name]),
                    draw.kinds[name].samples,
                )
                for name in trained
            ]
            return loss, finite, gradients + [out for out, k in zip(outs, known, strict=True) if k]

        return gradient


def _decayed(rates: Tensor, count: Tensor | int) -> Tensor:
    """The learning rate after some iterations, of the first one and the decay, `[2]`."""
    lr, decay = rates.unbind()
    return lr * torch.exp(-decay * count)


def _combined(
    dots: list[Tensor | RankOne], weights: Tensor | None, samples: list[int]
) -> Tensor | None:
    """The forward gradient, a mean over samples; None where no loss depends on the parameter."""
    if weights is None:
        return None
    own = [weights[k] / len(samples) for k in samples]
    return sum_of(scaled(dot, w) for dot, w in zip(dots, own, strict=True))
