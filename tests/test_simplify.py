from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

import fwdcompile
from fwdcompile.capture import capture
from fwdcompile.simplify import cse, dce, simplify


def count(graph: fx.Graph) -> int:
    return sum(node.op == "call_function" for node in graph.nodes)


def test_cse_merges_equal_expressions() -> None:
    graph = capture(lambda x: x.tanh() + x.tanh(), (torch.ones(2),), {}).graph
    cse(graph)
    assert count(graph) == 2


def test_cse_tells_numbers_of_different_type_apart() -> None:
    graph = capture(lambda x: (x * 1, x * 1.0, x * True), (torch.ones(2, dtype=torch.int64),), {})
    before = count(graph.graph)
    cse(graph.graph)
    assert count(graph.graph) == before


def test_random_ops_are_neither_merged_nor_removed() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.rand_like(x) * torch.rand_like(x)

    graph = capture(model, (torch.ones(2),), {}).graph
    before = count(graph)
    simplify(graph)
    assert count(graph) == before == 3


def test_dce_removes_what_nobody_needs() -> None:
    def model(x: Tensor) -> Tensor:
        x.exp()
        return x.tanh()

    graph = capture(model, (torch.ones(2),), {}).graph
    dce(graph)
    assert count(graph) == 1


def test_passes_keep_the_primal_bit_identical() -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU()), torch.randn(2, 3)
    v = {"input": torch.randn(2, 3)}
    plain = fwdcompile.transform(model, passes=())(x, tangents=v)
    simple = fwdcompile.transform(model)(x, tangents=v)
    assert torch.equal(plain[0], simple[0])
    assert torch.equal(simple[0], model(x))
    torch.testing.assert_close(plain[1], simple[1])


def test_unknown_pass() -> None:
    with pytest.raises(ValueError, match="no pass is called 'magic'"):
        fwdcompile.transform(torch.sin, passes=("magic",))
