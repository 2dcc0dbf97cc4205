"""What a comparison found: the traces of its runs, the paper's measures, the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .config import Config
from .log import MEASURES, read
from .measure import ratio

# what the base runtime goes by among the methods, eager and compiled
BASES = {False: "base", True: "base-compiled"}


@dataclass
class Trace:
    """One run of one method: what each look at the validation set found, and the time of steps.

    Attributes:
        method: as the config names it.
        run: its number, from 0.
        iterations: steps taken before each look; the first look is before the first step.
        train_loss: mean minibatch loss since the look before; NaN at the first.
        validation_loss: over the whole validation set.
        accuracy: over the whole validation set, from 0 to 1.
        stopped: why the run ended early, or "".
        weights: SHA-256 of the parameters and buffers in the end, to tell equal runs by.
    """

    method: str
    run: int
    iterations: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    stopped: str = ""
    weights: str = ""


@dataclass(frozen=True)
class Row:
    """The measures of one method over its runs, as in section 5.2 of the paper.

    Attributes:
        method: as the config names it.
        train_loss: at the end, mean over runs; the other two likewise.
        validation_loss: see `Trace`.
        accuracy: see `Trace`.
        ms: median milliseconds of a step.
        r: step time over the base runtime of the same kind, eager or compiled: Rf or Rb; the
            median over turns, as is the next.
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
        turns: seconds of a step by method, measured in turns; those of the base runtime, too,
            under the names in `BASES`.
        traces: one for each method and run.

    Example:
        >>> [(row.method, row.r) for row in report.rows()]
    """

    config: Config
    turns: dict[str, list[float]]
    traces: list[Trace]

    @staticmethod
    def read(path: Path) -> Report:
        """The report that a log holds, `log.jsonl` or a copy of it."""
        records = read(path)
        names = {field.name for field in fields(Config)}
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in records[0]["config"].items()
            if name in names and value is not None
        }
        # more runs than at first, where a comparison was resumed for more
        settings["runs"] = max(r.get("runs", 1) for r in (settings, *records))
        config = Config(**settings)
        turns = {r["method"]: r["seconds"] for r in records if r["kind"] == "time"}
        traces: dict[tuple[str, int], Trace] = {}
        for record in records:
            if record["kind"] == "step":
                key = record["method"], record["run"]
                trace = traces.setdefault(key, Trace(*key))
                trace.iterations.append(record["iteration"])
                for name in MEASURES:
                    value = record[name]
                    getattr(trace, name).append(math.nan if value is None else value)
            if record["kind"] == "end":
                trace = traces[record["method"], record["run"]]
                trace.stopped, trace.weights = record["stopped"], record["weights"]
        return Report(config, turns, list(traces.values()))

    def step_seconds(self, method: str) -> float:
        """Median seconds of a step."""
        return statistics.median(self.turns[method])

    def seconds(self, trace: Trace) -> list[float]:
        """Training time at each look: its iterations times the seconds of a step."""
        return [i * self.step_seconds(trace.method) for i in trace.iterations]

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
        each = [dict(zip(trace.iterations, trace.validation_loss, strict=True)) for trace in traces]
        losses = [statistics.fmean(curve[i] for curve in each) for i in sorted(shared)]
        return [i * self.step_seconds(method) for i in sorted(shared)], losses

    def _row(self, method: str) -> Row:
        traces, rival = self.of(method), self._rival(method)
        return Row(
            method,
            train_loss=_last([trace.train_loss for trace in traces]),
            validation_loss=_last([trace.validation_loss for trace in traces]),
            accuracy=_last([trace.accuracy for trace in traces]),
            ms=self.step_seconds(method) * 1e3,
            r=ratio(self.turns, method, BASES[self.config.compiles(method)]),
            r_ratio=ratio(self.turns, method, rival) if rival else None,
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
            by_time.plot(report.seconds(trace), trace.validation_loss, **style)
    by_iteration.set(xlabel="iteration", ylabel="validation loss")
    by_time.set(xlabel="seconds of training")
    by_iteration.legend()
    figure.suptitle(title)
    figure.savefig(path)


def _last(curves: Sequence[Sequence[float]]) -> float:
    return statistics.fmean(curve[-1] for curve in curves)
