from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fwdcompile.checkpoint import load, save
from fwdcompile.errors import CheckpointError


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    assert load(path) is None
    state = {"tensor": torch.arange(3), "nested": [{"rate": 0.1, "name": "fgd", "none": None}]}
    save(path, {"old": 1})
    save(path, state)
    found = load(path)
    assert found is not None and torch.equal(found["tensor"], state["tensor"])  # type: ignore
    assert found["nested"] == state["nested"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_directory_that_is_not_there_or_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is none yet. Free space"):
        save(tmp_path / "missing" / "checkpoint.pt", {})
    (tmp_path / "checkpoint.new").mkdir()
    with pytest.raises(CheckpointError, match="could be written"):
        save(tmp_path / "checkpoint.pt", {})


@pytest.mark.parametrize("keep", [0, 100])
def test_a_damaged_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "checkpoint.pt"
    save(path, {"tensor": torch.arange(1000)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"checkpoint.pt is no checkpoint \(.*begin without"):
        load(path)


def test_code_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"code": Path}, path)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load(path)
