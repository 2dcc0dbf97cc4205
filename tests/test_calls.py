from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops import while_loop

import fwdcompile
from fwdcompile.calls import drop_operands, drop_results, merge_operands, settle
from fwdcompile.capture import capture
from fwdcompile.program import Program, is_random, output_nodes, programs_of
from fwdcompile.simplify import dce, simplify
from fwdcompile.subgraph import set_outputs


def two(x: Tensor, w: Tensor) -> Any:
    return torch.cond(
        x.sum() > 0, lambda x, w: (x.sin(), x @ w), lambda x, w: (x.cos(), w @ x), (x, w)
    )


def call(program: Program) -> fx.Node:
    (node,) = (node for node in program.graph.nodes if programs_of(node))
    return node


def counts(node: fx.Node) -> tuple[int, int]:
    """How many operands and results all programs of a cond agree on."""
    (found,) = {(len(p.inputs), len(p.outputs)) for p in programs_of(node)}
    assert found == (len(node.args[3]), len(node.meta["val"]))
    return found


def test_unused_results_and_what_they_need_go() -> None:
    program = capture(lambda x, w: two(x, w)[0], (torch.ones(2, 2), torch.ones(2, 2)), {})
    node = call(program)
    assert counts(node) == (2, 2)
    dce(program.graph)
    assert counts(node) == (1, 1)
    assert [user.args[1] for user in node.users] == [0]


def test_the_parts_of_dce() -> None:
    program = capture(lambda x, w: two(x, w)[1], (torch.ones(2, 2), torch.ones(2, 2)), {})
    node = call(program)
    drop_operands(node)
    assert counts(node) == (2, 2)  # all are read
    drop_results(node)
    assert counts(node) == (2, 1)
    assert [user.args[1] for user in node.users] == [0]


def test_an_operand_given_twice_is_given_once() -> None:
    program = capture(two, (torch.ones(2, 2), torch.ones(2, 2)), {})
    node = call(program)
    x, _ = (placeholder for placeholder, _ in program.placeholders())
    node.update_arg(3, (x, x))
    merge_operands(node)
    assert counts(node) == (1, 2)
    true, _ = programs_of(node)
    assert {arg for n in true.graph.nodes for arg in n.all_input_nodes if arg.op == "placeholder"}


def test_values_carried_stay_apart_and_start_apart() -> None:
    def model(x: Tensor) -> Any:
        return while_loop(
            lambda a, b: a.sum() < 9, lambda a, b: (a + 1, b * 2 + a), (x.sin(), x.cos())
        )

    program = capture(model, (torch.ones(2),), {})
    node = call(program)
    first, _ = node.args[2]
    node.update_arg(2, (first, first))
    merge_operands(node)
    assert node.args[2] == (first, first)
    settle(program.graph)
    assert node.args[2][1].target is torch.ops.aten.clone.default
    settled = str(program.graph)
    settle(program.graph)
    assert str(program.graph) == settled


def test_results_have_memory_and_layout_of_their_own() -> None:
    def model(x: Tensor) -> Any:
        return torch.cond(
            x.sum() > 0, lambda x: (x.clone(), x + x), lambda x: (x * 2, x.clone() * 1), (x,)
        )

    fwd = fwdcompile.transform(model)
    fwd.lower(torch.ones(2, 3), tangents=["x"])
    for program in programs_of(call(fwd.program)):
        outputs = output_nodes(program.graph)
        assert len(set(outputs)) == len(outputs) == 4
        assert not any(out.op == "placeholder" for out in outputs)
        assert all(out.meta["val"].is_contiguous() for out in outputs)


def test_expanded_tangents_are_written_out() -> None:
    def model(x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x.sum(0) + x, lambda x: x * 2, (x,))

    fwd = fwdcompile.transform(model, passes=())
    x = torch.ones(2, 3)
    _, y_dot = fwd(x, tangents={"x": x})
    torch.testing.assert_close(y_dot, torch.full((2, 3), 3.0))
    for program in programs_of(call(fwd.program)):
        assert all(n.meta["val"].is_contiguous() for n in output_nodes(program.graph))


def test_a_branch_that_draws_is_kept() -> None:
    def model(x: Tensor) -> Any:
        drawn = torch.cond(x.sum() > 0, lambda x: torch.rand_like(x), lambda x: x.sin(), (x,))
        return x.cos(), drawn

    program = capture(model, (torch.ones(2),), {})
    set_outputs(program.graph, output_nodes(program.graph)[:1])
    simplify(program.graph)
    true, _ = programs_of(call(program))
    assert any(is_random(node) for node in true.graph.nodes)


def test_a_copy_has_programs_of_its_own() -> None:
    program = capture(two, (torch.ones(2, 2), torch.ones(2, 2)), {})
    copy = program.copy()
    dce(copy.graph)
    for mine, theirs in zip(programs_of(call(copy)), programs_of(call(program)), strict=True):
        assert mine.graph is not theirs.graph


def puts(x: Tensor, v: Tensor, i: Tensor) -> tuple[Tensor, ...]:
    """Puts what moves into zeros that do not, and into several rows that are one."""
    rows = (2 * x).expand(5, 6, 3)
    return (
        torch.index_add(torch.ones_like(x), 0, i, x[:4]),
        rows.index_add(1, i, v),
        rows.index_put((i,), v[0, :1]),
        rows.slice_scatter(v, 1, 0, 4),
        rows.select_scatter(v[:, 0], 1, 2),
        rows.index_fill(1, i, 3.0),
        rows.clone().index_add_(1, i, v),
    )


def test_no_op_puts_into_rows_that_are_one() -> None:
    """Inductor would put in place, where a write to one row is a write to all."""
    x, v, i = torch.randn(6, 3), torch.randn(5, 4, 3), torch.tensor([0, 1, 1, 3])
    dots = {"x": torch.randn(7, 6, 3)}
    program = fwdcompile.transform(puts, batched=True)
    expected = program(x, v, i, tangents=dots)
    torch.testing.assert_close(expected[0], puts(x, v, i))
    assert "index_add(clone" in program.code
    found = fwdcompile.transform(puts, batched=True, compile=True)(x, v, i, tangents=dots)
    torch.testing.assert_close(found, expected)
