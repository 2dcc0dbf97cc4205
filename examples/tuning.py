"""One search of the learning rate for all methods of a comparison: runs on a geometric grid.

A fixed fifth of the training set is held out from the search; the validation set is never looked
at. Each method trains once at each rate, and the rate of the lowest loss on what was held out
wins. A run that stops, or whose loss grows tenfold, loses. While the best rate is at an end of the
grid, the grid goes on there by its own factor; then it may be made finer around the best.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import figures
import torch
from figures import Line
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fwdcompile.config import Config
from fwdcompile.data import Dataset, batches
from fwdcompile.errors import NonFiniteError
from fwdcompile.log import finite
from fwdcompile.methods import METHODS

LINES = "tuning.jsonl"
# further rates at either end of a grid
MOST = 12
# one part in so many of the training set is held out
SHARE = 5
Losses = dict[float, float]


def tuned(
    build: Callable[[], nn.Module],
    data: Dataset,
    config: Config,
    methods: Sequence[str],
    rates: Sequence[float],
    folder: Path,
    halvings: int = 0,
) -> tuple[str, ...]:
    """The methods, each with its best learning rate behind its name.

    Args:
        build: makes a fresh model; called under the config's seed.
        data: of which the training set is used, alone.
        config: of the runs, `iterations` steps each; its methods and its rate are not read.
        methods: as `Config` names them, without a rate of their own.
        rates: a geometric grid of at least two, rising, equal for all methods.
        folder: keeps `tuning.jsonl`, a line for each run; runs that are there are not done again.
        halvings: how often two more rates, halfway to the neighbours of the best, are tried.

    Raises:
        ValueError: no run of a method ended well, or the lines there are of another search.
    """
    path, split = folder / LINES, data.held_out(len(data.train[1]) // SHARE)
    _begun(path, split, config)

    def rate_of(method: str) -> float:
        loss_at = functools.partial(_kept, path, build, split, config, method)
        return best(search(loss_at, rates, halvings), method)

    return tuple(f"{method}:lr={rate_of(method):g}" for method in methods)


def bare(method: str) -> str:
    """A method without the rate behind its name."""
    return ":".join(part for part in method.split(":") if not part.startswith("lr="))


def search(loss_at: Callable[[float], float], rates: Sequence[float], halvings: int = 0) -> Losses:
    """Losses by rate, over the grid and beyond its ends until the lowest is between two others."""
    losses = {rate: loss_at(rate) for rate in rates}
    factor = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))

    def attempt(rate: float) -> None:
        rate = figures.short(rate)
        losses[rate] = loss_at(rate)

    for _ in range(MOST):
        least, most, lowest = min(losses), max(losses), _lowest(losses)
        # where all lose, smaller rates may not
        if lowest == least or losses[lowest] == math.inf:
            attempt(least / factor)
        elif lowest == most:
            attempt(most * factor)
        else:
            break
    for _ in range(halvings):
        factor, lowest = math.sqrt(factor), _lowest(losses)
        attempt(lowest / factor)
        attempt(lowest * factor)
    return losses


def _lowest(losses: Losses) -> float:
    return min(losses, key=lambda rate: losses[rate])


def best(losses: Losses, method: str) -> float:
    """The rate of the lowest loss."""
    rate = _lowest(losses)
    if losses[rate] == math.inf:
        raise ValueError(f"{method}: no rate from {min(losses):g} to {max(losses):g} ended well")
    return rate


def trial(
    build: Callable[[], nn.Module], split: Dataset, config: Config, method: str, rate: float
) -> float:
    """The loss on what was held out after a run; infinite where it stopped or diverged."""
    name, own = config.of(f"{method}:lr={rate!r}")
    torch.manual_seed(config.seed)
    model = build().to(split.train[0].device)
    step = METHODS[name](model, own, config.seed)
    first: float | None = None
    for x, y in itertools.islice(batches(split.train, own.batch, own.seed), own.iterations):
        try:
            loss = float(step(x, y))
        except NonFiniteError:
            return math.inf
        first = loss if first is None else first
        if not loss <= 10 * first:
            return math.inf
    loss = validation(model, split.validation)
    return loss if first is not None and loss <= 10 * first else math.inf


@torch.no_grad()
def validation(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    model.eval()
    return float(cross_entropy(model(part[0]), part[1]))


def _begun(path: Path, split: Dataset, config: Config) -> None:
    """Writes the header of a search, or looks whether the lines there are of the same one."""
    settings: Line = {
        "config": _settings(config),
        "examples": [len(labels) for _, labels in (split.train, split.validation)],
    }
    if not path.exists():
        figures.write(path, [figures.header(split.train[0].device, **settings)])
    there = figures.read(path)[0]
    there["config"] = _settings(Config()) | there["config"]  # of before a setting was new
    for name, mine in settings.items():
        if there[name] != mine:
            raise ValueError(f"{path} is of another search: {name} was {there[name]}, is {mine}")


def _settings(config: Config) -> Line:
    """Those that a search reads, as JSON has them."""
    read = {name: x for name, x in asdict(config).items() if name not in ("methods", "lr")}
    settings: Line = json.loads(json.dumps(finite(read)))
    return settings


def _kept(
    path: Path,
    build: Callable[[], nn.Module],
    split: Dataset,
    config: Config,
    method: str,
    rate: float,
) -> float:
    """The loss of a run, from its line where there is one."""
    names: Line = {"kind": "rate", "method": method, "rate": rate}
    found = figures.of(figures.read(path)[1], **names)
    if not found:
        loss = trial(build, split, config, method, rate)
        found = [names | {"loss": loss if math.isfinite(loss) else None}]
        figures.append(path, found)
    loss = found[0]["loss"]
    return math.inf if loss is None else loss
