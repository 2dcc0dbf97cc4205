"""Variance, the search of rates and the comparison of directions: true, and drawn from lines."""

from __future__ import annotations

import itertools
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fwdcompile
from fwdcompile.config import Config
from fwdcompile.data import Dataset
from fwdcompile.directions import Normal, Rademacher, Sphere, dense_tensor
from fwdcompile.drawing import Kind

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import directions
import figures
import tuning
import variance

SEEDS = [0, 1, 2, 3, 7, 63, 64, -1, -2, 2**31, 2**32, 2**32 - 1, 2**62, 2**63 - 1, -(2**63)]
ALL_KINDS = {**variance.KINDS, "rank-one normal": Normal(rank_one=True)}


@pytest.mark.parametrize("kind", variance.KINDS)
@pytest.mark.parametrize("count", [1, 4])
def test_second_moments_are_those_of_theory(kind: str, count: int) -> None:
    mean, error = variance.pooled(variance.measured((2, 3), kind, count, [0, 1], 250))
    expected = variance.theory(kind, 6, count)
    assert abs(mean - expected) < 4 * error + 1e-9
    # a moment that is half as large again would be seen
    assert error < 0.125 * expected


def test_as_many_orthogonal_directions_as_numbers_give_the_gradient() -> None:
    lines = variance.measured((2, 3), "orthogonal", 6, [0], 5)
    assert lines[0]["moment"] == pytest.approx(1)
    assert variance.theory("orthogonal", 6, 6) == 1


@pytest.mark.parametrize("kind", ["rademacher", "rank-one signs"])
def test_each_parameter_has_the_moment_of_signs(kind: str) -> None:
    lines = variance.by_parameter(kind, [0, 1], 100)
    names = dict.fromkeys(line["parameter"] for line in lines)
    assert list(names) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for name in names:
        mean, error = variance.pooled(figures.of(lines, parameter=name))
        assert abs(mean - figures.of(lines, parameter=name)[0]["d"]) < 4 * error


def test_theory_is_the_average_over_all_pairs_of_signs() -> None:
    gradient = torch.tensor([0.3, -1.1], dtype=torch.float64)
    signs = [torch.tensor(v, dtype=torch.float64) for v in itertools.product((1, -1), repeat=2)]
    each = [(gradient @ v) * v for v in signs]
    squares = [((a + b) / 2).square().sum() for a in each for b in each]
    found = float(torch.stack(squares).mean() / gradient.square().sum())
    assert found == pytest.approx(variance.theory("rademacher", 2, 2))


def drawn(source: Any, seed: int, step: int, samples: int) -> Tensor:
    """The directions of one step as rows, as `FGD` itself takes them."""
    model = nn.Linear(12, 9)
    fgd = fwdcompile.FGD(
        model, nn.functional.mse_loss, lr=0.1, directions=source, samples=samples, seed=seed,
        compile=False,
    )  # fmt: skip
    every, shapes = list(range(samples)), {"weight": (9, 12), "bias": (9,)}
    kinds = {
        name: Kind(shape, torch.float64, source.rank_one and len(shape) > 1, every)
        for name, shape in shapes.items()
    }
    found = fgd._draw(kinds)(torch.tensor(seed), torch.tensor(step))
    mixing = source.mixing(found)
    rows = torch.stack(
        [torch.cat([dense_tensor(one[name]).flatten() for name in shapes]) for one in found]
    )
    return rows if mixing is None else mixing.to(rows.dtype) @ rows


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_directions_of_one_step_differ_whatever_the_seed(kind: str) -> None:
    source = ALL_KINDS[kind]
    for seed, step in itertools.product(SEEDS, (0, 1, 2**31)):
        rows = drawn(source, seed, step, 16)
        cosines = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(rows).T
        apart = cosines - torch.eye(16, dtype=rows.dtype)
        assert float(apart.abs().max()) < 0.9, (seed, step)
        if isinstance(source, Sphere):
            torch.testing.assert_close(rows.square().sum(1), torch.full((16,), 117.0).double())
        if kind == "orthogonal":
            assert float(apart.abs().max()) < 1e-6


def test_neighbouring_seeds_and_samples_share_no_direction() -> None:
    # sample k of seed s shall not be sample k - 1 of seed s + 1
    rows = torch.cat([drawn(Rademacher(), seed, step, 8) for seed in range(6) for step in range(6)])
    assert len(rows.unique(dim=0)) == len(rows)


def alike(count: int = 20) -> Dataset:
    """Images of one pixel of value 1, all of one class."""
    images, labels = torch.ones(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64)
    return Dataset((images, labels), (images, labels))


class Valley(nn.Module):
    """Logits (0, w^2), of which the cross entropy is log 2 + w^2 / 2 near 0 and w^2 far away."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        column = x.flatten(1) * self.w**2
        return torch.cat([torch.zeros_like(column), column], 1)


# a direction of one number is 1 or -1: on the sphere, forward gradients are gradients
EXACT = "fgd:directions=sphere"
SHORT = Config(iterations=3, batch=16, decay=0, compile=False)


@pytest.mark.parametrize(
    ("method", "rates"),
    [
        ("backprop", (0.25, 1, 4)),
        ("backprop", (1 / 64, 1 / 16)),
        ("backprop", (4, 16, 64)),
        (EXACT, (0.5, 1, 2)),
    ],
)
def test_the_best_rate_of_a_parabola_is_found_beyond_the_grid_too(
    tmp_path: Path, method: str, rates: tuple[float, ...]
) -> None:
    found = tuning.tuned(Valley, alike(), SHORT, [method], rates, tmp_path)
    # one over the second derivative
    assert found == (f"{method}:lr=1",)
    tried = [line["rate"] for line in figures.read(tmp_path / tuning.LINES)[1]]
    assert tried[: len(rates)] == [*rates] and min(tried) < 1 < max(tried)


@pytest.mark.parametrize("method", ["backprop", EXACT])
def test_rates_that_diverge_or_stop_lose(tmp_path: Path, method: str) -> None:
    # losses that grow, and losses that are no numbers
    rates = (0.01, 1, 100, 1e32)
    assert tuning.tuned(Valley, alike(), SHORT, [method], rates, tmp_path) == (f"{method}:lr=1",)
    losses = [line["loss"] for line in figures.read(tmp_path / tuning.LINES)[1]]
    assert losses[0] > losses[1] and losses[2:] == [None, None]


def test_a_search_where_all_rates_lose_goes_down_and_then_says_so(tmp_path: Path) -> None:
    losses = tuning.search(lambda rate: math.inf, (1.0, 2.0))
    assert min(losses) < 1e-3 and max(losses) == 2
    with pytest.raises(ValueError, match="fgd: no rate from .* to 2 ended well"):
        tuning.best(losses, "fgd")


def test_a_search_gets_finer_around_the_best_rate() -> None:
    losses = tuning.search(lambda rate: abs(math.log(rate / 2.7)), (0.1, 1, 10), halvings=2)
    # half of a step, then a quarter
    assert [*losses] == [0.1, 1, 10, 0.316228, 3.16228, 1.77828, 5.62342]
    assert tuning.best(losses, "fgd") == 3.16228


def test_a_search_goes_on_and_refuses_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tuning.tuned(Valley, alike(), SHORT, ["backprop"], (0.5, 1, 2), tmp_path)
    monkeypatch.setattr(tuning, "trial", None)
    path = tmp_path / tuning.LINES
    header, lines = figures.read(path)
    del header["config"]["share"]  # as before there was such a setting
    figures.write(path, [header, *lines])
    assert tuning.tuned(Valley, alike(), SHORT, ["backprop"], (0.5, 1, 2), tmp_path) == first
    other = replace(SHORT, iterations=4)
    with pytest.raises(ValueError, match="is of another search: config was"):
        tuning.tuned(Valley, alike(), other, ["backprop"], (0.5, 1, 2), tmp_path)


def test_the_search_holds_out_a_fifth_and_never_sees_the_validation_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.arange(50.0).view(50, 1, 1, 1)
    data = Dataset((images, torch.arange(50) % 2), (images + 100, torch.arange(50) % 2))
    splits = []

    def trial(build: object, split: Dataset, *others: object) -> float:
        splits.append(split)
        return float(len(splits) != 2)

    monkeypatch.setattr(tuning, "trial", trial)
    tuning.tuned(Valley, data, SHORT, ["backprop"], (0.5, 1, 2), tmp_path)
    for split in splits:
        parts = [set(part[0].flatten().tolist()) for part in (split.train, split.validation)]
        assert [len(part) for part in parts] == [40, 10]
        assert parts[0] | parts[1] == set(range(50))
    assert len(splits) == 3


def digits(count: int = 40) -> Dataset:
    """Few images of two by two pixels, two classes."""
    labels = torch.arange(count) % 2
    images = torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    images += labels.view(-1, 1, 1, 1)
    return Dataset((images[:30], labels[:30]), (images[30:], labels[30:]))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fwdcompile.models.HIDDEN", 4)
    monkeypatch.setattr("fwdcompile.runner.TURNS", 2)
    monkeypatch.setattr(tuning, "MOST", 0)
    monkeypatch.setattr(directions, "RATES", (1e-3, 1e-2))


def test_the_comparison_is_a_table_and_a_figure_of_its_lines(tmp_path: Path, small: None) -> None:
    config = Config(iterations=4, batch=8, runs=2, decay=0, every=2, compile=False)
    names = ("backprop, Adam", "rank-one signs, K = 4")
    methods = [directions.METHODS[name] for name in names]
    out, folder = tmp_path / "out", tmp_path / "run"
    directions.main(digits(), "dots", out, folder, config, methods)
    path = out / "directions.jsonl"
    page, svg = path.with_suffix(".md"), path.with_suffix(".svg")
    before = page.read_text(), svg.read_text()
    for made in (page, svg, path.with_suffix(".png")):
        made.unlink()
    directions.draw(path)
    assert (page.read_text(), svg.read_text()) == before
    header, lines = figures.read(path)
    rates = {m.rpartition(":lr=")[0]: m.rpartition("=")[2] for m in header["config"]["methods"]}
    for method, name in zip(methods, names, strict=True):
        (cells,) = (line.split(" | ") for line in before[0].splitlines() if f"| {name} |" in line)
        assert float(cells[1]) == pytest.approx(float(rates[method]), rel=0.05)
        own = figures.of(lines, kind="step", method=f"{method}:lr={rates[method]}", iteration=4)
        assert [line["run"] for line in own] == [0, 1]
        mean = sum(line["validation_loss"] for line in own) / 2
        assert cells[3].startswith(f"{mean:.3f} ± ")
        searched = figures.of(lines, kind="rate", method=method)
        lowest = min((r for r in searched if r["loss"] is not None), key=lambda r: r["loss"])
        assert lowest["rate"] == float(rates[method])
    assert "eager" in before[0] and "dots" in before[0]


def test_runs_that_stopped_are_counted_and_in_no_mean(tmp_path: Path) -> None:
    assert directions.average([]) == "" and directions.average([0.5]) == "0.500"
    assert directions.average([1.0, 3.0]) == "2.000 ± 1.414"
    header, lines = figures.read(figures.RESULTS / "directions.jsonl")
    method = header["config"]["methods"][0]
    end = {"kind": "end", "method": method, "run": 1, "weights": "", "stopped": "the loss is inf"}
    ends = figures.of(lines, kind="step", method=method, iteration=header["config"]["iterations"])
    kept = [line["validation_loss"] for line in ends if line["run"] != 1]
    path = tmp_path / "lines.jsonl"
    figures.write(path, [header, *lines, end])
    cells = next(directions.rows(path))
    assert cells[0] == "backprop (1 of 3 runs stopped)"
    assert cells[3] == directions.average(kept)


def test_every_method_of_the_comparison_has_a_name_and_trains(small: None) -> None:
    few = {re.sub("samples=.*", "samples=2", method) for method in directions.METHODS.values()}
    for method in sorted(few):
        loss = tuning.trial(lambda: directions.mlp((1, 2, 2), 2), digits(), SHORT, method, 1e-3)
        assert math.isfinite(loss), method
    for name, method in directions.METHODS.items():
        assert directions.name_of(f"{method}:lr=0.001") == name
    compiled = directions.METHODS["backprop, Adam"].replace("backprop", "backprop-compiled")
    assert directions.name_of(compiled) == "backprop, Adam"


def test_variance_is_drawn_from_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("normal", "sphere"):
        monkeypatch.delitem(variance.KINDS, kind)
    lines = variance.main(tmp_path, 2, 4, shapes=((2, 2),), fixed=(2, 2), counts=(1,))
    assert figures.read(tmp_path / "variance.jsonl")[1] == lines
    svg = tmp_path / "variance.svg"
    before = svg.read_text()
    svg.unlink()
    variance.draw(tmp_path / "variance.jsonl")
    assert svg.read_text() == before and "dc:date" not in before


def test_committed_moments_are_those_of_theory_and_have_their_seeds() -> None:
    header, lines = figures.read(figures.RESULTS / "variance.jsonl")
    assert header["seeds"] == [0, 1, 2, 3, 4]
    assert {line["seed"] for line in lines} == set(header["seeds"])
    moments = figures.of(lines, kind="moment")
    keys = dict.fromkeys((line["directions"], line["d"], line["count"]) for line in moments)
    assert {kind for kind, _, _ in keys} == set(variance.KINDS)
    assert {d for _, d, _ in keys} == {10, 100, 1000, 10_000}
    assert {count for _, _, count in keys} == {1, 4, 16, 64}
    for kind, d, count in keys:
        own = figures.of(moments, directions=kind, d=d, count=count)
        mean, error = variance.pooled(own)
        expected = variance.theory(kind, d, count)
        assert abs(mean - expected) < 4 * error and error < 0.04 * expected


def test_committed_comparison_has_all_methods_and_its_page(tmp_path: Path) -> None:
    path = figures.RESULTS / "directions.jsonl"
    assert directions.table(path) == path.with_suffix(".md").read_text()
    header, lines = figures.read(path)
    config = header["config"]
    assert (config["seed"], config["runs"]) == (0, 3)
    names = [directions.name_of(method) for method in config["methods"]]
    assert names == list(directions.METHODS)
    for method in config["methods"]:
        steps = figures.of(lines, kind="step", method=method, iteration=config["iterations"])
        stops = [end for end in figures.of(lines, kind="end", method=method) if end["stopped"]]
        assert {line["run"] for line in steps + stops} == {0, 1, 2}
    for kind in (".png", ".svg"):
        assert path.with_suffix(kind).exists()
