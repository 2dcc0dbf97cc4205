from __future__ import annotations

import math
from pathlib import Path

import pytest

from fwdcompile.methods import Config
from fwdcompile.report import Report, Trace, plot


def trace(
    method: str, losses: list[float], ms: float, run: int = 0, every: int = 10, stopped: str = ""
) -> Trace:
    steps = every * (len(losses) - 1)
    return Trace(
        method,
        run,
        iterations=[every * i for i in range(len(losses))],
        train_loss=[math.nan, *losses[1:]],
        validation_loss=losses,
        accuracy=[0.5] * len(losses),
        step_seconds=[ms / 1e3] * steps,
        stopped=stopped,
    )


def report(*traces: Trace) -> Report:
    methods = tuple(dict.fromkeys(t.method for t in traces))
    return Report(Config(methods=methods), {"eager": 0.002, "compiled": 0.001}, list(traces))


def test_first_steps_count_as_median_ones() -> None:
    slow = trace("fgd", [3.0, 2.0], 2.0)
    slow.step_seconds[0] = 30.0
    assert slow.step_median == pytest.approx(0.002)
    assert slow.seconds == pytest.approx([0.0, 0.02])


def test_a_run_of_no_step_has_no_time() -> None:
    empty = Trace("fgd", 0, [0], [math.nan], [2.0], [0.1])
    assert math.isnan(empty.step_median) and empty.seconds == [0.0]


def test_r_is_relative_to_the_base_of_the_same_kind() -> None:
    losses = [3.0, 2.0]
    rows = report(
        trace("fgd", losses, 3.0),
        trace("backprop", losses, 8.0),
        trace("backprop-compiled", losses, 6.0),
        trace("torch-jvp", losses, 16.0),
    ).rows()
    assert [row.r for row in rows] == pytest.approx([3.0, 4.0, 6.0, 8.0])
    assert [row.ms for row in rows] == pytest.approx([3.0, 8.0, 6.0, 16.0])
    fgd, eager, compiled, peer = rows
    assert fgd.r_ratio == pytest.approx(0.5) and peer.r_ratio == pytest.approx(2.0)
    assert eager.r_ratio is None and compiled.t_ratio is None


def test_the_other_backprop_is_the_rival_where_its_own_kind_is_missing() -> None:
    fgd, _ = report(trace("fgd", [2.0, 1.0], 3.0), trace("backprop", [2.0, 1.0], 6.0)).rows()
    assert fgd.r_ratio == pytest.approx(0.5)
    (alone,) = report(trace("fgd", [2.0, 1.0], 3.0)).rows()
    assert alone.r_ratio is None and alone.t_ratio is None


def test_tf_is_when_the_rivals_lowest_mean_loss_is_first_reached() -> None:
    rival = [3.0, 2.0, 1.5, 1.6]  # lowest after 20 steps of 2 ms
    found = report(
        trace("fgd", [3.0, 1.4, 1.2, 1.0], 1.0), trace("backprop-compiled", rival, 2.0)
    ).rows()[0]
    assert found.t_ratio == pytest.approx(10 / 40)
    never = report(
        trace("fgd", [3.0, 2.4, 2.2, 1.6], 1.0), trace("backprop-compiled", rival, 2.0)
    ).rows()[0]
    assert never.t_ratio is None


def test_a_rival_that_never_improves_gives_no_ratio_of_times() -> None:
    rising = trace("backprop-compiled", [1.0, 2.0], 1.0)
    assert report(trace("fgd", [1.0, 0.5], 1.0), rising).rows()[0].t_ratio is None


def test_runs_are_averaged_and_medians_taken() -> None:
    found = report(
        trace("fgd", [3.0, 1.0], 1.0, run=0),
        trace("fgd", [5.0, 2.0], 2.0, run=1),
        trace("fgd", [4.0, 6.0], 9.0, run=2, stopped="iteration 10: not finite"),
    )
    (row,) = found.rows()
    assert row.validation_loss == pytest.approx(3.0) and row.ms == pytest.approx(2.0)
    assert row.stopped == "iteration 10: not finite"
    seconds, losses = found.mean_curve("fgd")
    assert losses == pytest.approx([4.0, 3.0]) and seconds == pytest.approx([0.0, 0.04])


def test_a_run_that_stopped_shortens_the_mean_curve() -> None:
    short = trace("fgd", [3.0, 2.0], 1.0, run=1)
    short.iterations.append(13)
    short.validation_loss.append(9.0)
    short.step_seconds += [0.001] * 3
    found = report(trace("fgd", [3.0, 2.0, 1.0], 1.0), short)
    assert found.mean_curve("fgd")[1] == pytest.approx([3.0, 2.0])


@pytest.mark.parametrize(("name", "head"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_plot_draws_a_picture(tmp_path: Path, name: str, head: bytes) -> None:
    found = report(trace("fgd", [3.0, 1.0], 1.0), trace("backprop", [3.0, 2.0], 2.0))
    plot(found, tmp_path / name, "a title")
    assert (tmp_path / name).read_bytes().startswith(head)
