"""Contests: ways to compute one thing take turns in one process, and each is compared with ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from results import Cells, hardware, refusal

from fwdcompile.measure import ratio, take_turns

CPU = torch.device("cpu")
PAUSE = 0.02
TURN = 2  # runs between two looks at the clock
Run = Callable[[], Any]


def contest(
    starts: Mapping[str, Callable[[], tuple[Run, float]]],
    ours: str,
    apart: Collection[str],
    pairs: int,
) -> Cells:
    """Milliseconds, seconds of the first turn and the ratio to ours; or why there are none.

    Args:
        starts: by way, what makes its run and says how many seconds the first turn took; what it
            raises is told in place of a time.
        ours: the way that all are compared with.
        apart: ways of another library, whose threads spin on: they come last, after pauses, and
            take turns with ours alone.
        pairs: how many turns each takes.
    """
    runs: dict[str, Run] = {}
    first: dict[str, float] = {}
    cells: Cells = {}
    for group in ([way for way in starts if way not in apart], [w for w in starts if w in apart]):
        for way in group:
            try:
                runs[way], first[way] = starts[way]()
            except Exception as error:
                cells[way] = refusal(error)
        taking = {way: runs[way] for way in dict.fromkeys((ours, *group)) if way in runs}
        pause = PAUSE if group and group[0] in apart else 0.0
        turns = take_turns(taking, TURN, CPU, pairs, pause)
        for way in (way for way in group if way in runs):
            cells[way] = {
                "ms": statistics.median(turns[way]) * 1e3,
                "first, seconds": first[way],
                "ratio": ratio(turns, way, ours),
            }
    return cells


def milliseconds(cell: dict[str, Any]) -> str:
    """A time, and its ratio to ours in brackets."""
    return f"{cell['ms']:.2f} ({cell['ratio']:.2f})"


def seconds(cell: dict[str, Any]) -> str:
    """The time of the first turn."""
    return f"{cell['first, seconds']:.1f}"


def run_under(entry: dict[str, Any], command: str) -> str:
    """The sentence below the tables: the machine, and what wrote them."""
    machine = entry["environment"]
    return (
        f"{hardware(entry)}, {machine['threads']} threads, torch {machine['torch']}, "
        f"JAX {machine['jax']}, float32. Written by `{command}`.\n"
    )
