"""Checkpoints of a comparison: one file, replaced as a whole; a kill leaves the last one."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint beside the last one and puts it in its place once it is on the disk.

    Args:
        path: of the file; its directory exists.
        state: nested dicts and lists of tensors, numbers and strings.

    Raises:
        CheckpointError: the file cannot be written; the last one is as it was.
    """
    draft = path.with_suffix(".new")
    try:
        with draft.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        with contextlib.suppress(OSError):
            draft.unlink()
        kept = "the last one is as it was" if path.exists() else "there is none yet"
        raise CheckpointError(
            f"no checkpoint could be written to {path} ({error}); {kept}. Free space or name "
            "another directory, and go on with --resume"
        ) from error


def load(path: Path) -> dict[str, Any] | None:
    """Reads a checkpoint; None where there is none. Nothing but data is read, no code.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} is no checkpoint ({reason}); begin without --resume"
        ) from error
    return state
