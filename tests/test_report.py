from __future__ import annotations

import math
from pathlib import Path

import pytest

from fwdcompile.config import Config
from fwdcompile.report import Report, Trace, plot


def trace(
    method: str, losses: list[float], run: int = 0, every: int = 10, stopped: str = ""
) -> Trace:
    return Trace(
        method,
        run,
        iterations=[every * i for i in range(len(losses))],
        train_loss=[math.nan, *losses[1:]],
        validation_loss=losses,
        accuracy=[0.5] * len(losses),
        stopped=stopped,
    )


def report(ms: dict[str, float], *traces: Trace) -> Report:
    """A report in which every turn of a method took as long; the machine slows in the end."""
    methods = tuple(dict.fromkeys(t.method for t in traces))
    times = {"base": 2.0, "base-compiled": 1.0} | ms
    turns = {name: [t / 1e3, t / 1e3, 3 * t / 1e3] for name, t in times.items()}
    return Report(Config(methods=methods), turns, list(traces))


def test_r_is_relative_to_the_base_of_the_same_kind() -> None:
    ms = {"fgd": 3.0, "backprop": 8.0, "backprop-compiled": 6.0, "torch-jvp": 16.0}
    rows = report(ms, *(trace(method, [3.0, 2.0]) for method in ms)).rows()
    assert [row.r for row in rows] == pytest.approx([3.0, 4.0, 6.0, 8.0])
    assert [row.ms for row in rows] == pytest.approx([3.0, 8.0, 6.0, 16.0])
    fgd, eager, compiled, peer = rows
    assert fgd.r_ratio == pytest.approx(0.5) and peer.r_ratio == pytest.approx(2.0)
    assert eager.r_ratio is None and compiled.t_ratio is None


def test_ratios_are_medians_over_paired_turns() -> None:
    found = report({"fgd": 1.0, "backprop": 1.0}, trace("fgd", [1.0]), trace("backprop", [1.0]))
    found.turns.update({"fgd": [1.0, 20.0, 3.0], "backprop": [2.0, 10.0, 2.0]})
    assert found.rows()[0].r_ratio == pytest.approx(1.5)
    assert found.rows()[0].ms == pytest.approx(3000)


def test_the_other_backprop_is_the_rival_where_its_own_kind_is_missing() -> None:
    ms = {"fgd": 3.0, "backprop": 6.0}
    fgd, _ = report(ms, trace("fgd", [2.0, 1.0]), trace("backprop", [2.0, 1.0])).rows()
    assert fgd.r_ratio == pytest.approx(0.5)
    (alone,) = report(ms, trace("fgd", [2.0, 1.0])).rows()
    assert alone.r_ratio is None and alone.t_ratio is None


def test_tf_is_when_the_rivals_lowest_mean_loss_is_first_reached() -> None:
    ms = {"fgd": 1.0, "backprop-compiled": 2.0}
    rival = trace("backprop-compiled", [3.0, 2.0, 1.5, 1.6])  # lowest after 20 steps of 2 ms
    found = report(ms, trace("fgd", [3.0, 1.4, 1.2, 1.0]), rival)
    assert found.rows()[0].t_ratio == pytest.approx(10 / 40)
    assert found.seconds(rival) == pytest.approx([0, 0.02, 0.04, 0.06])
    never = report(ms, trace("fgd", [3.0, 2.4, 2.2, 1.6]), rival).rows()[0]
    assert never.t_ratio is None


def test_a_rival_that_never_improves_gives_no_ratio_of_times() -> None:
    ms = {"fgd": 1.0, "backprop-compiled": 1.0}
    rising = trace("backprop-compiled", [1.0, 2.0])
    assert report(ms, trace("fgd", [1.0, 0.5]), rising).rows()[0].t_ratio is None


def test_runs_are_averaged() -> None:
    found = report(
        {"fgd": 2.0},
        trace("fgd", [3.0, 1.0], run=0),
        trace("fgd", [5.0, 2.0], run=1),
        trace("fgd", [4.0, 6.0], run=2, stopped="iteration 10: not finite"),
    )
    (row,) = found.rows()
    assert row.validation_loss == pytest.approx(3.0)
    assert row.stopped == "iteration 10: not finite"
    seconds, losses = found.mean_curve("fgd")
    assert losses == pytest.approx([4.0, 3.0]) and seconds == pytest.approx([0.0, 0.02])


def test_a_run_that_stopped_shortens_the_mean_curve() -> None:
    short = trace("fgd", [3.0, 2.0], run=1)
    short.iterations.append(13)
    short.validation_loss.append(9.0)
    found = report({"fgd": 1.0}, trace("fgd", [3.0, 2.0, 1.0]), short)
    assert found.mean_curve("fgd")[1] == pytest.approx([3.0, 2.0])


@pytest.mark.parametrize(("name", "head"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_plot_draws_a_picture(tmp_path: Path, name: str, head: bytes) -> None:
    ms = {"fgd": 1.0, "backprop": 2.0}
    found = report(ms, trace("fgd", [3.0, 1.0]), trace("backprop", [3.0, 2.0]))
    plot(found, tmp_path / name, "a title")
    assert (tmp_path / name).read_bytes().startswith(head)
