"""What a comparison found: the traces of its runs, the paper's measures, the picture."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .methods import Config

WARM_UP = 3


@dataclass
class Trace:
    """One run of one method: what each look at the validation set found, and the time of steps.

    Attributes:
        method: name from `METHODS`.
        run: its number, from 0.
        iterations: steps taken before each look; the first look is before the first step.
        train_loss: mean minibatch loss since the look before; NaN at the first.
        validation_loss: over the whole validation set.
        accuracy: over the whole validation set, from 0 to 1.
        step_seconds: of every step.
        stopped: why the run ended early, or "".
    """

    method: str
    run: int
    iterations: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    stopped: str = ""

    @property
    def step_median(self) -> float:
        """Median seconds of a step; the first ones, which may compile, are left out."""
        return statistics.median(self.step_seconds[WARM_UP:] or self.step_seconds or [math.nan])

    @property
    def seconds(self) -> list[float]:
        """Training time at each look; a first step counts as a median one at most."""
        warm = [min(s, self.step_median) for s in self.step_seconds[:WARM_UP]]
        clock = [0.0, *itertools.accumulate(warm + self.step_seconds[WARM_UP:])]
        return [clock[i] for i in self.iterations]


@dataclass(frozen=True)
class Row:
    """The measures of one method over its runs, as in section 5.2 of the paper.

    Attributes:
        method: name from `METHODS`.
        train_loss: at the end, mean over runs; the other two likewise.
        validation_loss: see `Trace`.
        accuracy: see `Trace`.
        ms: median milliseconds of a step.
        r: step time over the base runtime of the same kind, eager or compiled: Rf or Rb.
        r_ratio: Rf/Rb, the step time over that of the rival; None for backpropagation itself.
        t_ratio: Tf/Tb; None where the rival's lowest validation loss was never reached.
        stopped: why a run ended early, or "".
    """

    method: str
    train_loss: float
    validation_loss: float
    accuracy: float
    ms: float
    r: float
    r_ratio: float | None
    t_ratio: float | None
    stopped: str


@dataclass(frozen=True)
class Report:
    """The traces of a comparison; `rows()` has the table.

    Attributes:
        config: what was compared.
        base: base runtime in seconds by kind, "eager" or "compiled".
        traces: one for each method and run.

    Example:
        >>> [(row.method, row.r) for row in report.rows()]
    """

    config: Config
    base: dict[str, float]
    traces: list[Trace]

    def rows(self) -> list[Row]:
        """One row for each method.

        A forward-gradient method is set against the backpropagation of its own kind (eager or
        compiled), or the other one where its own was not run.
        """
        return [self._row(method) for method in self.config.methods]

    def of(self, method: str) -> list[Trace]:
        """The traces of one method."""
        return [trace for trace in self.traces if trace.method == method]

    def mean_curve(self, method: str) -> tuple[list[float], list[float]]:
        """Seconds and validation loss, averaged over runs, at the looks that all runs reached."""
        traces = self.of(method)
        shared = set.intersection(*(set(trace.iterations) for trace in traces))
        seconds, losses = [], []
        for i in sorted(shared):
            places = [trace.iterations.index(i) for trace in traces]
            pairs = list(zip(traces, places, strict=True))
            seconds.append(statistics.fmean(trace.seconds[place] for trace, place in pairs))
            losses.append(statistics.fmean(trace.validation_loss[place] for trace, place in pairs))
        return seconds, losses

    def _row(self, method: str) -> Row:
        traces, rival = self.of(method), self._rival(method)
        seconds = _step(traces)
        return Row(
            method,
            train_loss=_last([trace.train_loss for trace in traces]),
            validation_loss=_last([trace.validation_loss for trace in traces]),
            accuracy=_last([trace.accuracy for trace in traces]),
            ms=seconds * 1e3,
            r=seconds / self.base["compiled" if self.config.compiles(method) else "eager"],
            r_ratio=seconds / _step(self.of(rival)) if rival else None,
            t_ratio=self._time_ratio(method, rival) if rival else None,
            stopped=next((trace.stopped for trace in traces if trace.stopped), ""),
        )

    def _rival(self, method: str) -> str | None:
        rivals = [name for name in self.config.methods if name.startswith("backprop")]
        if method in rivals or not rivals:
            return None
        own = [n for n in rivals if self.config.compiles(n) == self.config.compiles(method)]
        return (own or rivals)[0]

    def _time_ratio(self, method: str, rival: str) -> float | None:
        """Tf/Tb: the time to the rival's lowest mean validation loss, over the rival's own."""
        rival_seconds, rival_losses = self.mean_curve(rival)
        lowest = min(rival_losses)
        needed = rival_seconds[rival_losses.index(lowest)]
        for seconds, loss in zip(*self.mean_curve(method), strict=True):
            if loss <= lowest and needed > 0:
                return seconds / needed
        return None


def plot(report: Report, path: str | Path, title: str = "") -> None:
    """Draws validation loss against iteration and against training time; needs matplotlib.

    Args:
        report: of a finished comparison.
        path: where to write; the suffix (`.png`, `.svg`, `.pdf`) chooses the format.
        title: above the picture.

    Example:
        >>> plot(report, "runs/loss.svg", "the paper's MLP on digits")
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_iteration, by_time = figure.subplots(1, 2, sharey=True)
    for number, method in enumerate(report.config.methods):
        for trace in report.of(method):
            label = method if trace.run == 0 else None
            style: dict[str, Any] = {"color": f"C{number}", "label": label, "alpha": 0.8}
            by_iteration.plot(trace.iterations, trace.validation_loss, **style)
            by_time.plot(trace.seconds, trace.validation_loss, **style)
    by_iteration.set(xlabel="iteration", ylabel="validation loss")
    by_time.set(xlabel="seconds of training")
    by_iteration.legend()
    figure.suptitle(title)
    figure.savefig(path)


def _step(traces: Sequence[Trace]) -> float:
    return statistics.median(trace.step_median for trace in traces)


def _last(curves: Sequence[Sequence[float]]) -> float:
    return statistics.fmean(curve[-1] for curve in curves)
