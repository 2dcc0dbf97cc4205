"""The methods that the runner compares, each a function that trains a model one step at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from .directions import Directions, Normal, Rademacher, RankOne, dense_tensor, stream_keys
from .errors import NonFiniteError
from .fgd import FGD, ForwardGradient

DIRECTIONS: dict[str, type[Directions]] = {"normal": Normal, "rademacher": Rademacher}
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
Step = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[list[Tensor], int], list[Tensor]]


@dataclass(frozen=True)
class Config:
    """What a comparison trains, and how long.

    Attributes:
        methods: names from `METHODS`.
        iterations: steps of each method; equal for all, as in the paper.
        batch: images a step.
        lr: learning rate at iteration 0.
        decay: k in lr exp(-k i), the learning rate at iteration i, for every method.
        runs: independent runs; run r uses seed + r for weights, batches and directions.
        seed: of the first run.
        directions: "normal" or "rademacher".
        rank_one: directions of weights are outer products of two random vectors.
        samples: directions a step, for the forward-gradient methods.
        every: steps between two looks at the validation set; their time does not count.
        compile: False runs the `fgd` methods as generated; a name that ends in -compiled compiles.
        mode: torch.compile's mode.
        skip_nonfinite: leaves steps out that are not finite, in place of stopping.

    Raises:
        ValueError: a number out of range, or an unknown name.

    Example:
        >>> Config(methods=("fgd", "backprop"), iterations=100, directions="rademacher")
    """

    methods: tuple[str, ...] = ("fgd", "backprop", "backprop-compiled")
    iterations: int = 1000
    batch: int = 64
    lr: float = 2e-4
    decay: float = 1e-4
    runs: int = 1
    seed: int = 0
    directions: str = "normal"
    rank_one: bool = False
    samples: int = 1
    every: int = 50
    compile: bool = True
    mode: str = "default"
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "runs", "samples", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"name each method once, not {', '.join(self.methods) or 'none'}")
        for method in self.methods:
            _known("method", method, METHODS)
        _known("kind of directions", self.directions, DIRECTIONS)
        _known("mode of torch.compile", self.mode, MODES)
        if not (0 < self.lr < math.inf and 0 <= self.decay < math.inf):
            raise ValueError(
                f"lr must be positive and decay not negative, not {self.lr} and {self.decay}"
            )

    @property
    def source(self) -> Directions:
        """Where directions come from."""
        return DIRECTIONS[self.directions](rank_one=self.rank_one)

    def rate(self, iteration: int) -> float:
        """The learning rate of one iteration."""
        return self.lr * math.exp(-self.decay * iteration)

    def compiles(self, method: str) -> bool:
        """Whether the step of a method is compiled."""
        return method.endswith("-compiled") or (method.startswith("fgd") and self.compile)


def fgd(model: nn.Module, config: Config, seed: int) -> Step:
    """Forward gradient descent, one graph a step."""
    trainer = FGD(
        model,
        cross_entropy,
        lr=config.lr,
        decay=config.decay,
        **_settings(config, seed),
    )
    return trainer.step


def _settings(config: Config, seed: int) -> dict[str, Any]:
    return {
        "directions": config.source,
        "samples": config.samples,
        "seed": seed,
        "compile": config.compile,
        "mode": config.mode,
        "nonfinite": "skip" if config.skip_nonfinite else "raise",
    }


def activities(model: nn.Module, config: Config, seed: int) -> Step:
    """Forward gradients by activity perturbation, one loss for each example, and SGD."""
    gradient = ForwardGradient(
        model,
        functools.partial(cross_entropy, reduction="none"),
        **_settings(config, seed),
        perturb="activations",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, fused=True)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.param_groups[0]["lr"] = config.rate(gradient.iteration)
        optimizer.zero_grad()
        loss = gradient(x, y)
        optimizer.step()
        return loss

    return step


def backprop(model: nn.Module, config: Config, seed: int, compiled: bool = False) -> Step:
    """Backpropagation and SGD; `compiled` compiles forward and backward, the update is fused.

    Only the loss is looked at for infinities: a look at every gradient would slow the rival down.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, fused=True)

    def objective(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y)

    run = _compiled(objective, config) if compiled else objective
    iteration = 0

    def step(x: Tensor, y: Tensor) -> Tensor:
        nonlocal iteration
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = config.rate(iteration)
        loss: Tensor = run(x, y)
        if torch.isfinite(loss):
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        else:
            _refuse(loss, iteration, config)
        iteration += 1
        return loss.detach()

    return step


def torch_jvp(
    model: nn.Module, config: Config, seed: int, compiled: bool = False, own: bool = False
) -> Step:
    """The peer: forward gradient descent over torch.func.jvp.

    Directions come from torch's generator where the step is eager, from hashed counters where it
    is compiled: each is the faster way there. `own` takes torch's own numbers in a compiled step,
    as one writes it without this package; they do not follow `seed`.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    device = next(iter(parameters.values())).device
    count = torch.zeros((), dtype=torch.int64, device=device)
    hashed = compiled and not own
    generator = None if own else torch.Generator(device).manual_seed(seed % 2**63)
    draw = _hashed(config, seed, count) if hashed else _generated(config, generator)

    def update(x: Tensor, y: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        def objective(*ps: Tensor) -> Tensor:
            out = functional_call(model, dict(zip(parameters, ps, strict=True)), (x,))
            return cross_entropy(out, y)

        rate = config.lr * torch.exp(-config.decay * count) / config.samples
        moves = [torch.zeros((), dtype=value.dtype, device=device) for value in values]
        finite = torch.ones((), dtype=torch.bool, device=device)
        for sample in range(config.samples):
            dots = draw(values, sample)
            loss, slope, *_ = torch.func.jvp(objective, tuple(values), tuple(dots))
            moves = [move + dot * (rate * slope) for move, dot in zip(moves, dots, strict=True)]
            finite = finite & torch.isfinite(loss) & torch.isfinite(slope)
        for value, move in zip(values, moves, strict=True):
            value.sub_(torch.where(finite, move, 0.0))
        return loss, finite

    run = _compiled(update, config) if compiled else update

    @torch.no_grad()
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss, finite = run(x, y, [p.detach() for p in parameters.values()])
        if not finite:
            _refuse(loss, int(count), config)
        count.add_(1)
        return loss.clone()

    return step


METHODS: dict[str, Callable[[nn.Module, Config, int], Step]] = {
    "fgd": fgd,
    "fgd-activations": activities,
    "backprop": backprop,
    "backprop-compiled": functools.partial(backprop, compiled=True),
    "torch-jvp": torch_jvp,
    "torch-jvp-compiled": functools.partial(torch_jvp, compiled=True),
    "torch-jvp-randn-compiled": functools.partial(torch_jvp, compiled=True, own=True),
}


def _compiled(function: Callable[..., object], config: Config) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False, mode=config.mode)


def _refuse(loss: Tensor, iteration: int, config: Config) -> None:
    if not config.skip_nonfinite:
        raise NonFiniteError(
            f"iteration {iteration}: the loss ({loss.item():g}) or its derivative is not finite; "
            "this step changed nothing. Lower the learning rate, or leave such steps out."
        )


def _hashed(config: Config, seed: int, count: Tensor) -> Draw:
    start = torch.full_like(count, seed)

    def draw(values: list[Tensor], sample: int) -> list[Tensor]:
        keys = stream_keys(start, count, config.samples, len(values))[sample]
        drawn = [
            config.source.draw(value.shape, key=key, dtype=value.dtype)
            for key, value in zip(keys, values, strict=True)
        ]
        return [dense_tensor(dot) for dot in drawn]

    return draw


def _generated(config: Config, generator: torch.Generator | None) -> Draw:
    def numbers(like: Tensor) -> Tensor:
        if config.directions == "normal":
            return torch.empty_like(like).normal_(generator=generator)
        bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
        return (bits * 2 - 1).to(like.dtype)

    def one(value: Tensor) -> Tensor:
        if config.rank_one and value.ndim > 1:
            return RankOne(numbers(value.flatten(1)[:, 0]), numbers(value[0])).dense()
        return numbers(value)

    def draw(values: list[Tensor], sample: int) -> list[Tensor]:
        return [one(value) for value in values]

    return draw


def _known(what: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise ValueError(f"no {what} is called {name!r}; there are {', '.join(names)}")
