from __future__ import annotations

import math
from pathlib import Path

import pytest

from fwdcompile.errors import CheckpointError
from fwdcompile.log import Log, read


def test_records_are_appended_and_infinities_are_null(tmp_path: Path) -> None:
    with Log(tmp_path / "new") as log:
        log.write({"kind": "header", "config": {"clip": math.inf, "lr": 0.1}})
        log.write({"kind": "stop", "loss": math.nan})
        size = log.size
    path = tmp_path / "new" / "log.jsonl"
    assert path.stat().st_size == size
    assert read(path) == [
        {"kind": "header", "config": {"clip": None, "lr": 0.1}},
        {"kind": "stop", "loss": None},
    ]


def test_what_is_behind_a_checkpoint_is_dropped(tmp_path: Path) -> None:
    with Log(tmp_path) as log:
        log.write({"kind": "a"})
        kept = log.size
        log.write({"kind": "b"})
    with Log(tmp_path, keep=kept) as log:
        log.write({"kind": "c"})
    assert [r["kind"] for r in read(tmp_path / "log.jsonl")] == ["a", "c"]
    with pytest.raises(CheckpointError, match="is not the log of the checkpoint"):
        Log(tmp_path, keep=10**6)
    with Log(tmp_path) as log:
        log.write({"kind": "d"})
    assert [r["kind"] for r in read(tmp_path / "log.jsonl")] == ["d"]


def test_without_a_folder_nothing_is_written() -> None:
    with Log(None) as log:
        log.write({"kind": "a"})
        assert log.size == 0
