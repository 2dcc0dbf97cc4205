"""Contests: ways to compute one thing take turns in one process, and each is compared with ours."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import RESULTS, Cells, hardware, header, prepare, publish, refusal, refusals, table
from torch import nn
from torch._inductor.utils import fresh_cache

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


@dataclass(frozen=True)
class Case:
    """A model and the shape of its input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Contest:
    """A benchmark of ways to compute one thing of some models.

    Attributes:
        title: what is computed.
        file: of the results, without an ending.
        command: that writes them.
        cases: the models by name.
        ways: those of torch, ours first.
        apart: the way of another library.
        start: from a way, a model and tensors of its input's shape to a run and the seconds of the
            first.
        tensors: how many there are.
    """

    title: str
    file: str
    command: str
    cases: Mapping[str, Case]
    ways: Sequence[str]
    apart: str
    start: Callable[..., tuple[Run, float]]
    tensors: int = 1

    def page(self, result: dict[str, Any]) -> str:
        """The result as Markdown."""
        works = result["works"]
        columns = {name: entry["methods"] for name, entry in works.items()}
        ways = [*self.ways, self.apart]
        return "\n".join(
            (
                table(f"{self.title}, ms", columns, milliseconds, ways, "-"),
                table(f"{self.title}, seconds of the first", columns, seconds, ways, "-"),
                refusals(works),
                f"In brackets the ratio to `{self.ways[0]}`. "
                + run_under(next(iter(works.values())), self.command),
            )
        )

    def main(self, description: str, pairs: int) -> None:
        """The command line: runs all cases and writes the results."""
        parser = argparse.ArgumentParser(description=description.splitlines()[0])
        parser.add_argument("--pairs", type=int, default=pairs, help="turns that each way takes")
        parser.add_argument("--out", type=Path, default=RESULTS)
        options = parser.parse_args()
        prepare("float32")
        works = {name: self._work(name, case, options.pairs) for name, case in self.cases.items()}
        result = {"works": works}
        publish(options.out, self.file, result, self.page(result))

    def _work(self, name: str, case: Case, pairs: int) -> dict[str, Any]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = case.make().requires_grad_(False)
        tensors = [torch.randn(case.shape) for _ in range(self.tensors)]
        entry = header(name, case.shape[0], "float32", "cpu") | {"pairs": pairs}
        ways = (*self.ways, self.apart)
        starts = {way: lambda way=way: self.start(way, model, *tensors) for way in ways}
        with fresh_cache():  # so that the first turn finds nothing compiled
            return entry | {"methods": contest(starts, self.ways[0], (self.apart,), pairs)}
