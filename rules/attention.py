"""Scaled dot-product attention: torch's own kernel for the primal, blocks for the tangent."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import RuleError
from ..rule import joint, lowerings
from .linalg import Call

aten = torch.ops.aten


# Queries a block: the scores of one block are kept, and so memory grows with the keys alone.
BLOCK = 256
_SHORT = (torch.bfloat16, torch.float16)


def _scores(
    query: Tensor, key: Tensor, mask: Any, is_causal: bool, scale: float, first: int
) -> Tensor:
    """Scores of a block of queries, of which `first` is the number of the first."""
    scores = (query * scale) @ key.mT
    if is_causal:
        seen = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril(first)
        return torch.where(seen, scores, -math.inf)
    if mask is None:
        return scores
    return torch.where(mask, scores, -math.inf) if mask.dtype == torch.bool else scores + mask


def heads(x: Tensor, like: Tensor) -> Tensor:
    """Grouped-query attention: each key and value head serves several query heads."""
    return x.repeat_interleave(like.shape[-3] // x.shape[-3], -3)


def _wide(x: Any) -> Any:
    """Scores of 16 bits would lose the third digit of every weight; torch's kernels keep 32."""
    return x.float() if isinstance(x, Tensor) and x.dtype in _SHORT else x


def _rows(x: Any, first: int, last: int) -> Any:
    """The queries of a block, or its rows of a mask, which may be one row for all."""
    whole = not isinstance(x, Tensor) or x.shape[-2] == 1 or (first, last) == (0, x.shape[-2])
    return x if whole else x[..., first:last, :]


@joint(aten.scaled_dot_product_attention.default, wrt=("query", "key", "value", "attn_mask"))
def attention(
    d: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor, attn_mask: Any,
    dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool, call: Call,
) -> Any:  # fmt: skip
    """The tangent by blocks of queries, so that no product of queries and keys is whole."""
    if dropout_p:
        raise RuleError("dropout_p > 0 hides a mask; capture the model, which takes this op apart")
    if d.keys() == {"value"}:
        return call(value=d["value"])
    if enable_gqa:
        key, value = heads(key, query), heads(value, query)
        d = {name: heads(x, query) if name in ("key", "value") else x for name, x in d.items()}
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    query, key, value, attn_mask = map(_wide, (query, key, value, attn_mask))
    d = {name: _wide(x) for name, x in d.items()}
    length, many = query.shape[-2], query.shape[-2] > 2 * BLOCK
    blocks = []
    for first in range(0, length, BLOCK) if many else (0,):
        last = min(first + BLOCK, length) if many else length
        q, mask = (_rows(x, first, last) for x in (query, attn_mask))
        dots = {
            n: _rows(x, first, last) if n in ("query", "attn_mask") else x for n, x in d.items()
        }
        k, v = key, value
        if is_causal and last < key.shape[-2]:  # no query of the block sees a later key
            k, v = key[..., :last, :], value[..., :last, :]
            dots |= {n: dots[n][..., :last, :] for n in ("key", "value") if n in dots}
        scores = _scores(q, k, mask, is_causal, scale, first)
        blocks.append(_block(dots, q, k, v, scores, scale))
    return torch.cat(blocks, -2) if many else blocks[0]


def _block(
    d: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor, scores: Tensor, scale: float
) -> Tensor:
    """With P = softmax(S) and out = P v: out_dot = P (S_dot - sum(P S_dot)) v + P v_dot."""
    weights = aten._safe_softmax(scores, -1)
    slopes = []
    if "query" in d:
        slopes.append((d["query"] * scale) @ key.mT)
    if "key" in d:
        slopes.append((query * scale) @ d["key"].mT)
    if "attn_mask" in d:
        slopes.append(d["attn_mask"])
    slope = sum(slopes[1:], slopes[0])
    centred = slope - (weights * slope).sum(-1, keepdim=True)
    by_scores: Tensor = (weights * centred) @ value
    return by_scores + weights @ d["value"] if "value" in d else by_scores


def _with_dropout(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Takes attention apart as torch does on the CPU, so that the tangent sees the mask."""
    if dropout_p == 0:
        return NotImplemented
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_zeros(()).where(attn_mask, -math.inf)
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


lowerings[aten.scaled_dot_product_attention.default] = _with_dropout
