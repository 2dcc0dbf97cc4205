"""The paper's figures 3 to 5 and its table, and activity perturbation: what is written is true."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fwdcompile.data import Dataset, load
from fwdcompile.log import read
from fwdcompile.report import Report

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import activity
import figures
import mnist
import paper
from mnist import NORMAL, RANK_ONE, Experiment

from fwdcompile.models import logistic_regression

SMALL = Experiment("logistic-regression", logistic_regression, 0.1, 6, 2, runs=2,
                   methods=("backprop", NORMAL, RANK_ONE), compile=False)  # fmt: skip


def run_small(tmp_path: Path) -> Report:
    return mnist.run(SMALL, tmp_path, "digits", tmp_path / "work", tmp_path / "out")


def test_an_experiment_leaves_its_lines_and_is_not_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run_small(tmp_path)
    path = tmp_path / "out" / "logistic-regression.jsonl"
    assert Report.read(path).rows() == report.rows()
    assert {(t.method, t.run) for t in report.traces} == {
        (method, run) for method in SMALL.methods for run in (0, 1)
    }
    monkeypatch.setattr("fwdcompile.runner.take_turns", None)  # would be called by a second run
    assert run_small(tmp_path).rows() == report.rows()


def test_the_picture_is_drawn_from_lines_alone(tmp_path: Path) -> None:
    run_small(tmp_path)
    pictures = []
    for _ in range(2):
        mnist.draw(tmp_path / "out", "figure-3", [SMALL])
        pictures.append((tmp_path / "out" / "figure-3.svg").read_text())
    assert pictures[0] == pictures[1] and "validation loss" in pictures[0]
    assert (tmp_path / "out" / "figure-3.png").stat().st_size > 10_000
    mnist.draw(tmp_path / "empty", "figure-3", [SMALL])
    assert not (tmp_path / "empty").exists()


def lines(folder: Path, name: str, ms: dict[str, float], losses: dict[str, list[float]]) -> None:
    """The log of runs whose times and losses are known."""
    last = 10 * (len(losses["backprop-compiled"]) - 1)
    changes = {"methods": list(losses), "compile": True, "iterations": last}
    config = dataclasses.asdict(SMALL.config) | changes
    header = {"kind": "header", "device": "none", "threads": 1, "torch": "2", "config": config}
    times = [{"kind": "time", "method": m, "seconds": [t / 1e3] * 3} for m, t in ms.items()]
    steps = [
        {"kind": "step", "method": method, "run": 0, "iteration": 10 * i, "accuracy": 0.5,
         "train_loss": loss, "validation_loss": loss}
        for method, curve in losses.items() for i, loss in enumerate(curve)
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in ({**header}, *times, *steps))
    (folder / f"{name}.jsonl").write_text(text.replace("Infinity", "null"))


def test_the_table_has_the_papers_measures(tmp_path: Path) -> None:
    ms = {"base-compiled": 2.0, "backprop-compiled": 8.0, NORMAL: 6.0}
    losses = {"backprop-compiled": [3.0, 2.0, 1.0, 1.5], NORMAL: [3.0, 1.0, 0.5, 0.4]}
    lines(tmp_path, "cnn", ms, losses)
    page = paper.page(tmp_path)
    assert "| cnn | the paper | 1.434 | 2.211 | 0.649 | 0.514 |" in page
    # Tb is 20 steps of 8 ms, Tf 10 steps of 6 ms
    assert "| cnn | forward gradient | 3.000 | 4.000 | 0.750 | 0.375 |" in page
    assert (
        "| cnn | backpropagation | 0.1 | 30 | 1 | 1.0000 | 1.5000 | 0.0000 | 0.5000 | 8.00 |"
        in page
    )
    assert "mlp" not in page


def test_runs_that_were_not_finite_are_counted(tmp_path: Path) -> None:
    ms = {"base-compiled": 2.0, "backprop-compiled": 8.0, NORMAL: 6.0}
    lines(tmp_path, "cnn", ms, {"backprop-compiled": [3.0, 2.0], NORMAL: [3.0, 1.0]})
    end = {"kind": "end", "method": NORMAL, "run": 0, "stopped": "not finite", "weights": ""}
    with (tmp_path / "cnn.jsonl").open("a") as file:
        file.write(json.dumps(end) + "\n")
    row = "| cnn | forward gradient | 0.1 | 10 | 1, 1 not finite | 1.0000 | nan | 0.0000 | nan |"
    assert row in paper.page(tmp_path)


def test_times_are_measured_again_and_nothing_else(tmp_path: Path) -> None:
    before = run_small(tmp_path)
    path = tmp_path / "out" / "logistic-regression.jsonl"
    header, *rest = read(path)
    mnist.write(path, [header | {"device": "another"}, *rest])
    mnist.time_again(path, SMALL.build, load("digits"))
    assert read(path)[0] == header
    after = Report.read(path)
    assert after.traces == before.traces and after.config == before.config
    assert after.turns.keys() == before.turns.keys() and after.turns != before.turns


def test_runs_that_are_under_way_do_not_count(tmp_path: Path) -> None:
    run_small(tmp_path)
    path = tmp_path / "out" / "logistic-regression.jsonl"
    whole = mnist.finished(path)
    assert whole.traces == Report.read(path).traces
    records = [json.loads(line) for line in path.read_text().splitlines()]
    last = next(r for r in records if r["kind"] == "step" and r["run"] == 1 and r["iteration"] == 6)
    kept = records[: records.index(last)]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    assert {t.run for t in Report.read(path).traces} == {0, 1}
    assert mnist.finished(path).traces == [t for t in whole.traces if t.run == 0]


def test_the_experiments_are_the_papers() -> None:
    found = {e.name: e.config for e in paper.experiments() if e.lr}
    assert list(found) == list(paper.PAPER)
    assert [e.name.removesuffix("-tuned") for e in paper.TUNED] == [
        "logistic-regression", "mlp", "cnn"
    ]  # fmt: skip
    assert [config.lr for config in found.values()] == [1e-4, 2e-5, 2e-4, 2e-4]
    for config in found.values():
        assert (config.batch, config.decay, config.runs, config.seed) == (64, 1e-4, 5, 0)


def blobs() -> Dataset:
    torch.manual_seed(0)
    labels = torch.arange(600) % 3
    images = torch.randn(600, 1, 4, 4) + 2 * nn.functional.one_hot(labels, 16).view(-1, 1, 4, 4)
    return Dataset((images[:500], labels[:500]), (images[500:], labels[500:]))


def small_mlp(shape: torch.Size, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(),
                         nn.Linear(12, classes))  # fmt: skip


def test_activity_perturbation_beside_its_rivals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity, "mlp", small_mlp)
    few = (("-compiled", ""), ("1/16/10", "1/3/3"), ("=16", "=4"))
    labels = {functools.reduce(lambda name, pair: name.replace(*pair), few, name): text
              for name, text in activity.LABELS.items()}  # fmt: skip
    monkeypatch.setattr(activity, "LABELS", labels)
    monkeypatch.setattr(activity, "RATES", (1e-2, 3e-2))
    monkeypatch.setattr(activity, "SEARCH", 8)
    monkeypatch.setattr("tuning.MOST", 0)
    out = tmp_path / "out"
    activity.main(blobs(), "blobs", out, tmp_path / "work", epochs=3, runs=1, compile=False)
    path = out / "activity-blobs.jsonl"
    activity.draw(path)
    rows = {row.method.split(":lr")[0]: row for row in Report.read(path).rows()}
    assert list(rows) == list(labels)
    assert all(row.accuracy > 0.5 for name, row in rows.items() if name != "fgd")
    found = {(n["method"], n["epochs"]): n["noise"]
             for n in figures.of(figures.read(path)[1], kind="noise")}  # fmt: skip
    layers = f"{activity.ACTIVATIONS}:samples=1/3/3"
    for epochs in (0, 1):
        assert found["fgd", epochs] > 3 * found[activity.ACTIVATIONS, epochs]
        assert found[activity.ACTIVATIONS, epochs] > found[layers, epochs]
    table, svg = path.with_suffix(".md").read_text(), path.with_suffix(".svg").read_text()
    activity.draw(path)
    assert path.with_suffix(".md").read_text() == table
    assert path.with_suffix(".svg").read_text() == svg
    assert "| layer by layer | " in table and "One run, seed 0" in table


def test_noise_is_that_of_the_estimate() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    x, y = torch.randn(9, 5).double(), torch.arange(9) % 2
    config = activity.config_for(blobs(), 1, 1, compile=False)
    found = [activity.noise(model, "fgd:rank_one=false", config, x, y) for _ in range(2)]
    # signs: the second moment is d = 12 times the squared gradient
    assert found[0] == found[1] and 4 < found[0] < 25
    assert all(p.grad is None for p in model.parameters())
