"""The log of a comparison: JSON lines, and TensorBoard's events if asked for."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import CheckpointError

MEASURES = ("train_loss", "validation_loss", "accuracy")


class Log:
    """Appends records to `log.jsonl` in a folder; without a folder it does nothing.

    Args:
        folder: is made where it is missing.
        keep: bytes of an earlier log to go on behind; what is after them is dropped.
        tensorboard: writes event files, too, of the records of kind "step".

    Raises:
        OSError: the folder or the file cannot be made.
        CheckpointError: the earlier log is shorter than what shall be kept of it.
    """

    def __init__(self, folder: Path | None, keep: int = 0, tensorboard: bool = False) -> None:
        self._file = None
        self._events: Any = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        if keep and (not path.exists() or path.stat().st_size < keep):
            raise CheckpointError(
                f"{path} is not the log of the checkpoint; begin without --resume"
            )
        self._file = path.open("ab")
        self._file.truncate(keep)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in (self._file, self._events):
            if stream is not None:
                stream.close()

    @property
    def size(self) -> int:
        """Bytes of the file, all of them on the disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record; what is not finite becomes null, as JSON has no word for it."""
        if self._file is not None:
            line = json.dumps(finite(record), allow_nan=False) + "\n"
            self._file.write(line.encode())
            self._file.flush()
        if self._events is not None and record["kind"] == "step":
            for name in MEASURES:
                if math.isfinite(record[name]):
                    tag = f"{name}/{record['method']}-{record['run']}"
                    self._events.add_scalar(tag, record[name], record["iteration"])


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def finite(x: Any) -> Any:
    """A record as JSON has it: None where a number is not finite."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x
