from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from nets import Decoder
from test_capture import ops
from torch import Tensor, nn
from torch.export.exported_program import default_decompositions
from torch.nn import functional as F

import fwdcompile
from fwdcompile import rule
from fwdcompile.capture import capture
from fwdcompile.decompose import decompose

X = torch.linspace(0.1, 0.9, 12).reshape(3, 4)
TOKENS = torch.arange(10).reshape(2, 5)


def _by_torchs_tables(exported: Any) -> Any:
    table = default_decompositions()
    for op in rule.table:
        table.pop(op, None)
    return exported.run_decompositions(table.materialize() | rule.lowerings)


def _text(program: Any) -> list[str]:
    return [
        f"{node.name} = {node.target}{node.args}{node.kwargs} {node.meta.get('val')}"
        for node in program.graph.nodes
    ]


CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "composites that are taken apart": (
        lambda x: torch.einsum("ij,kj->ik", x, x) + torch.tensordot(x, x.T, 1) + F.pdist(x).sum(),
        (X,),
    ),
    "composites that have a row": (lambda x: F.layer_norm(F.linear(x, x), (3,)).var(), (X,)),
    "lowered by the rules": (lambda x: torch.cov(x) @ torch.corrcoef(x), (X,)),
    "lowered by torch's table": (lambda x: F.logsigmoid(x) + torch.logaddexp(x, x), (X,)),
    "random": (lambda x: F.dropout(x) + torch.randn(4), (X,)),
    "in place": (lambda x: x.clone().mul_(2).index_fill_(0, torch.tensor([1]), 0.0), (X,)),
    "images": (
        lambda x: F.interpolate(F.pad(x[None, None], (1, 1, 1, 1), "reflect"), scale_factor=2),
        (X,),
    ),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), (X[None],)),
    "a branch": (lambda x: torch.cond(x.sum() > 1, torch.sin, torch.cos, (x,)), (X,)),
    "recurrence": (nn.LSTM(4, 5), (X,)),
    "buffers": (nn.BatchNorm1d(4), (X,)),
    "a decoder": (Decoder(), (TOKENS, TOKENS % 7)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_programs_are_those_of_torchs_tables(name: str, inference: bool) -> None:
    model, args = CALLS[name]
    with torch.inference_mode() if inference else nullcontext():
        ours = capture(model, args, {})
        with mock.patch("fwdcompile.capture.decompose", _by_torchs_tables):
            theirs = capture(model, args, {})
    assert _text(ours) == _text(theirs)


@pytest.fixture
def twice() -> Iterator[Callable[[Tensor], Tensor]]:
    """A composite op of the user's, and the table as it was."""
    library = torch.library._scoped_library("fwdtest_decompose", "FRAGMENT")
    with mock.patch.dict(rule.table), library as fragment:
        fragment.define("twice(Tensor x) -> Tensor")
        fragment.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")
        yield torch.ops.fwdtest_decompose.twice.default


def test_rows_that_come_and_go_between_captures_count(twice: Any) -> None:
    assert ops(twice, X) == ["aten.mul.Tensor"]
    rule.jvp(twice, x=lambda d: 3 * d)
    assert ops(twice, X) == [str(twice)]
    assert torch.equal(fwdcompile.jvp(twice, (X,), (X,))[1], 3 * X)
    del rule.table[twice]
    assert ops(twice, X) == ["aten.mul.Tensor"]


def test_ops_of_torch_are_as_before() -> None:
    linear = torch.ops.aten.linear.default
    kernels = dict(linear.py_kernels)
    capture(F.linear, (X, X), {})
    assert linear.py_kernels == kernels
    exported = torch.export.export(nn.Linear(4, 2), (X,))
    assert linear not in {n.target for n in exported.run_decompositions().graph.nodes}
    assert linear in {n.target for n in decompose(exported).graph.nodes}
