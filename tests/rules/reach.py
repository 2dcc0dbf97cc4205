"""Which rows of the table the samples of torch's operator database reach, and one for each row.

    python tests/rules/reach.py              # writes reach.json; says which rows lack a sample
    python tests/rules/reach.py abs addmm    # scans these entries only, keeps the rest

`reach.json` gives, for each row, the entries that reach it and one sample, [entry, number], on
which the row is right at first and second order: samples at a kink, where differences say
nothing, are passed over.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from check import check
from opinfo import cases, entries
from samples import samples
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fwdcompile import rule
from fwdcompile.capture import capture
from fwdcompile.program import Program, is_differentiable

PAGE = Path(__file__).with_name("reach.json")
SAMPLES, TRIES = 6, 8
UNCHECKED = ("zero", "not_implemented")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

all_entries = cache(entries)
all_cases = cache(lambda entry: cases(all_entries()[entry]))


def committed() -> dict[str, Any]:
    """The content of reach.json: by row, its `entries` and its `sample`."""
    return json.loads(PAGE.read_text()) if PAGE.exists() else {}


def rows() -> dict[str, rule.Rule]:
    """The rows of rules/ by name of the overload, sorted."""
    own = ((str(op), row) for op, row in rule.table.items() if row.where.startswith("rules/"))
    return dict(sorted(own))


@cache
def captured(entry: str, number: int) -> Program:
    """The program of one sample."""
    case = all_cases(entry)[number]
    return capture(case.function, case.tensors, {})


def calls(program: Program, tensors: tuple[Tensor, ...], op: Any) -> list[Arguments]:
    """Runs a program and returns the arguments of each call of `op` in it."""
    found = []

    class Recorder(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is op:
                found.append(pytree.tree_map_only(Tensor, torch.detach, (args, kwargs)))
            return super().call_function(target, args, kwargs)

    inputs = iter(tensors)
    constants = program.constants
    values = [constants[s.name] if s.kind == "constant" else next(inputs) for s in program.inputs]
    Recorder(fx.GraphModule({}, program.graph)).run(*values)
    return found


def of_sample(row: rule.Rule, entry: str, number: int) -> Arguments:
    """The arguments that a sample calls the row's op with, the first that can have a tangent."""
    found = calls(captured(entry, number), all_cases(entry)[number].tensors, row.op)
    assert found, f"{entry}, sample {number}, does not reach {row.op}"
    return next((c for c in found if differentiable(row, c)), found[0])


def differentiable(row: rule.Rule, arguments: Arguments) -> tuple[int, ...]:
    """Numbers of the tensors among the arguments that the row takes a tangent of."""
    args, kwargs = arguments
    names = [a.name for a in row.op._schema.arguments]
    named = [(name, leaf) for name, x in zip(names, args, strict=False) for leaf in _tensors(x)]
    named += [(name, leaf) for name, x in kwargs.items() for leaf in _tensors(x)]
    return tuple(
        i
        for i, (name, x) in enumerate(named)
        if name in row.wrt and is_differentiable(x) and x.numel()
    )


def check_row(
    row: rule.Rule, arguments: Arguments, oracle: str = "jvp", second: bool = True
) -> None:
    """Checks a row on arguments; where torch has no forward derivative, by differences."""
    args, kwargs = arguments
    wrt = differentiable(row, arguments)
    assert wrt, f"{row.op}: no argument of the sample can have a tangent"
    try:
        check(row.op, *args, wrt=wrt, oracle=oracle, second=second, **kwargs)
    except NotImplementedError:
        check(row.op, *args, wrt=wrt, oracle="difference", second=second, **kwargs)


def scan(entry: str) -> dict[str, list[int]]:
    """By row, the samples of an entry that reach it, of `SAMPLES` spread over the entry's."""
    count = len(all_cases(entry))
    numbers = sorted({i * count // SAMPLES for i in range(SAMPLES)}) if count else []
    try:
        return _together(entry, numbers)
    except Exception:
        found: dict[str, list[int]] = {}
        for number in numbers:
            for op, reaching in _attempt(entry, number).items():
                found.setdefault(op, []).extend(reaching)
        return found


def choose(row: rule.Rule, candidates: list[list[Any]]) -> tuple[list[Any] | None, str]:
    """The first candidate on which the row is right, or None and the last failure."""
    failure = "no sample reaches it"
    for entry, number in candidates[:TRIES]:
        try:
            arguments = of_sample(row, entry, number)
            if row.word not in UNCHECKED:
                check_row(row, arguments)
        except Exception as error:
            failure = f"{entry} {number}: {type(error).__name__}: {error}"
        else:
            return [entry, number], ""
    return None, failure


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def _attempt(entry: str, number: int) -> dict[str, list[int]]:
    try:
        return _together(entry, [number])
    except Exception as error:
        print(f"{entry} {number}: {str(error).splitlines()[0][:150]}", flush=True)
        return {}


def _together(entry: str, numbers: list[int]) -> dict[str, list[int]]:
    """Captures several samples as one program: a sample's rows are what its outputs need."""
    chosen = [all_cases(entry)[i] for i in numbers]

    def function(*xs: Tensor) -> list[tuple[Tensor, ...]]:
        tensors = iter(xs)
        return [case.function(*[next(tensors) for _ in case.tensors]) for case in chosen]

    program = capture(function, [x for case in chosen for x in case.tensors], {})
    found: dict[str, list[int]] = {}
    for op, place in sorted(set(_needed(program))):
        found.setdefault(op, []).append(numbers[place])
    return found


def _needed(program: Program) -> Iterator[tuple[str, int]]:
    for result, slot in program.results():
        if slot.kind != "output":
            continue
        seen, pending = {result}, [result]
        while pending:
            node = pending.pop()
            if node.op == "call_function":
                yield str(node.target), int(slot.name.split(".")[1])
            pending += [x for x in node.all_input_nodes if x not in seen]
            seen |= set(node.all_input_nodes)


def _update(known: dict[str, Any], names: list[str]) -> dict[str, list[list[Any]]]:
    """Scans entries into `known`; returns by row the candidates for its sample."""
    candidates: dict[str, list[list[Any]]] = {}
    for done, name in enumerate(names):
        for row in known.values():
            row["entries"] = [entry for entry in row["entries"] if entry != name]
        for op, numbers in scan(name).items():
            known.setdefault(op, {"entries": []})["entries"].append(name)
            candidates.setdefault(op, []).extend([name, i] for i in numbers)
        if done % 50 == 49:
            print(f"{done + 1} of {len(names)} entries", flush=True)
    for op, found in candidates.items():
        kept = known[op].get("sample")
        found.sort(key=lambda c: (c != kept, c[0] not in op, len(c[0]), c[1]))
    return candidates


def main(names: list[str]) -> None:
    """Scans entries, chooses samples, writes reach.json, prints the rows that lack one."""
    warnings.simplefilter("ignore")
    table, listed = rows(), samples()
    known = committed() if names else {op: {**r, "entries": []} for op, r in committed().items()}
    candidates = _update(known, names or list(all_entries()))
    for op, row in table.items():
        sample = known.get(op, {}).get("sample")
        if op in candidates and (not names or not sample or sample[0] in names):
            known[op]["sample"], failure = choose(row, candidates[op])
            if failure:
                print(f"{op} ({row.where}): {failure[:400]}", flush=True)
        elif not names and op not in listed:
            print(f"{op} ({row.where}): no entry reaches it, and no sample is listed", flush=True)
    known = {op: known[op] for op in table if known.get(op, {}).get("entries")}
    lines = [f" {json.dumps(op)}: {json.dumps(row)}" for op, row in known.items()]
    PAGE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
