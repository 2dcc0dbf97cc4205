"""Layer, group, batch, root-mean-square and weight normalisation.

The saved mean and rstd are used, and have tangents of their own, so that a second transform sees
how they depend on the input. Autograd does not see it where torch's backward leaves them out: for
programs that it may go through they are made again, as `remade` says.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..rule import joint, jvp, lowerings, remade

aten = torch.ops.aten
Dots = dict[str, Tensor]


def _last(normalized_shape: Any) -> list[int]:
    return list(range(-len(normalized_shape), 0))


def _others(x: Tensor, dim: int) -> list[int]:
    return [i for i in range(x.ndim) if i != dim % x.ndim]


def _normalise(
    x: Tensor, mean: Tensor, rstd: Tensor, dims: list[int], d: Tensor | None
) -> tuple[Tensor, Any, Any, Any]:
    """xhat = (x - mean) rstd, and the tangents of xhat, mean and rstd."""
    xhat = (x - mean) * rstd
    if d is None:
        return xhat, None, None, None
    mean_dot = d.mean(dims, keepdim=True)
    slant = (xhat * d).mean(dims, keepdim=True)
    return xhat, rstd * (d - mean_dot - xhat * slant), mean_dot, -rstd * rstd * slant


def _scale(d: Dots, xhat: Tensor, xhat_dot: Any, weight: Any, shape: Any) -> Any:
    """The tangent of xhat weight + bias; weight and bias are viewed as `shape`."""
    terms = []
    if xhat_dot is not None:
        terms.append(xhat_dot if weight is None else xhat_dot * weight.view(shape))
    if "weight" in d:
        terms.append(xhat * d["weight"].view(shape))
    if "bias" in d:
        terms.append(d["bias"].view(shape))
    total: Tensor = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _like(x: Any, stat: Tensor) -> Any:
    return None if x is None else x.reshape(stat.shape)


@joint(aten.native_layer_norm.default, wrt=("input", "weight", "bias"))
def layer_norm(d: Dots, input: Tensor, normalized_shape: Any, weight: Any, out: Any) -> Any:
    dims = _last(normalized_shape)
    xhat, xhat_dot, mean_dot, rstd_dot = _normalise(input, out[1], out[2], dims, d.get("input"))
    return _scale(d, xhat, xhat_dot, weight, normalized_shape), mean_dot, rstd_dot


def _statistics(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return mean, torch.rsqrt(var + eps)


remade[aten.native_layer_norm.default] = lambda input, normalized_shape, eps: (
    None, *_statistics(input, _last(normalized_shape), eps)
)  # fmt: skip


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """As torch's, with a copy where a size of one hides from capture that it needs one."""
    layout = suggest_memory_format(input) if input.is_cpu else torch.contiguous_format
    hidden = any(isinstance(n, int) and n == 1 for n in input.shape)
    x = (input.clone if hidden else input.contiguous)(memory_format=layout)
    weight, bias = (y if y is None else y.contiguous() for y in (weight, bias))
    batch, channels, *sizes = input.shape
    counts = (batch, channels, math.prod(sizes), num_groups)
    return aten.native_group_norm.default(x, weight, bias, *counts, eps)[0]


lowerings[aten.group_norm.default] = _group_norm


@joint(aten.native_group_norm.default, wrt=("input", "weight", "bias"))
def group_norm(
    d: Dots, input: Tensor, weight: Any, N: int, C: int, HxW: int, group: int,
    out: Any,
) -> Any:  # fmt: skip
    rows = (N, group, C // group * HxW)
    mean, rstd = out[1].unsqueeze(-1), out[2].unsqueeze(-1)
    x_dot = d["input"].reshape(rows) if "input" in d else None
    xhat, xhat_dot, mean_dot, rstd_dot = _normalise(input.reshape(rows), mean, rstd, [-1], x_dot)
    xhat, xhat_dot = xhat.view(input.shape), _like(xhat_dot, input)
    channels = (C, *[1] * (input.ndim - 2))
    out_dot = _scale(d, xhat, xhat_dot, weight, channels)
    return out_dot, _like(mean_dot, out[1]), _like(rstd_dot, out[2])


def _batch_norm(d: Dots, input: Tensor, weight: Any, out: Any) -> tuple[Any, Any, Any]:
    channels = (-1, *[1] * (input.ndim - 2))
    dims = _others(input, 1)
    mean, rstd = out[1].view(channels), out[2].view(channels)
    xhat, xhat_dot, mean_dot, rstd_dot = _normalise(input, mean, rstd, dims, d.get("input"))
    if xhat_dot is None and not {"weight", "bias"} & set(d):
        return None, None, None
    out_dot = _scale(d, xhat, xhat_dot, weight, channels)
    return out_dot, _like(mean_dot, out[1]), _like(rstd_dot, out[2])


def _frozen(d: Dots, input: Tensor, weight: Any, mean: Tensor, var: Tensor, eps: float) -> Any:
    """Normalisation by given statistics, which may have tangents of their own."""
    channels = (-1, *[1] * (input.ndim - 2))
    rstd = torch.rsqrt(var + eps)
    xhat = (input - mean.view(channels)) * rstd.view(channels)
    terms = []
    if "input" in d:
        terms.append(d["input"] * rstd.view(channels))
    if "running_mean" in d:
        terms.append(-(d["running_mean"] * rstd).view(channels))
    if "running_var" in d:
        terms.append(xhat * (-0.5 * rstd * rstd * d["running_var"]).view(channels))
    xhat_dot = sum(terms[1:], terms[0]) if terms else None
    return _scale(d, xhat, xhat_dot, weight, channels)


_STATS = ("input", "weight", "bias", "running_mean", "running_var")


@joint(aten._native_batch_norm_legit_functional.default, wrt=_STATS)
def batch_norm(
    d: Dots, input: Tensor, weight: Any, running_mean: Tensor, running_var: Tensor,
    training: bool, momentum: float, eps: float, out: Any,
) -> Any:  # fmt: skip
    """The running statistics move by momentum towards the batch's, with the unbiased variance."""
    if not training:
        frozen = _frozen(d, input, weight, running_mean, running_var, eps)
        return frozen, None, None, d.get("running_mean"), d.get("running_var")
    out_dot, mean_dot, rstd_dot = _batch_norm(d, input, weight, out)
    count = math.prod(input.shape) // input.shape[1]
    moves: dict[str, Any] = {"running_mean": None, "running_var": None}
    if mean_dot is not None:
        var_dot = rstd_dot * (out[2] ** -3) * (-2 * count / max(count - 1, 1))
        moves = {"running_mean": mean_dot * momentum, "running_var": var_dot * momentum}
    for name, move in moves.items():
        if name in d:
            kept = d[name] * (1 - momentum)
            moves[name] = kept if move is None else kept + move
    return out_dot, mean_dot, rstd_dot, moves["running_mean"], moves["running_var"]


def _with_update(
    input: Tensor, weight: Any, bias: Any, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float,
) -> Any:  # fmt: skip
    """The same op, with scratch space for a backward pass among its outputs."""
    statistics = (running_mean, running_var, True, momentum, eps)
    out = aten._native_batch_norm_legit_functional(input, weight, bias, *statistics)
    return (*out[:3], input.new_empty(0, dtype=torch.uint8), *out[3:])


lowerings[aten._batch_norm_with_update_functional.default] = _with_update


def _of_the_batch(input: Tensor, eps: float, training: bool = True) -> tuple[Any, ...]:
    dims = _others(input, 1)
    return None, *(_statistics(input, dims, eps) if training else (None, None)), None, None


remade[aten._native_batch_norm_legit_functional.default] = lambda input, training, eps: (
    _of_the_batch(input, eps, training)
)
remade[aten._native_batch_norm_legit.no_stats] = lambda input, eps: _of_the_batch(input, eps)[:3]


@joint(aten._native_batch_norm_legit_no_training.default, wrt=_STATS)
def batch_norm_eval(
    d: Dots, input: Tensor, weight: Any, running_mean: Tensor, running_var: Tensor, eps: float
) -> Any:
    return _frozen(d, input, weight, running_mean, running_var, eps), None, None


@joint(aten._native_batch_norm_legit.no_stats, wrt=("input", "weight", "bias"))
def batch_norm_without_stats(d: Dots, input: Tensor, weight: Any, out: Any) -> Any:
    return _batch_norm(d, input, weight, out)


@joint(aten._fused_rms_norm.default, wrt=("input", "weight"))
def rms_norm(d: Dots, input: Tensor, normalized_shape: Any, weight: Any, out: Any) -> Any:
    dims = _last(normalized_shape)
    xhat, rstd = input * out[1], out[1]
    if "input" not in d:
        return xhat * d["weight"], None
    slant = (xhat * d["input"]).mean(dims, keepdim=True)
    xhat_dot = rstd * (d["input"] - xhat * slant)
    return _scale(d, xhat, xhat_dot, weight, normalized_shape), -rstd * rstd * slant


def _weight_norm_direction(d: Tensor, v: Tensor, g: Tensor, dim: int, out: Any) -> Any:
    norm_dot = (v * d).sum(_others(v, dim), keepdim=True) / out[1]
    return d * (g / out[1]) - out[0] * (norm_dot / out[1]), norm_dot


jvp(
    aten._weight_norm_interface.default,
    v=_weight_norm_direction,
    g=lambda d, v, out: (v * (d / out[1]), None),
)


def _norms(v: Tensor, dim: int) -> tuple[None, Tensor]:
    return None, torch.linalg.vector_norm(v, 2, _others(v, dim), keepdim=True)


remade[aten._weight_norm_interface.default] = _norms
