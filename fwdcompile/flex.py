"""Flex: torch's `flex_attention` as plain ops, so that its tangents are those of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import log
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch._higher_order_ops.flex_attention import FlexAttentionHOP

from .rules.attention import BLOCK, heads


@contextmanager
def flex_as_ops() -> Iterator[None]:
    """Lets capture see what `flex_attention` computes in place of a higher-order op."""
    with mock.patch.object(FlexAttentionHOP, "__call__", _attend):
        yield


def _attend(
    _: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: Sequence[Any],
    scale: float,
    kernel_options: Any,
    score_buffers: Sequence[Any] = (),
    mask_buffers: Sequence[Any] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, logarithm of the sum and maximum of scores, the last two in powers of two.

    Scores are `score_mod(q k' scale, b, h, i, j)` where the mask function of the last entry of
    `block_mask` allows them; as in torch's kernels they have 32 bits at least. Its lists of blocks
    are not read, as where torch runs without its kernels.
    """
    (batch, count, queries, _), keys = query.shape, key.shape[-2]
    if key.shape[1] < count:
        key, value = heads(key, query), heads(value, query)
    wide = torch.promote_types(query.dtype, torch.float32)
    key, value = key.to(wide), value.to(query.dtype)
    score = _everywhere(score_mod, 1, len(score_buffers))
    allowed = _everywhere(block_mask[-1], 0, len(mask_buffers))
    block = queries if queries <= 2 * BLOCK else BLOCK
    parts = []
    for first in range(0, queries, block):
        last = min(first + block, queries)
        rows = query if block == queries else query[:, :, first:last]
        sizes = ((0, batch), (0, count), (first, last), (0, keys))
        places = [torch.arange(*ends, device=query.device) for ends in sizes]
        scores = (rows.to(wide) @ key.mT) * scale
        with TransformGetItemToIndex():
            changed = score(scores, *places, *score_buffers)
            scores = torch.where(allowed(*places, *mask_buffers), changed, -torch.inf)
        weights = torch._safe_softmax(scores, -1).to(query.dtype)
        parts.append((weights @ value, scores.logsumexp(-1) / log(2), scores.amax(-1) / log(2)))
    out, total, top = (torch.cat(x, 2) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
    return out, total, top


def _everywhere(
    function: Callable[..., Tensor], scores: int, buffers: int
) -> Callable[..., Tensor]:
    """A function of one score, or of one place, for those of all batches, heads, queries, keys."""
    for place in reversed(range(4)):
        dims = [0 if i == place else None for i in range(4)]
        function = torch.vmap(function, (*[0] * scores, *dims, *[None] * buffers))
    return function
