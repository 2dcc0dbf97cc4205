from __future__ import annotations

import torch
from nets import Mlp

import fwdcompile


def test_a_program_is_named_in_one_line() -> None:
    fwd = fwdcompile.transform(Mlp())
    assert "Forward object" in repr(fwd)  # before there is a program, too
    lowered = fwd.lower(torch.zeros(2, 6), tangents=["x"])
    assert "Forward object" in repr(fwd)
    assert repr(lowered).startswith("<Lowered Mlp(parameter fc1.weight, ")
    assert repr(lowered).endswith(f", {len(lowered.program.graph.nodes)} nodes>")
