"""The comparison of local losses: its lines are true, and its figure and page come from them."""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from fwdcompile.data import Dataset, batches
from fwdcompile.synthetic import GREY, draw

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import figures
import local_losses
from local_losses import STEM, WAYS, WEIGHTS, Task

GLOBAL, LOCAL, *_ = WAYS
SMALL = replace(GREY, size=8, noise=0.0, cover=0.0)


def small() -> Dataset:
    return Dataset(*draw(SMALL, 300, 100))


def test_lines_page_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_losses, "DEPTH", 2)
    lines = local_losses.main(
        tmp_path, small(), "small", epochs=1, width=8, turns=2, rates=(1e-3, 1e-2), seeds=(4,)
    )
    for name, weights in itertools.product(WAYS, WEIGHTS):
        found = figures.of(lines, weights=weights)
        tried = figures.of(found, kind="search", way=name)
        runs = figures.of(found, kind="run", way=name)
        assert [line["lr"] for line in tried] == [1e-3, 1e-2]
        assert [line["seed"] for line in runs] == [4]
        assert {line["lr"] for line in runs} == {local_losses.best(found, name)}
        assert all(len(line["error"]) == 2 for line in tried + runs)
    svg, page = tmp_path / f"{STEM}.svg", tmp_path / f"{STEM}.md"
    before = svg.read_text(), page.read_text()
    assert "local losses" in before[1] and (tmp_path / f"{STEM}.png").stat().st_size > 10_000
    for path in (svg, page):
        path.unlink()
    local_losses.draw(tmp_path / f"{STEM}.jsonl")
    assert (svg.read_text(), page.read_text()) == before


def test_a_run_is_what_one_writes_by_hand() -> None:
    data = small().centred()
    task = Task(data, "torch", epochs=3, width=16)
    found = local_losses.train(GLOBAL, task, 1e-2, 5)
    model = local_losses.build(WAYS[GLOBAL], task, 5)
    optimizer, stream = torch.optim.Adam(model.parameters(), 1e-2), batches(data.train, 128, 5)
    x, y = data.validation
    errors = [float((model(x).argmax(1) != y).float().mean())]
    for _ in range(3):
        for _ in range(3):
            images, labels = next(stream)
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        errors.append(float((model(x).argmax(1) != y).float().mean()))
    assert found["error"] == pytest.approx(errors, abs=0.011)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_models_begin_alike(weights: str) -> None:
    data = small()
    task = Task(data, weights, epochs=1, width=16)
    whole, local = (local_losses.build(WAYS[name], task, 2) for name in (GLOBAL, LOCAL))
    x = data.validation[0]
    torch.testing.assert_close(whole(x), local.eval()(x))
    assert len(local.train()(x)) == local_losses.DEPTH


def test_a_run_that_is_not_finite_is_no_best_one() -> None:
    shared = {"kind": "search", "way": GLOBAL, "seed": 3}
    lines = [
        {**shared, "lr": 1e-3, "error": [0.9, 0.4], "stopped": None},
        {**shared, "lr": 3e-3, "error": [0.9, 0.5], "stopped": None},
        {**shared, "lr": 1e-2, "error": [0.3], "stopped": "not finite"},
    ]
    assert local_losses.best(lines, GLOBAL) == 1e-3


@pytest.mark.parametrize(
    ("local", "said"),
    [((0.1, 0.2), "lower .* to 15.0 %\\."), ((0.6, 0.2), "raise .* to 40.0 %; the runs overlap")],
)
def test_the_verdict_says_what_the_runs_say(local: tuple[float, ...], said: str) -> None:
    ends = {"global loss": (0.3, 0.4), "local losses": local}
    lines = [
        {"kind": "run", "way": f"backpropagation, {kind}", "error": [end]}
        for kind, each in ends.items()
        for end in each
    ]
    found = local_losses.verdict(lines, "backpropagation")
    assert re.match(f"With backpropagation, local losses {said}", found)


def test_the_page_in_the_docs_is_of_its_lines() -> None:
    path = figures.RESULTS / f"{STEM}.jsonl"
    assert local_losses.page(*figures.read(path)) == path.with_suffix(".md").read_text()
