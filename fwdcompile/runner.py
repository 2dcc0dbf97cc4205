"""The runner: trains methods side by side on the same data and measures them as the paper does."""

from __future__ import annotations

import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .data import Dataset, batches
from .directions import Directions, Normal, Rademacher, stream_key
from .errors import NonFiniteError
from .fgd import FGD

WARM_UP = 3
DIRECTIONS: dict[str, type[Directions]] = {"normal": Normal, "rademacher": Rademacher}
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """What a comparison trains, and how long.

    Attributes:
        methods: names from `METHODS`.
        iterations: steps of each method; equal for all, as in the paper.
        batch: images a step.
        lr, decay: the learning rate is lr exp(-decay i) at iteration i, for every method.
        runs: independent runs; run r uses seed + r for weights, batches and directions.
        directions: "normal" or "rademacher".
        samples: directions a step, for the forward-gradient methods.
        every: steps between two looks at the validation set; their time does not count.
        compile: compiles the forward-gradient step.
        skip_nonfinite: leaves steps out that are not finite, in place of stopping.
    """

    methods: tuple[str, ...] = ("fgd", "backprop", "backprop-compiled")
    iterations: int = 1000
    batch: int = 64
    lr: float = 2e-4
    decay: float = 1e-4
    runs: int = 1
    seed: int = 0
    directions: str = "normal"
    samples: int = 1
    every: int = 50
    compile: bool = True
    mode: str = "default"
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "runs", "samples", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if unknown := [m for m in self.methods if m not in METHODS]:
            raise ValueError(f"no method is called {unknown[0]!r}; there are {', '.join(METHODS)}")
        if self.directions not in DIRECTIONS:
            raise ValueError(f"directions are {' or '.join(DIRECTIONS)}, not {self.directions!r}")
        if not self.lr > 0 or self.decay < 0:
            raise ValueError("lr must be positive and decay not negative")


@dataclass
class Trace:
    """One run of one method: what it reached, when, and how long its steps took."""

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
        """Median seconds of a step, the first ones (compilation) left out."""
        return statistics.median(self.step_seconds[WARM_UP:] or self.step_seconds or [math.nan])

    @property
    def seconds(self) -> list[float]:
        """Training time at each look: what compiling steps took beyond the median is left out."""
        warm = [min(s, self.step_median) for s in self.step_seconds[:WARM_UP]]
        clock = [0.0, *itertools.accumulate(warm + self.step_seconds[WARM_UP:])]
        return [clock[i] for i in self.iterations]


# Methods. Each takes a model that it trains in place.


def _fgd(model: nn.Module, config: Config, seed: int) -> Step:
    fgd = FGD(
        model,
        F.cross_entropy,
        lr=config.lr,
        decay=config.decay,
        directions=DIRECTIONS[config.directions](),
        samples=config.samples,
        seed=seed,
        compile=config.compile,
        mode=config.mode,
        nonfinite="skip" if config.skip_nonfinite else "raise",
    )
    return fgd.step


def _backprop(model: nn.Module, config: Config, seed: int, compiled: bool = False) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, math.exp(-config.decay))

    def objective(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    run = torch.compile(objective, fullgraph=True, mode=config.mode) if compiled else objective

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = run(x, y)
        if torch.isfinite(loss):
            loss.backward()
            optimizer.step()
        elif not config.skip_nonfinite:
            raise NonFiniteError(f"the loss is {float(loss)}; the weights are the last good ones")
        schedule.step()
        return loss.detach()

    return step


def _torch_jvp(model: nn.Module, config: Config, seed: int, compiled: bool = False) -> Step:
    """FGD over torch.func.jvp: the peer, with the same directions."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    source = DIRECTIONS[config.directions]()
    count = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)
    start = torch.full_like(count, seed)

    def update(x: Tensor, y: Tensor, values: list[Tensor], count: Tensor) -> tuple[Tensor, Tensor]:
        rate = config.lr * torch.exp(-config.decay * count)
        moves = [torch.zeros_like(value) for value in values]
        for k in range(config.samples):
            key = stream_key(start, count, k)
            dots = [
                source.draw(value.shape, key=key, parameter=i, dtype=value.dtype)
                for i, value in enumerate(values)
            ]

            def objective(*ps: Tensor) -> Tensor:
                out = functional_call(model, dict(zip(names, ps, strict=True)), (x,))
                return F.cross_entropy(out, y)

            loss, slope = torch.func.jvp(objective, tuple(values), tuple(dots))
            scale = rate * slope / config.samples
            moves = [move + dot * scale for move, dot in zip(moves, dots, strict=True)]
        finite = torch.isfinite(loss) & torch.isfinite(slope)
        for value, move in zip(values, moves, strict=True):
            value.sub_(torch.where(finite, move, 0.0))
        return loss, finite

    run = torch.compile(update, fullgraph=True) if compiled else update

    @torch.no_grad()
    def step(x: Tensor, y: Tensor) -> Tensor:
        parameters = dict(model.named_parameters())
        loss, finite = run(x, y, [parameters[name].detach() for name in names], count)
        if not finite and not config.skip_nonfinite:
            raise NonFiniteError(f"the loss is {float(loss)}; the weights are the last good ones")
        count.add_(1)
        return loss

    return step


METHODS: dict[str, Callable[[nn.Module, Config, int], Step]] = {
    "fgd": _fgd,
    "backprop": _backprop,
    "backprop-compiled": lambda m, c, s: _backprop(m, c, s, compiled=True),
    "torch-jvp": _torch_jvp,
    "torch-jvp-compiled": lambda m, c, s: _torch_jvp(m, c, s, compiled=True),
}
_EAGER = ("backprop", "torch-jvp")


class Runner:
    """Trains every method of a config from equal weights on equal batches.

    Args:
        build: makes a fresh model; called under a seed, so that all methods start alike.
        data: what to train and validate on.
        config: the comparison.
        log: a directory for `log.jsonl` and, with `tensorboard`, event files.
        progress: called after each step with the method's name.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        data: Dataset,
        config: Config,
        *,
        log: Path | None = None,
        tensorboard: bool = False,
        progress: Callable[[str], None] = lambda method: None,
    ) -> None:
        self.build, self.data, self.config = build, data, config
        self.progress = progress
        self.device = data.train[0].device
        self._log = _Log(log, tensorboard)

    def run(self) -> Report:
        """Trains, measures and returns the report."""
        self._log.write({"kind": "header", **header(self.device), "config": asdict(self.config)})
        base = {"eager": self.base_seconds(False)}
        if any(m not in _EAGER for m in self.config.methods) and self.config.compile:
            base["compiled"] = self.base_seconds(True)
        self._log.write({"kind": "base", **base})
        traces = []
        for run in range(self.config.runs):
            for method in self.config.methods:
                traces.append(self.train(method, run))
        self._log.close()
        return Report(self.config, base, traces)

    def train(self, method: str, run: int) -> Trace:
        """One method, one run. A loss that is not finite ends it; the weights stay good."""
        torch._dynamo.reset()
        config, seed = self.config, self.config.seed + run
        model = self._model(seed)
        step = METHODS[method](model, config, seed)
        trace, stream = Trace(method, run), batches(self.data.train, config.batch, seed)
        self._look(trace, model, 0, math.nan)
        for i in range(1, config.iterations + 1):
            x, y = next(stream)
            began = time.perf_counter()
            try:
                loss = step(x, y)
            except NonFiniteError as error:
                trace.stopped = f"iteration {i}: {error}"
                break
            _synchronize(self.device)
            trace.step_seconds.append(time.perf_counter() - began)
            self.progress(method)
            if i % config.every == 0 or i == config.iterations:
                self._look(trace, model, i, float(loss))
        return trace

    def base_seconds(self, compiled: bool, repeats: int = 50) -> float:
        """Runtime of f, section 5.2: forward and loss of one batch, no derivative, no update."""
        torch._dynamo.reset()
        model = self._model(self.config.seed)
        x, y = next(batches(self.data.train, self.config.batch, self.config.seed))

        def objective(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(model(x), y)

        run = torch.compile(objective, fullgraph=True) if compiled else objective
        times = []
        with torch.no_grad():
            for _ in range(repeats + 5):
                began = time.perf_counter()
                run(x, y)
                _synchronize(self.device)
                times.append(time.perf_counter() - began)
        return statistics.median(times[5:])

    def _model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().to(self.device)

    @torch.no_grad()
    def _look(self, trace: Trace, model: nn.Module, i: int, loss: float) -> None:
        images, labels = self.data.validation
        was_training = model.training
        model.eval()
        total, right = 0.0, 0
        for x, y in zip(images.split(1000), labels.split(1000), strict=True):
            out = model(x)
            total += float(F.cross_entropy(out, y, reduction="sum"))
            right += int((out.argmax(1) == y).sum())
        model.train(was_training)
        trace.iterations.append(i)
        trace.train_loss.append(loss)
        trace.validation_loss.append(total / len(labels))
        trace.accuracy.append(right / len(labels))
        self._log.write(
            {
                "kind": "step",
                "method": trace.method,
                "run": trace.run,
                "iteration": i,
                "seconds": trace.seconds[-1],
                "train_loss": None if math.isnan(loss) else loss,
                "validation_loss": total / len(labels),
                "accuracy": right / len(labels),
            }
        )


class _Log:
    """JSON lines, and TensorBoard events if asked for."""

    def __init__(self, folder: Path | None, tensorboard: bool) -> None:
        self._file = None
        self._writer: Any = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / "log.jsonl").open("w", encoding="utf-8")
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]

    def write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._writer is not None and record["kind"] == "step":
            for name in ("train_loss", "validation_loss", "accuracy"):
                if record[name] is not None:
                    tag = f"{name}/{record['method']}-{record['run']}"
                    self._writer.add_scalar(tag, record[name], record["iteration"])

    def close(self) -> None:
        for stream in (self._file, self._writer):
            if stream is not None:
                stream.close()


@dataclass(frozen=True)
class Report:
    """What a comparison found; ratios are those of the paper's section 5.2."""

    config: Config
    base: dict[str, float]
    traces: list[Trace]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each method, over its runs.

        `R` is the step time over the base runtime of the same kind (eager or compiled). Behind a
        forward-gradient method, `R_ratio` is Rf/Rb and `T_ratio` Tf/Tb against compiled backprop,
        or eager where that was not run; None where a time was not reached.
        """
        return [self._row(method) for method in self.config.methods]

    def _of(self, method: str) -> list[Trace]:
        return [trace for trace in self.traces if trace.method == method]

    def _row(self, method: str) -> dict[str, Any]:
        traces = self._of(method)
        eager = method in _EAGER or not self.config.compile
        seconds = statistics.median(t.step_median for t in traces)
        base = self.base["eager" if eager else "compiled"]
        row = {
            "method": method,
            "train_loss": statistics.fmean(t.train_loss[-1] for t in traces),
            "validation_loss": statistics.fmean(t.validation_loss[-1] for t in traces),
            "accuracy": statistics.fmean(t.accuracy[-1] for t in traces),
            "ms": seconds * 1e3,
            "R": seconds / base,
            "R_ratio": None,
            "T_ratio": None,
            "stopped": next((t.stopped for t in traces if t.stopped), ""),
        }
        rival = self._rival()
        if rival and not method.startswith("backprop"):
            row["R_ratio"] = seconds / statistics.median(t.step_median for t in self._of(rival))
            row["T_ratio"] = self._time_ratio(method, rival)
        return row

    def _rival(self) -> str | None:
        names = ("backprop-compiled", "backprop")
        return next((name for name in names if name in self.config.methods), None)

    def _time_ratio(self, method: str, rival: str) -> float | None:
        """Tf/Tb: when the mean validation loss first is as low as backprop's lowest."""
        rival_time, rival_loss = self.mean_curve(rival)
        lowest = min(rival_loss)
        reached = rival_time[rival_loss.index(lowest)]
        for seconds, loss in zip(*self.mean_curve(method), strict=True):
            if loss <= lowest and reached > 0:
                return seconds / reached
        return None

    def mean_curve(self, method: str) -> tuple[list[float], list[float]]:
        """Seconds and validation loss at each look, averaged over runs."""
        traces = self._of(method)
        seconds = [statistics.fmean(s) for s in zip(*(t.seconds for t in traces), strict=False)]
        looks = zip(*(t.validation_loss for t in traces), strict=False)
        return seconds, [statistics.fmean(losses) for losses in looks]


def plot(report: Report, path: str | Path, title: str = "") -> None:
    """Draws validation loss against iteration and against training time; needs matplotlib.

    Args:
        report: of a finished run.
        path: where to write; the suffix chooses the format.
        title: above the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_iteration, by_time = figure.subplots(1, 2, sharey=True)
    for number, method in enumerate(report.config.methods):
        for trace in report._of(method):
            label = method if trace.run == 0 else None
            style: dict[str, Any] = {"color": f"C{number}", "label": label, "alpha": 0.8}
            by_iteration.plot(trace.iterations, trace.validation_loss, **style)
            by_time.plot(trace.seconds, trace.validation_loss, **style)
    by_iteration.set(xlabel="iteration", ylabel="validation loss")
    by_time.set(xlabel="seconds of training")
    by_iteration.legend()
    figure.suptitle(title)
    figure.savefig(path)


def header(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for the first line of a log."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": gpu or _processor(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
