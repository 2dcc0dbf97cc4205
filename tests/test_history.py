from __future__ import annotations

from pathlib import Path

import pytest

from fwdcompile.errors import HistoryError
from fwdcompile.history import History, read

HEADER = {"seed": 3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    history = History(tmp_path / "run" / "history", HEADER)
    for i in range(5):
        history.write({"i": i, "m": [[i / 3, -1e-300]]})
    history.close()
    return tmp_path / "run" / "history"


def test_numbers_come_back_bit_by_bit(path: Path) -> None:
    header, *steps, end = read(path)
    assert header == {"kind": "header", "seed": 3}
    assert steps == [{"i": i, "m": [[i / 3, -1e-300]]} for i in range(5)]
    assert end == {"kind": "end"}


def test_damage_is_named(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace('"i":2', '"i":7'))
    for unfinished in (False, True):
        with pytest.raises(HistoryError, match="line 4: damaged"):
            read(path, unfinished)
    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(HistoryError, match="line 4: damaged, or a line before it is missing"):
        read(path)
    path.write_text("".join([lines[0], *lines[2:1:-1], *lines[3:]]))
    with pytest.raises(HistoryError, match="line 2: damaged"):
        read(path)
    path.write_bytes(b"\x00\xff\n")
    with pytest.raises(HistoryError, match="line 1: damaged"):
        read(path)


def test_a_cut_is_named_wherever_it_is(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(HistoryError, match=r"cut off|no end|does not begin"):
            read(path)


def test_unfinished_takes_whole_lines(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b'"i":3') + 3])
    assert [record["i"] for record in read(path, unfinished=True)[1:]] == [0, 1, 2]


def test_goes_on_where_the_run_is(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b'"i":4') + 3])
    history = History(path, HEADER, begin=3)
    for i in (3, 4):
        history.write({"i": i, "m": [[i / 3, -1e-300]]})
    history.close()
    assert path.read_bytes() == whole


def test_what_does_not_fit_is_refused(path: Path) -> None:
    for header, begin, told in (
        ({"seed": 4}, 3, "seed is 3 there, 4 here"),
        (HEADER, 9, "ends at iteration 5, the run is at 9"),
        (HEADER, 0, "holds the steps of a run"),
    ):
        before = path.read_bytes()
        with pytest.raises(HistoryError, match=told):
            History(path, header, begin)
        assert path.read_bytes() == before
    with pytest.raises(HistoryError, match="is not there, and the run is at iteration 2"):
        History(path.with_name("other"), HEADER, begin=2)
