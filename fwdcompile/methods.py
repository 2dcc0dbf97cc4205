"""The methods that the runner compares, each a function that trains a model one step at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from .compiling import replays, stay_in_place, with_own_code
from .config import OPTIMIZERS, Config
from .directions import RankOne, dense_tensor
from .distributed import DistributedFGD, DistributedForwardGradient
from .drawing import Draw, Kind
from .errors import NonFiniteError
from .fgd import FGD, ForwardGradient
from .workers import Workers

# for each sample, the directions of all parameters
Dense = Callable[[list[Tensor]], Iterable[list[Tensor]]]


@dataclass(frozen=True)
class Step:
    """One step of training, and what of it a checkpoint keeps beside the model.

    Attributes:
        run: from images and labels to the loss before the step; changes the model.
        parts: things with `state_dict` and `load_state_dict`, by name.
    """

    run: Callable[[Tensor, Tensor], Tensor]
    parts: dict[str, Any]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; the loss before it, a detached tensor of no dimensions."""
        return self.run(x, y)

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of numbers and tensors."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, or starts anew from that of a new step."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class _Counted:
    """A number that a step reads as a tensor."""

    def __init__(self, value: int, device: torch.device) -> None:
        self.tensor = torch.tensor(value, dtype=torch.int64, device=device)

    def state_dict(self) -> dict[str, int]:
        return {"value": int(self.tensor)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.tensor.fill_(state["value"])


class _Generator:
    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed % 2**63)

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["state"])


def losses(out: Any, y: Tensor, reduction: str = "mean") -> Any:
    """Cross entropy; a list where a model in training has an output for each of its blocks."""
    if isinstance(out, Tensor):
        return cross_entropy(out, y, reduction=reduction)
    return [cross_entropy(each, y, reduction=reduction) for each in out]


def total_loss(out: Any, y: Tensor) -> Tensor:
    """The sum of `losses`."""
    found = losses(out, y)
    return found if isinstance(found, Tensor) else torch.stack(found).sum()


def fgd(model: nn.Module, config: Config, seed: int) -> Step:
    """Forward gradient descent as one graph a step, or forward gradients for an optimizer."""
    if config.optimizer == "sgd" and config.perturb == "weights":
        settings = _settings(config, seed)
        descent = DistributedFGD if "workers" in settings else FGD
        trainer = descent(model, losses, lr=config.lr, decay=config.decay, **settings)
        return Step(trainer.step, {"fgd": trainer})
    gradient, optimizer = estimator(model, config, seed), _optimizer(model, config)

    def step(x: Tensor, y: Tensor) -> Tensor:
        _schedule(optimizer, config.rate(gradient.iteration))
        optimizer.zero_grad()
        loss = gradient(x, y)
        optimizer.step()
        return loss

    return Step(step, {"gradient": gradient, "optimizer": optimizer})


def estimator(model: nn.Module, config: Config, seed: int) -> ForwardGradient:
    """The forward gradient of a config; activations perturbed need a loss for each example."""
    settings = _settings(config, seed)
    per_example = functools.partial(losses, reduction="none")
    loss_fn = per_example if config.perturb == "activations" else losses
    kind = DistributedForwardGradient if "workers" in settings else ForwardGradient
    return kind(model, loss_fn, perturb=config.perturb, **settings)  # type: ignore[arg-type]


def _settings(config: Config, seed: int) -> dict[str, Any]:
    """What FGD and ForwardGradient are given alike."""
    workers = workers_of(config)
    many = {"workers": workers} if workers.size > 1 else {}
    return many | {
        "directions": config.source,
        "samples": config.samples,
        "clip": config.clip if math.isfinite(config.clip) else None,
        "seed": seed,
        "compile": config.compile,
        "mode": config.mode,
        "nonfinite": "skip" if config.skip_nonfinite else "raise",
    }


def backprop(model: nn.Module, config: Config, seed: int, compiled: bool = False) -> Step:
    """Backpropagation; `compiled` compiles forward and backward, the update is fused.

    Many workers have torch's DistributedDataParallel. Only the loss is looked at for infinities: a
    look at every gradient would slow the rival down.
    """
    optimizer = _optimizer(model, config)
    count = _Counted(0, torch.device("cpu"))

    workers = workers_of(config)
    net = DistributedDataParallel(model) if workers.size > 1 else model

    def objective(x: Tensor, y: Tensor) -> Tensor:
        return total_loss(net(x), y)

    # DistributedDataParallel's own code, around the model, is no part of a graph
    whole = workers.size == 1
    run = compiled_by(config, objective, whole) if compiled else objective

    def step(x: Tensor, y: Tensor) -> Tensor:
        iteration = int(count.tensor)
        optimizer.zero_grad()
        _schedule(optimizer, config.rate(iteration))
        loss: Tensor = run(x, y)
        told = loss.detach() if workers.size == 1 else workers.gather(loss.detach()[None]).mean()
        if torch.isfinite(told):
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        else:
            _refuse(told, iteration, config)
        count.tensor.add_(1)
        return told

    return Step(step, {"optimizer": optimizer, "count": count})


def torch_jvp(
    model: nn.Module, config: Config, seed: int, compiled: bool = False, own: bool = False
) -> Step:
    """The peer: forward gradient descent over torch.func.jvp.

    Directions come from torch's generator where the step is eager, from hashed counters where it
    is compiled: each is the faster way there. `own` takes torch's own numbers in a compiled step,
    as one writes it without this package; they do not follow `seed`.
    """
    assert isinstance(config.samples, int)  # Config has seen to it
    samples = config.samples
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device
    start, counter, source = _Counted(seed, device), _Counted(0, device), _Generator(seed, device)
    count = counter.tensor
    draw = (
        _hashed(config, samples, parameters, start.tensor, count)
        if compiled and not own
        else _generated(config, samples, None if own else source.generator)
    )

    def update(x: Tensor, y: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        def objective(*ps: Tensor) -> Tensor:
            out = functional_call(model, dict(zip(parameters, ps, strict=True)), (x,))
            return total_loss(out, y)

        rate = config.lr * torch.exp(-config.decay * count) / samples
        moves = [torch.zeros((), dtype=value.dtype, device=device) for value in values]
        finite = torch.ones((), dtype=torch.bool, device=device)
        for dots in draw(values):
            loss, slope, *_ = torch.func.jvp(objective, tuple(values), tuple(dots))
            moves = [move + dot * (rate * slope) for move, dot in zip(moves, dots, strict=True)]
            finite = finite & torch.isfinite(loss) & torch.isfinite(slope)
        for value, move in zip(values, moves, strict=True):
            value.sub_(torch.where(finite, move, 0.0))
        return loss, finite

    run = compiled_by(config, update) if compiled else update
    values = [p.detach() for p in parameters.values()]
    if compiled and replays(config.mode):
        stay_in_place(values)

    @torch.no_grad()
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss, finite = run(x, y, values)
        if not finite:
            _refuse(loss, int(count), config)
        count.add_(1)
        return loss.clone()

    return Step(step, {"seed": start, "count": counter, "generator": source})


METHODS: dict[str, Callable[[nn.Module, Config, int], Step]] = {
    "fgd": fgd,
    "backprop": backprop,
    "backprop-compiled": functools.partial(backprop, compiled=True),
    "torch-jvp": torch_jvp,
    "torch-jvp-compiled": functools.partial(torch_jvp, compiled=True),
    "torch-jvp-randn-compiled": functools.partial(torch_jvp, compiled=True, own=True),
}


def workers_of(config: Config) -> Workers:
    """The workers that train by a config."""
    return Workers(config.share)  # type: ignore[arg-type]


def compiled_by(
    config: Config, function: Callable[..., Any], whole: bool = True
) -> Callable[..., Any]:
    """The function compiled in the config's mode, with a code object of its own."""
    own = with_own_code(function)
    return torch.compile(own, fullgraph=whole, dynamic=False, mode=config.mode)


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return OPTIMIZERS[config.optimizer](trained, lr=config.lr, fused=True)


def _schedule(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _refuse(loss: Tensor, iteration: int, config: Config) -> None:
    if not config.skip_nonfinite:
        raise NonFiniteError(
            f"iteration {iteration}: the loss ({loss.item():g}) or its derivative is not finite; "
            "this step changed nothing. Lower the learning rate, or leave such steps out."
        )


def _hashed(
    config: Config, samples: int, parameters: Mapping[str, Tensor], seed: Tensor, step: Tensor
) -> Dense:
    kinds = {
        name: Kind(tuple(p.shape), p.dtype, config.rank_one and p.ndim > 1, [*range(samples)])
        for name, p in parameters.items()
    }
    draw = Draw(config.source, kinds, samples, 0, seed.device)

    def dense(values: list[Tensor]) -> Iterable[list[Tensor]]:
        return [[dense_tensor(dot) for dot in drawn.values()] for drawn in draw(seed, step)]

    return dense


def _generated(config: Config, samples: int, generator: torch.Generator | None) -> Dense:
    def numbers(like: Tensor) -> Tensor:
        if config.directions == "normal":
            return torch.empty_like(like).normal_(generator=generator)
        bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
        return (bits * 2 - 1).to(like.dtype)

    def one(value: Tensor) -> Tensor:
        if config.rank_one and value.ndim > 1:
            return RankOne(numbers(value.flatten(1)[:, 0]), numbers(value[0])).dense()
        return numbers(value)

    def dense(values: list[Tensor]) -> Iterable[list[Tensor]]:
        return ([one(value) for value in values] for _ in range(samples))

    return dense
