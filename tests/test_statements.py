"""Where fwdcompile/statements.py puts an expression: in the line that uses it, or on its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import fwdcompile


def _code(function: Callable[..., Tensor], *inputs: Tensor) -> str:
    names = ["q", "k", "v"][: len(inputs)]
    return fwdcompile.transform(function).lower(*inputs, tangents=names).code


def test_glue_of_the_size_of_its_operands_stays_in_the_line_that_uses_it() -> None:
    code = _code(lambda q: torch.tanh(q), torch.randn(4))
    assert "tanh_dot: f32[4] = q_dot * (1 - tanh * tanh)" in code


def test_blocks_of_attention_are_freed_one_after_the_other() -> None:
    qkv = [torch.randn(1, 2, 768, 8) for _ in range(3)]
    code = _code(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *qkv)
    first, *_, last = (code.index(f"del safe_softmax{n}") for n in ("", "_1", "_2"))
    assert first < code.index("safe_softmax_1:") < code.index("safe_softmax_2:") < last
