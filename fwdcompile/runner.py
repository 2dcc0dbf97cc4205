"""The runner: trains methods side by side on the same data and measures them as the paper does."""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import __version__, checkpoint
from .config import Config
from .costs import device_name
from .data import Dataset, batches
from .errors import CheckpointError, NonFiniteError
from .log import MEASURES, Log
from .measure import take_turns
from .methods import METHODS, Step, compiled_by, total_loss, workers_of
from .report import BASES, Report, Trace
from .workers import Workers, digest

CHECKPOINT = "checkpoint.pt"
TURNS = 24
VALIDATION_BATCH = 1000


class Runner:
    """Trains every method of a config from equal weights on equal batches.

    Under torchrun all workers train each method together, and worker 0 keeps the log.

    Times are measured first: all methods and the model alone take turns, so that ratios are of
    steps that the same machine did under the same load. Then each method trains.

    Args:
        build: makes a fresh model; called under a seed, so that all methods start alike.
        data: what to train and validate on, on the device to use.
        config: the comparison.
        log: a directory for `log.jsonl` (a header, the times, a line for each look at the
            validation set and each end of a run, a line for each method's result) and
            `checkpoint.pt`, which is written at each look; None writes nothing. Where a run goes on
            under other versions or hardware, or for more runs, a line "resumed" has them: under
            other ones its bits may differ.
        tensorboard: writes TensorBoard's event files there, too.
        resume: goes on from the checkpoint there, to the very weights of a run that was never
            stopped, given as many threads; begins where there is none. Only `runs` may have grown.
        progress: called with the method's name and the number of steps that it has done since.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another comparison.

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
        resume: bool = False,
        progress: Callable[[str, int], None] = lambda method, steps: None,
    ) -> None:
        self.build, self.data, self.config = build, data, config
        self.folder, self.tensorboard, self.resume = log, tensorboard, resume
        self.progress = progress
        self.device = data.train[0].device
        self.workers = workers_of(config)
        single = [method for method in config.methods if method.startswith("torch")]
        if single and self.workers.size > 1:
            raise ValueError(f"{single[0]} runs in one process: leave it out under torchrun")
        self._steps: dict[str, tuple[nn.Module, Step]] = {}

    def run(self) -> Report:
        """Trains, measures and returns the report."""
        state = self._resumed() if self.resume and self.folder else None
        folder = None if self.workers.rank else self.folder
        with Log(folder, state["log"] if state else 0, self.tensorboard) as log:
            if state is None:
                header = {**environment(self.device), "config": asdict(self.config)}
                log.write({"kind": "header", **header})
                report = Report(self.config, self.times(), [])
                for name, seconds in report.turns.items():
                    log.write({"kind": "time", "method": name, "seconds": seconds})
                self._save(log, report)
            else:
                here, runs = environment(self.device), self.config.runs
                was = state.get("environment", here), state["comparison"]["runs"]
                if was != (here, runs):
                    log.write({"kind": "resumed", **here, "runs": runs})
                report = Report(self.config, state["turns"], [Trace(**t) for t in state["traces"]])
            self._go_on(report, state["current"] if state else None, log)
            for row in report.rows():
                log.write({"kind": "result", **asdict(row)})
        return report

    def _go_on(self, report: Report, current: dict[str, Any] | None, log: Log) -> None:
        """Trains what a report lacks; `current` is the state of its last trace, if unfinished."""
        for trace in report.traces:
            self.progress(trace.method, trace.iterations[-1])
        if current:
            self._train(report, report.traces[-1], current, log)
        plan = [(method, run) for run in range(self.config.runs) for method in self.config.methods]
        for method, run in plan[len(report.traces) :]:
            report.traces.append(Trace(method, run))
            self._train(report, report.traces[-1], None, log)

    def times(self) -> dict[str, list[float]]:
        """Seconds of a step, in turns: of model and loss alone (section 5.2), and of methods."""
        config = self.config
        x, y = map(self.workers.part, next(batches(self.data.train, config.batch, config.seed)))
        kinds = {config.compiles(method) for method in config.methods}
        runs: dict[str, Callable[[], Any]] = {
            BASES[compiled]: self._base(compiled, x, y) for compiled in sorted(kinds)
        }
        for method in config.methods:
            _, step = self._step(method)
            runs[method] = functools.partial(_attempt, step, x, y)
        return take_turns(runs, 1, self.device, TURNS)

    def _base(self, compiled: bool, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        model = self._model(self.config.seed)

        def objective() -> Tensor:
            return total_loss(model(x), y)

        return torch.no_grad()(compiled_by(self.config, objective) if compiled else objective)

    def _train(
        self, report: Report, trace: Trace, current: dict[str, Any] | None, log: Log
    ) -> None:
        """One method, one run. A step that is not finite ends it, unless such are left out."""
        model, step = self._step(trace.method)
        seed = self.config.seed + trace.run
        if current is None:
            fresh = self._model(seed)
            model.load_state_dict(fresh.state_dict())
            step.load_state_dict(self._made(trace.method, fresh, seed).state_dict())
            self._look(trace, model, 0, [], log)
        else:
            model.load_state_dict(current["model"])
            step.load_state_dict(current["step"])
            _set_random_state(current["random"], self.device)
        done = trace.iterations[-1]
        stream = batches(self.data.train, self.config.batch, seed, done)
        losses: list[float] = []
        while done < self.config.iterations and not trace.stopped:
            try:
                losses.append(float(step(*map(self.workers.part, next(stream)))))
                done += 1
                self.progress(trace.method, 1)
            except NonFiniteError as error:
                trace.stopped = str(error)
            last = trace.stopped or done == self.config.iterations
            if losses and (last or done % self.config.every == 0):
                self._look(trace, model, done, losses, log)
                losses = []
                if not last:
                    self._save(log, report, (model, step))
        if self.workers.size > 1:
            self.workers.agree({"its weights in the end": digest(model.parameters())})
        trace.weights = digest(model.state_dict().values())
        end = {"stopped": trace.stopped, "weights": trace.weights}
        log.write({"kind": "end", "method": trace.method, "run": trace.run, **end})
        self._save(log, report)

    def _step(self, method: str) -> tuple[nn.Module, Step]:
        """A method's model and step; both serve all runs, so that each step compiles once."""
        if method not in self._steps:
            model = self._model(self.config.seed)
            self._steps[method] = model, self._made(method, model, self.config.seed)
        return self._steps[method]

    def _made(self, method: str, model: nn.Module, seed: int) -> Step:
        name, config = self.config.of(method)
        return METHODS[name](model, config, seed)

    def _model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().to(self.device)

    @torch.no_grad()
    def _look(
        self, trace: Trace, model: nn.Module, done: int, losses: list[float], log: Log
    ) -> None:
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
        trace.iterations.append(done)
        trace.train_loss.append(statistics.fmean(finite) if finite else math.nan)
        trace.validation_loss.append(total / len(labels))
        trace.accuracy.append(right / len(labels))
        record = {"kind": "step", "method": trace.method, "run": trace.run, "iteration": done}
        log.write(record | {name: getattr(trace, name)[-1] for name in MEASURES})

    def _save(
        self, log: Log, report: Report, unfinished: tuple[nn.Module, Step] | None = None
    ) -> None:
        """Writes the checkpoint: all of the report, and what the unfinished run needs."""
        if self.folder is None or self.workers.rank:
            return
        current = None
        if unfinished:
            model, step = unfinished
            current = {"model": model.state_dict(), "step": step.state_dict()}
            current["random"] = _random_state(self.device)
        state = self._identity() | {
            "environment": environment(self.device),
            "turns": report.turns,
            "traces": [asdict(trace) for trace in report.traces],
            "current": current,
            "log": log.size,
        }
        checkpoint.save(self.folder / CHECKPOINT, state)

    def _resumed(self) -> dict[str, Any] | None:
        """The checkpoint, if there is one and it is of this comparison."""
        assert self.folder is not None
        state = checkpoint.load(self.folder / CHECKPOINT)
        if state is None:
            return None
        state["comparison"] = asdict(Config()) | state["comparison"]  # of before a setting was new
        for name, mine in self._identity().items():
            for key, value in mine.items():
                more = key == "runs" and value > state[name][key]
                if state[name].get(key) != value and not more:
                    raise CheckpointError(
                        f"the checkpoint in {self.folder} is of another {name}: {key} was "
                        f"{state[name].get(key)}, is {value}; begin without --resume"
                    )
        return state

    def _identity(self) -> dict[str, dict[str, Any]]:
        """What has to be equal for a run to go on bit by bit."""
        images, labels = self.data.train
        data = {"images": list(images.shape), "pixels": float(images.double().sum())}
        data |= {"labels": int(labels.sum()), "held out": len(self.data.validation[1])}
        return {"comparison": asdict(self.config), "data set": data}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for the first line of a log."""
    return {
        "fwdcompile": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "workers": Workers().size,
    }


def _attempt(step: Step, x: Tensor, y: Tensor) -> None:
    """A step that is only timed: one that is not finite takes as long."""
    with contextlib.suppress(NonFiniteError):
        step(x, y)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state if device.type == "cpu" else state | {"cuda": torch.cuda.get_rng_state(device)}


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
