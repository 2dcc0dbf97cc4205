"""Scaled dot-product attention: the primal runs torch's own kernel, the tangent one softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import RuleError
from ..rule import joint, lowerings
from .linalg import Call

aten = torch.ops.aten


def _scores(query: Tensor, key: Tensor, mask: Any, is_causal: bool, scale: float) -> Tensor:
    scores = (query * scale) @ key.mT
    if is_causal:
        keep = torch.ones_like(scores, dtype=torch.bool).tril()
        return torch.where(keep, scores, -math.inf)
    if mask is None:
        return scores
    return torch.where(mask, scores, -math.inf) if mask.dtype == torch.bool else scores + mask


def _heads(x: Tensor, like: Tensor) -> Tensor:
    """Grouped-query attention: each key and value head serves several query heads."""
    return x.repeat_interleave(like.shape[-3] // x.shape[-3], -3)


@joint(aten.scaled_dot_product_attention.default, wrt=("query", "key", "value", "attn_mask"))
def attention(
    d: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor, attn_mask: Any,
    dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool, out: Tensor,
    call: Call,
) -> Any:  # fmt: skip
    """With P = softmax(S) and out = P v: out_dot = (P S_dot) v - sum(P S_dot) out + P v_dot."""
    if dropout_p:
        raise RuleError("dropout_p > 0 hides a mask; capture the model, which takes this op apart")
    if d.keys() == {"value"}:
        return call(value=d["value"])
    if enable_gqa:
        key, value = _heads(key, query), _heads(value, query)
        d = {name: _heads(x, query) if name in ("key", "value") else x for name, x in d.items()}
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    weights = aten._safe_softmax(_scores(query, key, attn_mask, is_causal, scale), -1)
    slopes = []
    if "query" in d:
        slopes.append((d["query"] * scale) @ key.mT)
    if "key" in d:
        slopes.append((query * scale) @ d["key"].mT)
    if "attn_mask" in d:
        slopes.append(d["attn_mask"])
    weighted = weights * sum(slopes[1:], slopes[0])
    by_scores = weighted @ value - weighted.sum(-1, keepdim=True) * out
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
