"""The table as a whole: every row has a sample that reaches it, and none is dead.

A row's sample is one of torch's operator database, found by `python tests/rules/reach.py`, and
the row is checked on it at first and second order, and for tensors on another device than its
arguments; or it is one of samples.py, checked elsewhere.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import fwdcompile.rules as family
import pytest
from check import devices_of
from oracle import REVIEWED
from reach import UNCHECKED, check_row, committed, differentiable, of_sample, rows
from samples import samples
from torch import Tensor
from torch.utils import _pytree as pytree

from fwdcompile.capture import capture
from fwdcompile.rule import _makers, lowerings

# some samples call what torch has deprecated, or has in beta
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

REACHED = {op: entry["sample"] for op, entry in committed().items() if entry["sample"]}
SAMPLES = {op: sample for op, sample in samples().items() if op not in REACHED}

GATHERED = "a gather takes its place, as long as the strides stay in the tensor's memory"

# Rows that capture takes apart, and why the table has them.
LOWERED = {
    "aten.as_strided.default": GATHERED,
    "aten.as_strided_copy.default": GATHERED,
    "aten.as_strided_scatter.default": GATHERED,
    "aten.hardshrink.default": "torch lowers it in export",
    "aten.softshrink.default": "torch lowers it in export",
    "aten.reshape.default": "terms of other rows are written with it",
    "aten.upsample_bilinear2d.default": "torch lowers it in export; interpolate calls the .vec",
    "aten.upsample_bicubic2d.default": "torch lowers it in export; interpolate calls the .vec",
}

# Rows whose sample is only run, and why; their own tests check them.
ELSEWHERE = {
    "aten.rrelu_with_noise_functional.default": "random",
    "aten._standard_gamma.default": "random, and right in distribution only",
}


# Rows whose LU torch's forward mode takes for a constant; backwards of torch read it.
KEEP_LU = {
    "aten._linalg_det.default",
    "aten._linalg_slogdet.default",
    "aten._linalg_solve_ex.default",
}


def test_every_row_has_a_sample() -> None:
    missing = [f"{op} ({row.where})" for op, row in rows().items() if op not in REACHED | SAMPLES]
    assert not missing, f"run `python tests/rules/reach.py ENTRY`, or extend samples.py: {missing}"


def test_every_sample_has_a_row() -> None:
    assert not (REACHED.keys() | SAMPLES.keys()) - rows().keys()
    assert not (ELSEWHERE.keys() | LOWERED.keys()) - rows().keys()


def test_every_file_of_rules_has_rows_or_what_makes_them() -> None:
    files = {f"rules/{path.name}" for path in Path(*family.__path__).glob("*.py")}
    modules = [inspect.unwrap(f).__module__ for f in (*lowerings.values(), *_makers)]
    inside = {f"rules/{m.split('.')[-1]}.py" for m in modules if m.startswith(family.__name__)}
    rows_in = {row.where.split(":")[0] for row in rows().values()}
    assert rows_in | inside == files - {"rules/__init__.py"}


@pytest.mark.parametrize("op", sorted(REACHED))
def test_reached_row(op: str) -> None:
    if not REVIEWED and REACHED[op][0] in ("nanquantile", "narrow_copy", "quantile"):
        pytest.skip("torch 2.11 does not have the sample")
    row = rows()[op]
    arguments = of_sample(row, *REACHED[op])
    if row.word not in UNCHECKED and op not in ELSEWHERE:
        check_row(row, arguments, oracle="difference" if op in KEEP_LU else "jvp")
        assert devices_of(row.op, *arguments, differentiable(row, arguments)) == {"meta"}


@pytest.mark.parametrize("op", sorted(SAMPLES))
def test_row_of_a_sample_survives_capture(op: str) -> None:
    row, sample = rows()[op], SAMPLES[op]

    def call(*xs: Tensor) -> Any:
        tensors = iter(xs)
        args, kwargs = pytree.tree_map_only(Tensor, lambda _: next(tensors), sample)
        return row.op(*args, **kwargs)

    leaves = pytree.tree_leaves(sample)
    program = capture(call, [x.clone() for x in leaves if isinstance(x, Tensor)], {})
    assert any(n.target is row.op for n in program.graph.nodes) == (op not in LOWERED)
