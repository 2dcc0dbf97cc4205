"""A history: the numbers that the steps of a run moved along their directions, and no tensor.

With the weights that the run began with, or those of any checkpoint on its way, it gives the
weights of every later step again, bit by bit: some fifty bytes a step, whatever the model's size.

Each line is a CRC-32 and a JSON record. The CRC goes on from line to line, so that a line that is
damaged, missing or out of place is found.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import HistoryError

Record = dict[str, Any]


class History:
    """Appends records to a file. A record is there when `write` returns, also if we are killed.

    Args:
        path: of the file; its directory is made.
        header: what has to be equal for a run to be replayed.
        begin: iteration that the run is at; the records of a file that exists are kept up to it.

    Raises:
        HistoryError: the file has another header, or ends before `begin`.
    """

    def __init__(self, path: Path, header: Record, begin: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._crc, keep = 0, 0
        if path.exists() and path.stat().st_size:
            keep, self._crc = _kept(path, header, begin)
        elif begin:
            raise HistoryError(f"{path} is not there, and the run is at iteration {begin}")
        self._file = path.open("ab")
        self._file.truncate(keep)
        if not keep:
            self.write({"kind": "header", **header})

    def write(self, record: Record) -> None:
        """Adds a record."""
        text = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
        self._crc = zlib.crc32(text, self._crc)
        self._file.write(b"%08x %s\n" % (self._crc, text))
        self._file.flush()

    def close(self) -> None:
        """Ends the history: what is cut off behind this can be told from a run that was stopped."""
        self.write({"kind": "end"})
        os.fsync(self._file.fileno())
        self._file.close()


@dataclass(frozen=True)
class Line:
    """A record, with the place in the file behind it and the CRC up to it."""

    record: Record
    place: int
    crc: int


def read(path: str | Path, unfinished: bool = False) -> list[Record]:
    """The records of a history.

    Args:
        path: of the file.
        unfinished: takes what is there of a run that was stopped or goes on; a last line that is
            not whole is left out.

    Returns:
        The header first. Steps are `{"i": iteration, "m": moves}`.

    Raises:
        HistoryError: a line is damaged or missing, named by its number; or the history has no end,
            and `unfinished` is not set.
    """
    path = Path(path)
    records = [line.record for line in _lines(path, unfinished)]
    if not records or records[0].get("kind") != "header":
        raise HistoryError(f"{path} does not begin as a history does")
    if not unfinished and records[-1].get("kind") != "end":
        steps = sum("m" in record for record in records)
        raise HistoryError(
            f"{path} has no end after {steps} steps: the run was stopped, or the file was cut; "
            "unfinished=True takes what is there"
        )
    return records


def _lines(path: Path, unfinished: bool) -> Iterator[Line]:
    crc = place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place += len(line)
            told, _, text = line.rstrip(b"\n").partition(b" ")
            crc = zlib.crc32(text, crc)
            if not line.endswith(b"\n"):
                if unfinished:
                    return
                raise HistoryError(f"{path}, line {number}: cut off in the middle")
            if told != b"%08x" % crc:
                raise HistoryError(
                    f"{path}, line {number}: damaged, or a line before it is missing"
                )
            yield Line(json.loads(text), place, crc)


def _kept(path: Path, header: Record, begin: int) -> tuple[int, int]:
    """How much of a file is of the steps before `begin`, and the CRC up to there."""
    lines = list(_lines(path, unfinished=True))
    if not lines:
        return 0, 0
    check_header(path, lines[0].record, header)
    if not begin and any("m" in line.record for line in lines):
        raise HistoryError(f"{path} holds the steps of a run: replay it, or name another")
    last, done = lines[0], 0
    for line in lines[1:]:
        if line.record.get("kind") == "end" or line.record.get("i", 0) >= begin:
            break
        last = line
        done = max(done, line.record["i"] + 1) if "m" in line.record else done
    if done < begin:
        raise HistoryError(f"{path} ends at iteration {done}, the run is at {begin}")
    return last.place, last.crc


def check_header(path: Path, theirs: Record, header: Record) -> None:
    """Refuses the history of a run that began otherwise.

    Raises:
        HistoryError: names what differs.
    """
    for name, mine in header.items():
        if theirs.get(name) != mine:
            raise HistoryError(
                f"{path} is the history of another run: {name} is {theirs.get(name)} there, "
                f"{mine} here"
            )
