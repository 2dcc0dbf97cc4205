"""What a comparison trains: methods, each with settings of its own where it has any."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .directions import Directions, Normal, Rademacher, Sphere
from .fgd import check_rate
from .stepper import counted
from .workers import SHARES

NAMES = (
    "fgd",
    "backprop",
    "backprop-compiled",
    "torch-jvp",
    "torch-jvp-compiled",
    "torch-jvp-randn-compiled",
)
DIRECTIONS: dict[str, Callable[[bool], Directions]] = {
    "normal": Normal,
    "rademacher": Rademacher,
    "sphere": Sphere,
    "orthogonal": lambda rank_one: Sphere(rank_one, orthogonal=True),
}
_TORCH = ("normal", "rademacher")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
PERTURBED = ("weights", "activations")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": functools.partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
}
_RATE, _DRAWN = ("lr", "decay"), ("directions", "rank_one", "samples")
# What a method may have of its own, by its first word.
OWN = {
    "fgd": (*_RATE, *_DRAWN, "perturb", "optimizer", "clip"),
    "backprop": (*_RATE, "optimizer"),
    "torch": (*_RATE, *_DRAWN),
}


@dataclass(frozen=True)
class Config:
    """What a comparison trains, and how long.

    Attributes:
        methods: names from `NAMES`, each with settings of its own behind it where it differs:
            `fgd:lr=1e-3:samples=16`, of those that `OWN` lists for it.
        iterations: steps of each method; equal for all, as in the paper.
        batch: images a step.
        lr: learning rate at iteration 0.
        decay: k in lr exp(-k i), the learning rate at iteration i, for every method.
        runs: independent runs; run r uses seed + r for weights, batches and directions.
        seed: of the first run.
        directions: "normal", "rademacher", "sphere" or "orthogonal" (on the sphere).
        rank_one: directions of weights are outer products of two random vectors.
        samples: directions a step, for the forward-gradient methods; where activations are
            perturbed, a tuple has a number for each layer (`fgd:perturb=activations:samples=1/16`).
        perturb: "weights" or "activations"; see `ForwardGradient`.
        optimizer: "sgd", "momentum" (0.9) or "adam".
        clip: the most a directional derivative of `fgd` may be; inf cuts nothing off.
        every: steps between two looks at the validation set, and between two checkpoints.
        compile: False runs `fgd` as generated; a name that ends in -compiled compiles.
        mode: torch.compile's mode.
        skip_nonfinite: leaves steps out that are not finite, in place of stopping.
        share: what many workers share: "data", each has its part of the batch; or "directions",
            each takes `samples` of its own, on the whole batch. One process does not look at it.

    Raises:
        ValueError: a number out of range, an unknown name, or settings that do not go together.

    Example:
        >>> Config(methods=("fgd:samples=4", "backprop"), iterations=100, directions="rademacher")
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
    samples: int | tuple[int, ...] = 1
    perturb: str = "weights"
    optimizer: str = "sgd"
    clip: float = math.inf
    every: int = 50
    compile: bool = True
    mode: str = "default"
    skip_nonfinite: bool = False
    share: str = "data"

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "runs", "samples", "every"):
            given = getattr(self, name)
            numbers = counted(name, given, several=name == "samples")
            whole = numbers if isinstance(given, Sequence) else numbers[0]
            object.__setattr__(self, name, whole)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"name each method once, not {', '.join(self.methods) or 'none'}")
        _known("kind of directions", self.directions, DIRECTIONS)
        _known("mode of torch.compile", self.mode, MODES)
        _known("optimizer", self.optimizer, OPTIMIZERS)
        _known("thing to perturb", self.perturb, PERTURBED)
        _known("thing to share", self.share, SHARES)
        check_rate(self.lr, self.decay)
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, not {self.clip}")
        self._check_together()
        for method in self.methods:
            self.of(method)

    def _check_together(self) -> None:
        source = self.source
        if self.perturb == "activations" and isinstance(source, Sphere):
            raise ValueError(f"activations are perturbed by normal or rademacher, not {source}")
        if self.perturb == "weights" and not isinstance(self.samples, int):
            raise ValueError(f"samples={self.samples} is for the layers of perturb=activations")

    @property
    def source(self) -> Directions:
        """Where directions come from."""
        return DIRECTIONS[self.directions](self.rank_one)

    def of(self, method: str) -> tuple[str, Config]:
        """The bare name of a method, and the config with the method's own settings in it."""
        name, *settings = method.split(":")
        _known("method", name, NAMES)
        kinds = {field.name: type(field.default) for field in fields(self)}
        own: dict[str, Any] = {}
        for setting in settings:
            key, _, text = setting.partition("=")
            _known(f"setting of {name}", key, OWN[name.split("-")[0]])
            own[key] = parsed(kinds[key], setting, text)
        config = replace(self, methods=(name,), **own) if own else self
        if name.startswith("torch") and (
            config.optimizer != "sgd" or config.directions not in _TORCH
        ):
            raise ValueError(f"{name} is plain gradient descent along {' or '.join(_TORCH)}")
        if name.startswith("torch") and config.perturb != "weights":
            raise ValueError(f"{name} perturbs weights alone")
        return name, config

    def rate(self, iteration: int) -> float:
        """The learning rate of one iteration."""
        return self.lr * math.exp(-self.decay * iteration)

    def compiles(self, method: str) -> bool:
        """Whether the step of a method is compiled."""
        name = method.split(":")[0]
        return name.endswith("-compiled") or (name == "fgd" and self.compile)


def parsed(kind: type, setting: str, text: str) -> Any:
    """What a text says: `true`, `16`, `1/16/10` (a tuple), `1e-3` or a word.

    Raises:
        ValueError: it says nothing of that kind.
    """
    try:
        if kind is bool:
            return {"true": True, "false": False}[text]
        numbers = [kind(part) for part in text.split("/")]
        return numbers[0] if len(numbers) == 1 else tuple(numbers)
    except (KeyError, ValueError):
        raise ValueError(f"{setting!r} needs a value of type {kind.__name__}") from None


def _known(what: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise ValueError(f"no {what} is called {name!r}; there are {', '.join(names)}")
