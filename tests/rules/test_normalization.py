"""Rows of rules/normalization.py.

Second derivatives are compared with differences of the first: torch's own nested forward mode
takes saved statistics for constants.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from check import check, jvp_by_rule
from torch import Tensor, nn

import fwdcompile

aten = torch.ops.aten
EPS = 0.1


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X2, X3, X4 = _t(3, 4), _t(2, 4, 5), _t(2, 4, 3, 2)
W, B, VAR = _t(4, seed=2), _t(4, seed=3), _t(4, seed=4).exp()
LAST = X4.to(memory_format=torch.channels_last)

CASES: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.native_layer_norm.default, (X2, [4], W, B, EPS)),
    (aten.native_layer_norm.default, (X2, [4], W, None, EPS)),
    (aten.native_layer_norm.default, (X3, [4, 5], None, _t(4, 5), EPS)),
    (aten.native_layer_norm.default, (X3, [5], None, None, EPS)),
    (aten.native_layer_norm.default, (X2[:0], [4], W, B, EPS)),
    (aten.native_layer_norm.default, (X2[0], [4], W, B, EPS)),
    (aten._fused_rms_norm.default, (X2, [4], W, EPS)),
    (aten._fused_rms_norm.default, (X3, [4, 5], None, EPS)),
    (aten._fused_rms_norm.default, (X3, [5], _t(5), None)),
    (aten.native_group_norm.default, (X4, W, B, 2, 4, 6, 2, EPS)),
    (aten.native_group_norm.default, (LAST, W, B, 2, 4, 6, 2, EPS)),
    (aten.native_group_norm.default, (X3, None, None, 2, 4, 5, 1, EPS)),
    (aten.native_group_norm.default, (X3, None, B, 2, 4, 5, 4, EPS)),
    (aten.native_group_norm.default, (X3[:0], W, B, 0, 4, 5, 2, EPS)),
    (aten._native_batch_norm_legit.no_stats, (X3, W, B, True, 0.1, EPS)),
    (aten._native_batch_norm_legit.no_stats, (X4, None, None, True, 0.1, EPS)),
    (aten._native_batch_norm_legit_functional.default, (X2, W, B, B, VAR, True, 0.1, EPS)),
    (aten._native_batch_norm_legit_functional.default, (LAST, W, None, B, VAR, True, 0.3, EPS)),
    (aten._native_batch_norm_legit_functional.default, (X3, None, B, B, VAR, True, 1.0, EPS)),
    (aten._native_batch_norm_legit_functional.default, (X3, W, B, B, VAR, False, 0.1, EPS)),
    (aten._native_batch_norm_legit_no_training.default, (X4, W, B, B, VAR, 0.1, EPS)),
    (aten._native_batch_norm_legit_no_training.default, (X2, None, None, B, VAR, 0.1, EPS)),
    (aten._weight_norm_interface.default, (X3, _t(2, 1, 1), 0)),
    (aten._weight_norm_interface.default, (X3, _t(1, 1, 5), 2)),
]


@pytest.mark.parametrize(("op", "args"), CASES)
def test_row(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args, oracle="difference")


MODULES: list[tuple[nn.Module, Tensor]] = [
    (nn.LayerNorm(5), X3),
    (nn.GroupNorm(2, 4), X4),
    (nn.RMSNorm([3, 2]), X4),
    (nn.BatchNorm1d(4), X2),
    (nn.BatchNorm2d(4, affine=False), LAST),
    (nn.BatchNorm1d(4, track_running_stats=False), X3),
    (nn.BatchNorm1d(4).eval(), X3),
    (nn.InstanceNorm1d(4), X3),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), X4),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(), X4),
    (nn.LocalResponseNorm(3, alpha=0.5), X4),
    (nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), X3),
    (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 3, 2), dim=1), X3),
    (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 3, 2), dim=2), X3),
]


@pytest.mark.parametrize(("module", "x"), MODULES)
def test_module(module: nn.Module, x: Tensor) -> None:
    """Every parameter and the input move at once; u'(Jv) = (J'u)'v, J'u by autograd."""
    module = module.double()
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    name_of_x = next(iter(inspect.signature(module.forward).parameters))
    inputs = {name_of_x: x.clone().requires_grad_(), **dict(module.named_parameters())}
    dots = {name: _t(*v.shape, seed=i + 5) for i, (name, v) in enumerate(inputs.items())}
    reference = module(inputs[name_of_x])
    u = _t(*reference.shape, seed=9)
    pulled = torch.autograd.grad(reference, list(inputs.values()), u)
    after = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.load_state_dict(buffers, strict=False)
    out, out_dot = fwdcompile.transform(module)(x, tangents=dots)
    torch.testing.assert_close(out, reference, rtol=0, atol=0)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, after[name], rtol=0, atol=0)
    expected = sum((g * dots[name]).sum() for name, g in zip(inputs, pulled, strict=True))
    torch.testing.assert_close((u * out_dot).sum(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(dtype: torch.dtype) -> None:
    wide = (X2, [4], W, B, EPS)
    narrow = (X2.to(dtype), [4], W.to(dtype), B.to(dtype), EPS)
    expected = jvp_by_rule(aten.native_layer_norm.default, wide, {}, {0: X2, 1: W, 2: B})[1][0]
    dots = {0: narrow[0], 1: narrow[2], 2: narrow[3]}
    got = jvp_by_rule(aten.native_layer_norm.default, narrow, {}, dots)[1][0]
    assert got is not None and expected is not None
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1, 8, 4, 4), (2, 8, 4, 4), (2, 8, 1, 4)])
@pytest.mark.parametrize("last", [False, True])
def test_group_norm_of_strides_that_a_size_of_one_hides(shape: Any, last: bool) -> None:
    def model(x: Tensor, r: Tensor, plain: bool = False) -> Tensor:
        y = x.transpose(1, 2).reshape(r.shape) + r  # torch's own forward mode takes only the first
        return torch.nn.functional.group_norm(y.contiguous() if plain else y, 2)

    r = torch.randn(shape, dtype=torch.float64)
    r = r.contiguous(memory_format=torch.channels_last) if last else r
    x = torch.randn(shape[0], shape[2] * shape[3], 8, dtype=torch.float64)
    found = fwdcompile.jvp(model, (x, r), (x.cos(), r.sin()))
    expected = torch.func.jvp(partial(model, plain=True), (x, r), (x.cos(), r.sin()))
    torch.testing.assert_close(found, expected, check_stride=False)
