from __future__ import annotations

import hashlib
import json
import math
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fwdcompile.config import Config
from fwdcompile.data import Dataset
from fwdcompile.errors import CheckpointError
from fwdcompile.measure import ratio
from fwdcompile.methods import METHODS, Step
from fwdcompile.report import Report
from fwdcompile.runner import Runner


def blobs() -> Dataset:
    """Two classes that a linear model can tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    images = torch.randn(60, 1, 2, 2, generator=generator) + 3 * labels.view(60, 1, 1, 1)
    return Dataset((images[:40], labels[:40]), (images[40:], labels[40:]))


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


def compare(config: Config, **options: Any) -> Report:
    return Runner(linear, blobs(), config, **options).run()


def settings(**changes: Any) -> Config:
    chosen: dict[str, Any] = {
        "methods": ("fgd", "backprop", "torch-jvp"),
        "iterations": 25,
        "batch": 8,
        "lr": 0.05,
        "every": 10,
        "compile": False,
    }
    return Config(**(chosen | changes))


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_method_learns() -> None:
    report = compare(settings(iterations=200, every=100))
    for trace in report.traces:
        assert trace.validation_loss[-1] < 0.5 * trace.validation_loss[0], trace.method
        assert trace.accuracy[-1] > 0.9


def test_methods_start_alike_and_runs_differ() -> None:
    report = compare(settings(runs=2))
    first = {(t.method, t.run): t.validation_loss[0] for t in report.traces}
    assert len(first) == 6
    assert len({loss for (_, run), loss in first.items() if run == 0}) == 1
    assert first["fgd", 0] != first["fgd", 1]


def test_methods_see_equal_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Any]] = {"fgd": [], "backprop": []}

    def spy(method: str) -> Any:
        def make(model: nn.Module, config: Config, seed: int) -> Step:
            def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                seen[method].append((x.tolist(), y.tolist()))
                return torch.zeros(())

            return Step(step, {})

        return make

    for method in seen:
        monkeypatch.setitem(METHODS, method, spy(method))
    compare(settings(methods=("fgd", "backprop"), iterations=12))
    # the last ones: before them, steps are timed
    trained = [batches[-12:] for batches in seen.values()]
    assert trained[0] == trained[1] and trained[0][0] != trained[0][1]


def test_looks_at_intervals_and_at_the_end_with_mean_losses() -> None:
    trace = compare(settings(methods=("backprop",))).traces[0]
    assert trace.iterations == [0, 10, 20, 25]
    assert math.isnan(trace.train_loss[0]) and all(map(math.isfinite, trace.train_loss[1:]))


def test_validation_covers_the_whole_set_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fwdcompile.runner.VALIDATION_BATCH", 7)

    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 2))

    config = settings(methods=("backprop",), iterations=1)
    trace = Runner(build, blobs(), config).run().traces[0]
    torch.manual_seed(0)
    model = build().eval()
    images, labels = blobs().validation
    expected = nn.functional.cross_entropy(model(images), labels)
    assert trace.validation_loss[0] == pytest.approx(expected.item(), rel=1e-5)
    accuracy = (model(images).argmax(1) == labels).double().mean()
    assert trace.accuracy[0] == pytest.approx(float(accuracy))


@pytest.mark.parametrize("method", ["fgd", "backprop", "torch-jvp"])
def test_a_run_that_diverges_stops_with_its_iteration_and_good_weights(
    method: str, tmp_path: Path
) -> None:
    data = blobs()
    poisoned = data.train[0].clone()
    poisoned[7] = math.nan
    runner = Runner(linear, Dataset((poisoned, data.train[1]), data.validation),
                    settings(methods=(method,), iterations=60), log=tmp_path)  # fmt: skip
    report = runner.run()
    (trace,) = report.traces
    steps = trace.iterations[-1]
    assert steps < 5 and f"iteration {steps}: the loss (nan)" in trace.stopped
    assert math.isfinite(trace.validation_loss[-1])
    assert report.rows()[0].stopped == trace.stopped
    assert Report.read(tmp_path / "log.jsonl").rows() == report.rows()


def test_steps_that_are_not_finite_are_left_out_if_asked() -> None:
    data = blobs()
    poisoned = data.train[0].clone()
    poisoned[7] = math.nan
    config = settings(skip_nonfinite=True, iterations=30)
    report = Runner(linear, Dataset((poisoned, data.train[1]), data.validation), config).run()
    for trace in report.traces:
        assert trace.iterations[-1] == 30 and not trace.stopped
        assert math.isfinite(trace.validation_loss[-1])


def test_the_log_has_header_base_steps_and_results(tmp_path: Path) -> None:
    report = compare(settings(methods=("fgd", "backprop")), log=tmp_path / "new")
    records = read(tmp_path / "new")
    kinds = [record["kind"] for record in records]
    run = [*["step"] * 4, "end"]
    assert kinds == ["header", *["time"] * 3, *run, *run, "result", "result"]
    header, base, _, _, first, second = records[:6]
    assert header["torch"] == torch.__version__ and header["config"]["lr"] == 0.05
    assert header["device"] and header["threads"] >= 1
    assert base["method"] == "base" and base["seconds"] == report.turns["base"]
    assert len(base["seconds"]) >= 20 and min(base["seconds"]) > 0
    assert first["iteration"] == 0 and first["train_loss"] is None
    assert second["validation_loss"] == report.traces[0].validation_loss[1]
    assert records[-1]["method"] == "backprop" and records[-1]["r_ratio"] is None


def test_tensorboard_events_are_written_only_if_asked(tmp_path: Path) -> None:
    compare(settings(methods=("backprop",), iterations=2), log=tmp_path)
    assert not list(tmp_path.glob("events*"))
    compare(settings(methods=("backprop",), iterations=2), log=tmp_path, tensorboard=True)
    (events,) = tmp_path.glob("events*")
    assert b"validation_loss/backprop-0" in events.read_bytes()


def test_progress_hears_of_every_step() -> None:
    heard: list[tuple[str, int]] = []
    compare(
        settings(methods=("backprop", "fgd"), iterations=3, runs=2),
        progress=lambda method, steps: heard.append((method, steps)),
    )
    assert heard == ([("backprop", 1)] * 3 + [("fgd", 1)] * 3) * 2


@pytest.mark.compiled
def test_compiled_backprop_learns_as_eager_does_and_has_a_base_of_its_own() -> None:
    methods = ("backprop", "backprop-compiled")
    report = compare(settings(methods=methods, iterations=12))
    assert set(report.turns) == {"base", "base-compiled", "backprop", "backprop-compiled"}
    eager, compiled = report.rows()
    assert compiled.validation_loss == pytest.approx(eager.validation_loss, rel=1e-5)
    for row, base in ((eager, "base"), (compiled, "base-compiled")):
        assert row.r == ratio(report.turns, row.method, base)
        assert row.ms == pytest.approx(1e3 * statistics.median(report.turns[row.method]))


def test_a_log_holds_the_whole_report(tmp_path: Path) -> None:
    report = compare(settings(runs=2, clip=2.0), log=tmp_path)
    found = Report.read(tmp_path / "log.jsonl")
    assert found.config == report.config and found.turns == report.turns
    assert found.rows() == report.rows()
    assert [t.validation_loss for t in found.traces] == [t.validation_loss for t in report.traces]


STOPPED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_runner import {model}, blobs, settings
from fwdcompile.runner import Runner
import torch

torch.set_num_threads({threads})
left = {steps}
def progress(method, steps):
    global left
    left -= steps
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

config = settings(methods={methods!r}, runs=2, optimizer={optimizer!r})
Runner({model}, blobs(), config, log=Path({folder!r}), resume=True, progress=progress).run()
"""


def dropped() -> nn.Module:
    """Dropout and batch norm: random numbers and buffers that a resumed run has to go on with."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)
    )


@pytest.mark.parametrize(
    ("build", "methods", "optimizer"),
    [(dropped, ("fgd:samples=2", "backprop"), "adam"), (linear, ("torch-jvp",), "sgd")],
)
def test_a_killed_run_goes_on_to_the_very_same_end(
    tmp_path: Path, build: Any, methods: tuple[str, ...], optimizer: str
) -> None:
    config = settings(methods=methods, runs=2, optimizer=optimizer)
    whole = Runner(build, blobs(), config, log=tmp_path / "whole").run()
    folder = tmp_path / "killed"
    # the last number is of a run to the end, and of one after it that has nothing to do
    for steps in (13, 37, 10**9, 10**9):
        script = STOPPED.format(tests=str(Path(__file__).parent), steps=steps, folder=str(folder),
                                methods=methods, optimizer=optimizer,
                                model=build.__name__,
                                threads=torch.get_num_threads())  # fmt: skip
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=False)
        assert done.returncode == (0 if steps > 1000 else -signal.SIGKILL)
    found = Report.read(folder / "log.jsonl")
    assert found.traces == Report.read(tmp_path / "whole" / "log.jsonl").traces
    assert len(found.traces) == len(whole.traces)
    digests = [trace.weights for trace in whole.traces]
    assert [trace.weights for trace in found.traces] == digests
    assert len({*digests}) == len(digests) and all(len(digest) == 64 for digest in digests)


def test_the_digest_is_of_all_bits_of_the_weights() -> None:
    runner = Runner(dropped, blobs(), settings(methods=("backprop",)))
    (trace,) = runner.run().traces
    ((model, _),) = runner._steps.values()
    state = b"".join(x.numpy().tobytes() for x in model.state_dict().values())
    assert trace.weights == hashlib.sha256(state).hexdigest()


def test_a_checkpoint_of_another_comparison_is_refused(tmp_path: Path) -> None:
    compare(settings(methods=("backprop",)), log=tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    for config, data, message in (
        (settings(methods=("backprop",), lr=0.5), blobs(), "comparison: lr was 0.05, is 0.5"),
        (settings(methods=("backprop",)), Dataset(blobs().train, blobs().train), "data set: held"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Runner(linear, data, config, log=tmp_path, resume=True).run()
    assert (tmp_path / "log.jsonl").read_bytes() == before
    compare(settings(methods=("backprop",), lr=0.5), log=tmp_path)
    assert read(tmp_path)[0]["config"]["lr"] == 0.5


def test_a_comparison_goes_on_for_more_runs_but_not_for_fewer(tmp_path: Path) -> None:
    config, more = (settings(methods=("backprop", "fgd"), runs=runs) for runs in (1, 3))
    compare(more, log=tmp_path / "whole")
    compare(config, log=tmp_path / "grown")
    compare(more, log=tmp_path / "grown", resume=True)
    whole, found = (Report.read(tmp_path / name / "log.jsonl") for name in ("whole", "grown"))
    assert found.config == more and len(found.traces) == 6
    assert found.traces == whole.traces
    results = [line for line in read(tmp_path / "grown") if line["kind"] == "result"]
    assert [line["method"] for line in results] == ["backprop", "fgd"]
    with pytest.raises(CheckpointError, match="runs was 3, is 1"):
        compare(config, log=tmp_path / "grown", resume=True)


def test_a_checkpoint_from_before_a_setting_was_new_has_its_default(tmp_path: Path) -> None:
    compare(settings(methods=("backprop",)), log=tmp_path)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["comparison"]["share"]
    torch.save(state, path)
    (trace,) = compare(settings(methods=("backprop",)), log=tmp_path, resume=True).traces
    assert trace.iterations == [0, 10, 20, 25]
    with pytest.raises(CheckpointError, match="share was data, is directions"):
        compare(settings(methods=("backprop",), share="directions"), log=tmp_path, resume=True)


def test_a_run_that_goes_on_under_other_conditions_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(settings(methods=("backprop",)), log=tmp_path)
    compare(settings(methods=("backprop",)), log=tmp_path, resume=True)
    assert not [line for line in read(tmp_path) if line["kind"] == "resumed"]
    monkeypatch.setattr("fwdcompile.runner.__version__", "9.9")
    compare(settings(methods=("backprop",)), log=tmp_path, resume=True)
    (line,) = [line for line in read(tmp_path) if line["kind"] == "resumed"]
    assert line["fwdcompile"] == "9.9"
    assert line["threads"] == torch.get_num_threads()
    assert Report.read(tmp_path / "log.jsonl").traces[0].iterations == [0, 10, 20, 25]


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, written = torch.save, []

    def full(state: Any, file: Any) -> None:
        if len(written) == 2:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        written.append(state)
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"No space left.*the last one is as it was"):
        compare(settings(methods=("backprop",)), log=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]
    monkeypatch.setattr(torch, "save", save)
    (trace,) = compare(settings(methods=("backprop",)), log=tmp_path, resume=True).traces
    assert trace.iterations == [0, 10, 20, 25]


@pytest.mark.compiled
def test_all_runs_share_one_compiled_step() -> None:
    torch._dynamo.utils.counters.clear()
    report = compare(settings(methods=("fgd",), runs=3, iterations=4, compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the base has one
    eager = compare(settings(methods=("fgd",), runs=3, iterations=4))
    for mine, theirs in zip(report.traces, eager.traces, strict=True):
        assert mine.validation_loss == pytest.approx(theirs.validation_loss, rel=1e-5)
