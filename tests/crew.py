"""Worker processes over gloo that tests send functions to; they start once for a whole file."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Crew:
    """Runs a function in all of its workers at once and returns what each of them returned.

    A function takes its worker's rank and then the arguments, and can be pickled. Where one raises,
    the exception is what its worker returned.
    """

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        store = Path(tempfile.mkdtemp()) / "store"
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, store), daemon=True)
            process.start()
            self._ends.append(mine)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for end in self._ends:
            end.send((function, args))
        return [end.recv() for end in self._ends]

    def close(self) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()


def _serve(end: Connection, rank: int, size: int, store: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (task := end.recv()) is not None:
        function, args = task
        try:
            end.send(function(rank, *args))
        except Exception as error:
            error.add_note(traceback.format_exc())
            end.send(error)
    dist.destroy_process_group()
