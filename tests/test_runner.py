from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fwdcompile.data import Dataset
from fwdcompile.methods import METHODS, Config, Step
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

            return step

        return make

    for method in seen:
        monkeypatch.setitem(METHODS, method, spy(method))
    compare(settings(methods=("fgd", "backprop"), iterations=12))
    assert len(seen["fgd"]) == 12 and seen["fgd"] == seen["backprop"]


def test_looks_at_intervals_and_at_the_end_with_mean_losses() -> None:
    trace = compare(settings(methods=("backprop",))).traces[0]
    assert trace.iterations == [0, 10, 20, 25]
    assert len(trace.step_seconds) == 25
    assert math.isnan(trace.train_loss[0]) and all(map(math.isfinite, trace.train_loss[1:]))
    assert trace.seconds == sorted(trace.seconds)


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
def test_a_run_that_diverges_stops_with_its_iteration_and_good_weights(method: str) -> None:
    data = blobs()
    poisoned = data.train[0].clone()
    poisoned[7] = math.nan
    runner = Runner(linear, Dataset((poisoned, data.train[1]), data.validation),
                    settings(methods=(method,), iterations=60))  # fmt: skip
    report = runner.run()
    (trace,) = report.traces
    steps = len(trace.step_seconds)
    assert steps < 5 and f"iteration {steps}: the loss (nan)" in trace.stopped
    assert trace.iterations[-1] == steps and math.isfinite(trace.validation_loss[-1])
    assert report.rows()[0].stopped == trace.stopped


def test_steps_that_are_not_finite_are_left_out_if_asked() -> None:
    data = blobs()
    poisoned = data.train[0].clone()
    poisoned[7] = math.nan
    config = settings(skip_nonfinite=True, iterations=30)
    report = Runner(linear, Dataset((poisoned, data.train[1]), data.validation), config).run()
    for trace in report.traces:
        assert len(trace.step_seconds) == 30 and not trace.stopped
        assert math.isfinite(trace.validation_loss[-1])


def test_the_log_has_header_base_steps_and_results(tmp_path: Path) -> None:
    report = compare(settings(methods=("fgd", "backprop")), log=tmp_path / "new")
    records = read(tmp_path / "new")
    kinds = [record["kind"] for record in records]
    assert kinds == ["header", "base", *["step"] * 8, "result", "result"]
    header, base, first, second = records[:4]
    assert header["torch"] == torch.__version__ and header["config"]["lr"] == 0.05
    assert header["device"] and header["threads"] >= 1
    assert base["eager"] == report.base["eager"] > 0 and "compiled" not in base
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
    heard: list[str] = []
    compare(settings(methods=("backprop", "fgd"), iterations=3, runs=2), progress=heard.append)
    assert heard == (["backprop"] * 3 + ["fgd"] * 3) * 2


@pytest.mark.compiled
def test_compiled_backprop_learns_as_eager_does_and_has_a_base_of_its_own() -> None:
    report = compare(settings(methods=("backprop", "backprop-compiled"), iterations=12))
    assert set(report.base) == {"eager", "compiled"}
    eager, compiled = report.rows()
    assert compiled.validation_loss == pytest.approx(eager.validation_loss, rel=1e-5)
    assert compiled.r == pytest.approx(compiled.ms / 1e3 / report.base["compiled"])
    assert eager.r == pytest.approx(eager.ms / 1e3 / report.base["eager"])
