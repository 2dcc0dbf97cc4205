"""The paper's figures 1, 2 and 6: what the scripts write is true, and what they draw is that."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fwdcompile
from fwdcompile.measure import in_fresh_process
from fwdcompile.words import stream_keys

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import depth
import figures
import forward_gradient_beale
import test_functions
from test_functions import DESCENTS, Descent, Point, beale

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def made(folder: Path, stem: str) -> None:
    assert (folder / f"{stem}.png").stat().st_size > 10_000
    svg = (folder / f"{stem}.svg").read_text()
    assert "<text" in svg and "dc:date" not in svg


def redrawn(folder: Path, stem: str, draw: Any) -> None:
    """The lines alone give the same file."""
    svg = folder / f"{stem}.svg"
    before = svg.read_text()
    svg.unlink()
    draw(folder / f"{stem}.jsonl")
    assert svg.read_text() == before


def test_lines_come_back_and_a_file_without_a_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    header = figures.header(torch.device("cpu"), seeds=[0, 1])
    figures.write(path, [header, {"kind": "a", "n": 1}])
    figures.append(path, [{"kind": "a", "n": 2}, {"kind": "b", "n": 2}])
    assert figures.read(path)[0] == header and header["torch"] == torch.__version__
    assert figures.of(figures.read(path)[1], kind="a", n=2) == [{"kind": "a", "n": 2}]
    with pytest.raises(ValueError, match="Out of range"):
        figures.append(path, [{"kind": "a", "n": math.inf}])
    assert len(figures.read(path)[1]) == 3
    path.write_text('{"kind": "a"}\n')
    with pytest.raises(ValueError, match="does not begin with a header"):
        figures.read(path)


@pytest.mark.parametrize("count", [1, 2, 7, 25_001])
def test_what_is_kept_of_a_curve_has_both_ends(count: int) -> None:
    places = figures.kept(count, 100)
    assert places[0] == 0 and places[-1] == count - 1 and len(places) <= 100
    assert places == sorted(set(places))


@pytest.mark.parametrize("name", DESCENTS)
def test_a_test_function_has_its_minimum_zero_where_the_star_is(name: str) -> None:
    function, minimum = DESCENTS[name].function, DESCENTS[name].minimum
    at = torch.tensor(minimum, dtype=torch.float64, requires_grad=True)
    value = function(at)
    assert float(value.detach()) == 0
    assert not torch.autograd.grad(value, at)[0].any()
    assert (function(at.detach() + 0.1 * torch.randn(1000, 2, dtype=torch.float64)) > 0).all()


def test_forward_gradients_are_directions_times_the_slope_along_them(tmp_path: Path) -> None:
    lines = forward_gradient_beale.main(tmp_path, runs=2, counts=(5, 20))
    point = torch.tensor(forward_gradient_beale.POINT, dtype=torch.float64, requires_grad=True)
    (true,) = torch.autograd.grad(beale(point), point)
    (start,) = figures.of(lines, kind="point")
    assert start["gradient"] == true.tolist() and start["value"] == float(beale(point.detach()))
    samples = figures.of(lines, kind="sample")
    assert len({tuple(line["direction"]) for line in samples}) == 5
    for line in samples:
        v = torch.tensor(line["direction"], dtype=torch.float64)
        found = torch.tensor(line["gradient"], dtype=torch.float64)
        torch.testing.assert_close(found, (true @ v) * v, rtol=1e-12, atol=1e-12)
    (mean,) = figures.of(lines, kind="mean", count=5, seed=0)
    expected = torch.tensor([line["gradient"] for line in samples], dtype=torch.float64).mean(0)
    torch.testing.assert_close(torch.tensor(mean["mean"], dtype=torch.float64), expected)
    made(tmp_path, "forward_gradient_beale")
    redrawn(tmp_path, "forward_gradient_beale", forward_gradient_beale.draw)


def test_the_mean_approaches_the_gradient_with_the_root_of_the_count() -> None:
    point = torch.tensor([1.5, -0.1], dtype=torch.float64)
    true = forward_gradient_beale.true_gradient(point)
    for count in (100, 10_000):
        lines = [forward_gradient_beale.mean(point, count, seed, true) for seed in range(50)]
        found = math.sqrt(sum(line["error"] ** 2 for line in lines) / 50)
        # over 50 seeds it spreads by 7 percent
        assert found == pytest.approx(math.sqrt(3 / count), rel=0.25)


def by_hand(descent: Descent) -> list[tuple[float, float, float]]:
    x, path = torch.tensor(descent.start, dtype=torch.float64), []
    for _ in range(descent.iterations + 1):
        loss, gradient = torch.func.grad_and_value(descent.function)(x)[::-1]
        path.append((float(loss), *x.tolist()))
        x = x - descent.lr * gradient
    return path


@pytest.mark.parametrize("name", DESCENTS)
def test_backpropagation_descends_as_a_loop_by_hand(name: str) -> None:
    descent = DESCENTS[name]
    few = replace(descent, iterations=30)
    model = Point(few.function, few.start)
    step = test_functions.backprop(model, few.lr, compile=False)
    path, stopped = test_functions.descend(model, step, few.iterations)
    assert stopped is None
    torch.testing.assert_close(torch.tensor(path), torch.tensor(by_hand(few)))
    assert path[-1][0] < path[0][0]


def test_forward_gradient_descent_moves_along_forward_gradients() -> None:
    model = Point(beale, (1.5, -0.1))
    path, _ = test_functions.descend(model, test_functions.fgd(model, 0.01, False, seed=3), 4)
    for number, ((_, *before), (_, *after)) in enumerate(itertools.pairwise(path)):
        at = torch.tensor(before, dtype=torch.float64)
        key = stream_keys(torch.tensor(3), torch.tensor(number))[0, 0]
        v = fwdcompile.Normal().draw((2,), key=key, dtype=torch.float64)
        move = -0.01 * (torch.func.grad(beale)(at) @ v) * v
        torch.testing.assert_close(torch.tensor(after, dtype=torch.float64), at + move)
    assert path[0][1:] == (1.5, -0.1) and len(path) == 5


@pytest.mark.parametrize("method", test_functions.METHODS)
def test_a_run_ends_where_numbers_do_and_is_counted(method: str) -> None:
    model = Point(beale, (1.5, -0.1))
    step = test_functions.METHODS[method](model, 1e3, compile=False)
    path, stopped = test_functions.descend(model, step, 50)
    assert 0 < len(path) < 50 and stopped and all(map(math.isfinite, path[-1]))
    line = test_functions.curve("Beale", method, 0, path, stopped)
    time = {"kind": "time", "function": "Beale", "compiled": False}
    row = test_functions.table(
        [time | {"seconds": dict.fromkeys(test_functions.METHODS, 1.0)}, line]
    )
    assert f"| Beale | {method} | 1 | 1 | nan | nan |" in row


@pytest.fixture(scope="module")
def descended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("figure-2")
    few = {name: replace(descent, iterations=40) for name, descent in DESCENTS.items()}
    lines = test_functions.main(folder, runs=2, turns=2, compile=False, descents=few)
    return folder, lines


def test_figure_2_has_runs_of_equal_length_and_the_time_of_a_step(descended: Any) -> None:
    folder, lines = descended
    for name, descent in DESCENTS.items():
        runs = figures.of(lines, kind="run", function=name)
        assert [line["seed"] for line in runs] == [None, 0, 1]
        ends = {(line["iteration"][0], line["iteration"][-1]) for line in runs}
        starts = {(line["x"][0], line["y"][0]) for line in runs}
        assert ends == {(0, 40)} and starts == {descent.start}
        # seeds differ, so do their ways
        assert runs[1]["final"] != runs[2]["final"]
        assert all(figures.short(line["final"]) == line["loss"][-1] for line in runs)
        (time,) = figures.of(lines, kind="time", function=name)
        assert all(seconds > 0 for seconds in time["seconds"].values())
    made(folder, "test_functions")
    redrawn(folder, "test_functions", test_functions.draw)


def test_a_run_that_stopped_is_marked(descended: Any, tmp_path: Path) -> None:
    header, lines = figures.read(descended[0] / "test_functions.jsonl")
    curves = []
    for stopped in (None, "the loss is inf"):
        (line, *_) = figures.of(lines, kind="run", method="fgd")
        line["stopped"] = stopped
        figures.write(tmp_path / "lines.jsonl", [header, *lines])
        test_functions.draw(tmp_path / "lines.jsonl")
        curves.append((tmp_path / "lines.svg").read_text().count('<g id="line2d'))
    assert curves[1] == curves[0] + 3


@pytest.mark.compiled
def test_a_compiled_descent_is_the_eager_one() -> None:
    ways = []
    for compile in (False, True):
        model = Point(beale, (1.5, -0.1))
        ways.append(test_functions.descend(model, test_functions.fgd(model, 0.01, compile), 10)[0])
    torch.testing.assert_close(torch.tensor(ways[1]), torch.tensor(ways[0]))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Figure 6 of one layer, with all that fresh processes do done in this one."""
    folder = tmp_path_factory.mktemp("figure-6")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FWDCOMPILE_COSTS", str(folder / "costs.json"))
        patch.setattr(depth, "in_fresh_process", here)
        depth.main(folder, depths=(1,), **SETTINGS)
    return folder


SETTINGS = {"batch": 2, "measurements": 2, "pairs": 2, "threads": 1, "compile": False}


def here(script: str, flag: str, *task: str, environment: dict[str, str]) -> Any:
    assert (Path(script).name, flag) == ("depth.py", "--one")
    return json.loads(json.dumps(depth.one(*task)))


@linux
def test_figure_6_has_quotients_of_its_lines(deep: Path) -> None:
    header, lines = figures.read(deep / "depth.jsonl")
    assert header["setup"]["pairs"] == 2 and header["torch"] == torch.__version__
    times = figures.of(lines, kind="time", depth=1)
    assert [line["measurement"] for line in times] == [0, 1]
    for method in depth.FORWARD:
        found = depth.quotients(lines, method, depth.BACKPROP)
        expected = [line["relative"][method] / line["relative"]["backprop"] for line in times]
        assert found == {1: expected}
    for line in times:
        assert line["relative"]["base"] == 1 and min(line["milliseconds"].values()) > 0
    memory = {line["method"]: line for line in figures.of(lines, kind="memory")}
    assert list(memory) == list(depth.STEPS)
    assert {line["parameters"] for line in memory.values()} == {4 * 1024 * (784 + 10)}
    assert memory["backprop"]["peak"] > memory["base"]["peak"]
    made(deep, "depth")
    redrawn(deep, "depth", depth.draw)


@linux
def test_depths_that_are_there_stay_when_a_run_goes_on(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("runs again")

    monkeypatch.setattr(depth, "in_fresh_process", none)
    before = (deep / "depth.jsonl").read_text()
    depth.main(deep, depths=(1,), resume=True, **SETTINGS)
    assert (deep / "depth.jsonl").read_text() == before
    with pytest.raises(ValueError, match="was measured otherwise"):
        depth.main(deep, depths=(1,), resume=True, **(SETTINGS | {"pairs": 3}))
    with pytest.raises(AssertionError, match="runs again"):
        depth.main(deep, depths=(1, 3), resume=True, **SETTINGS)


@linux
def test_a_fresh_process_answers_for_one_method() -> None:
    settings = json.dumps(asdict(depth.Setup(batch=2, threads=1, compile=False)))
    line = in_fresh_process(depth.__file__, "--one", "base", "1", settings)
    assert (line["depth"], line["method"], line["data"]) == (1, "base", 2 * (28 * 28 * 4 + 8))


def test_every_method_of_figure_6_returns_the_loss() -> None:
    setup = depth.Setup(batch=2, compile=False)
    for method in depth.STEPS:
        model, x, y = setup.problem(1)
        expected = torch.nn.functional.cross_entropy(model(x), y)
        loss = depth.STEPS[method](model, x, y, compile=False)(x, y)
        torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize(
    ("stem", "draw"),
    [
        ("forward_gradient_beale", forward_gradient_beale.draw),
        ("test_functions", test_functions.draw),
    ],
)
def test_committed_figures_are_drawn_from_their_lines(stem: str, draw: Any, tmp_path: Path) -> None:
    path = figures.RESULTS / f"{stem}.jsonl"
    header, lines = figures.read(path)
    assert header["seeds"] == list(range(10)) and header["fwdcompile"] == fwdcompile.__version__
    assert {line["seed"] for line in lines if line.get("seed") is not None} == set(range(10))
    assert path.stat().st_size < 100_000
    copy = tmp_path / path.name
    copy.write_text(path.read_text())
    draw(copy)
    made(tmp_path, stem)
    for kind in (".png", ".svg"):
        assert path.with_suffix(kind).exists()
