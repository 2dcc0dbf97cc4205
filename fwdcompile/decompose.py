"""Decompose: what torch recorded is taken apart until ops that have a row are met."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any
from unittest import mock

from torch._export.utils import _special_op_to_preserve_cia
from torch._ops import OperatorBase, OpOverload
from torch.export import exported_program
from torch.export.exported_program import ExportedProgram, default_decompositions

from . import rule

Table = dict[OperatorBase, Callable[..., Any]]

_TABLES = "_split_decomp_table_to_cia_and_python_decomp"
_tables_of = getattr(exported_program, _TABLES)


def decompose(exported: ExportedProgram) -> ExportedProgram:
    """The program in which ops with a row are whole, and all others taken apart as torch does.

    Torch makes its tables of decompositions anew for each program, and registers its 570 composite
    ops for that time: most of what the capture of a short function took. Here the tables are made
    once, and of composite ops hold those only that torch would not take apart by itself.
    """
    with mock.patch.object(exported_program, _TABLES, _tables):
        decomposed: ExportedProgram = exported.run_decompositions({})
    return decomposed


def _tables(_: Table) -> tuple[Table, Table]:
    """What becomes of composite ops, and of others."""
    composite, others = _made(frozenset(rule.table), frozenset(rule.lowerings.items()))
    return dict(composite), dict(others)


@lru_cache(maxsize=1)
def _made(
    rows: frozenset[OpOverload], lowerings: frozenset[tuple[OpOverload, Callable[..., Any]]]
) -> tuple[Table, Table]:
    table = default_decompositions()
    for op in rows:
        table.pop(op, None)  # type: ignore[no-untyped-call]
    own = dict(lowerings)
    composite, others = _tables_of(table.materialize() | own)
    kept = {
        op: instead
        for op, instead in composite.items()
        if op in own or instead is _special_op_to_preserve_cia
    }
    return kept, others
