"""The runner: trains methods side by side on the same data and measures them as the paper does."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import __version__
from .costs import device_name
from .data import Dataset, batches
from .errors import NonFiniteError
from .methods import METHODS, Config
from .report import WARM_UP, Report, Trace

BASE_REPEATS = 50
VALIDATION_BATCH = 1000


class Runner:
    """Trains every method of a config from equal weights on equal batches.

    Args:
        build: makes a fresh model; called under a seed, so that all methods start alike.
        data: what to train and validate on, on the device to use.
        config: the comparison.
        log: a directory for `log.jsonl` (a header, the base runtimes, a line for each look at the
            validation set, a line for each method's result); None writes nothing.
        tensorboard: writes TensorBoard's event files there, too.
        progress: called after each step with the method's name.

    Example:
        >>> data = load("digits")
        >>> build = lambda: mlp(data.shape, data.classes)
        >>> report = Runner(build, data, Config(iterations=100)).run()
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
        self.log, self.tensorboard, self.progress = log, tensorboard, progress
        self.device = data.train[0].device

    def run(self) -> Report:
        """Trains, measures and returns the report."""
        config = self.config
        with _Log(self.log, self.tensorboard) as log:
            log.write({"kind": "header", **environment(self.device), "config": asdict(config)})
            base = {
                kind: self.base_seconds(kind == "compiled")
                for kind in ("eager", "compiled")
                if any(config.compiles(m) == (kind == "compiled") for m in config.methods)
            }
            log.write({"kind": "base", **base})
            traces = [
                self._train(method, run, log)
                for run in range(config.runs)
                for method in config.methods
            ]
            report = Report(config, base, traces)
            for row in report.rows():
                log.write({"kind": "result", **asdict(row)})
        return report

    def base_seconds(self, compiled: bool) -> float:
        """Runtime of f, section 5.2: forward and loss of one batch, no derivative, no update."""
        torch.compiler.reset()
        model = self._model(self.config.seed)
        x, y = next(batches(self.data.train, self.config.batch, self.config.seed))

        def objective(x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(model(x), y)

        run = objective
        if compiled:
            run = torch.compile(objective, fullgraph=True, dynamic=False, mode=self.config.mode)
        times = []
        with torch.no_grad():
            for _ in range(WARM_UP + BASE_REPEATS):
                self._synchronize()
                began = time.perf_counter()
                run(x, y)
                self._synchronize()
                times.append(time.perf_counter() - began)
        return statistics.median(times[WARM_UP:])

    def _train(self, method: str, run: int, log: _Log) -> Trace:
        """One method, one run. A step that is not finite ends it, unless such are left out."""
        torch.compiler.reset()
        config, seed = self.config, self.config.seed + run
        model = self._model(seed)
        step = METHODS[method](model, config, seed)
        trace, stream = Trace(method, run), batches(self.data.train, config.batch, seed)
        self._look(trace, model, [], log)
        losses: list[float] = []
        for i in range(1, config.iterations + 1):
            x, y = next(stream)
            self._synchronize()
            began = time.perf_counter()
            try:
                loss = step(x, y)
            except NonFiniteError as error:
                trace.stopped = str(error)
                break
            self._synchronize()
            trace.step_seconds.append(time.perf_counter() - began)
            losses.append(float(loss))
            self.progress(method)
            if i % config.every == 0:
                self._look(trace, model, losses, log)
                losses = []
        if losses:
            self._look(trace, model, losses, log)
        return trace

    def _model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().to(self.device)

    @torch.no_grad()
    def _look(self, trace: Trace, model: nn.Module, losses: list[float], log: _Log) -> None:
        """Adds the state of the model on the validation set to the trace and the log."""
        images, labels = self.data.validation
        was_training = model.training
        model.eval()
        total, right = 0.0, 0
        for first in range(0, len(labels), VALIDATION_BATCH):
            part = slice(first, first + VALIDATION_BATCH)
            out, y = model(images[part]), labels[part]
            total += float(cross_entropy(out, y, reduction="sum"))
            right += int((out.argmax(1) == y).sum())
        model.train(was_training)
        finite = [loss for loss in losses if math.isfinite(loss)]
        trace.iterations.append(len(trace.step_seconds))
        trace.train_loss.append(statistics.fmean(finite) if finite else math.nan)
        trace.validation_loss.append(total / len(labels))
        trace.accuracy.append(right / len(labels))
        record = {"kind": "step", "method": trace.method, "run": trace.run}
        record |= {"iteration": trace.iterations[-1], "seconds": trace.seconds[-1]}
        names = ("train_loss", "validation_loss", "accuracy")
        log.write(record | {name: getattr(trace, name)[-1] for name in names})

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


class _Log:
    """JSON lines, and TensorBoard events if asked for."""

    def __init__(self, folder: Path | None, tensorboard: bool) -> None:
        self._file = None
        self._events: Any = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]
            self._file = (folder / "log.jsonl").open("w", encoding="utf-8")

    def __enter__(self) -> _Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in (self._file, self._events):
            if stream is not None:
                stream.close()

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record; what is not finite becomes null, as JSON has no word for it."""
        record = {name: _finite(x) for name, x in record.items()}
        if self._file is not None:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if self._events is not None and record["kind"] == "step":
            for name in ("train_loss", "validation_loss", "accuracy"):
                if record[name] is not None:
                    tag = f"{name}/{record['method']}-{record['run']}"
                    self._events.add_scalar(tag, record[name], record["iteration"])


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for the first line of a log."""
    return {
        "fwdcompile": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }


def _finite(x: Any) -> Any:
    return None if isinstance(x, float) and not math.isfinite(x) else x
