"""Rows of rules/pooling.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import check, jvp_by_rule
from torch import Tensor
from torch.nn import functional as F

import fwdcompile

aten = torch.ops.aten


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _u(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


X1, X2, X3 = _t(2, 3, 8), _t(2, 3, 6, 7), _t(1, 2, 4, 6, 5)
TIED = torch.tensor([[[[1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [0.0, 2.0, 2.0]]]], dtype=torch.float64)

LINEAR: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.avg_pool1d.default, (X1, [3], [2], [1], True, False)),
    (aten.avg_pool2d.default, (X2, [3, 2], [2, 1], [1, 0], True, False, 5)),
    (aten.avg_pool2d.default, (X2[0], [2, 2])),
    (aten.avg_pool3d.default, (X3, [2, 2, 2], [], [1, 0, 1])),
    (aten.adaptive_avg_pool1d.default, (X1, [3])),
    (aten.adaptive_avg_pool2d.default, (X2, [3, 4])),
    (aten.adaptive_avg_pool2d.default, (X2, [1, 1])),
    (aten.adaptive_avg_pool3d.default, (X3, [2, 3, 1])),
    (aten._adaptive_avg_pool2d.default, (X2, [3, 4])),
    (aten._adaptive_avg_pool3d.default, (X3, [2, 3, 1])),
    (aten.max_unpool2d.default, (_t(1, 1, 2, 2), torch.tensor([[[[0, 3], [9, 15]]]]), [4, 4])),
    (
        aten.max_unpool3d.default,
        (_t(1, 1, 1, 2, 2), torch.tensor([[[[[0, 3], [9, 15]]]]]), [1, 4, 4], [1, 2, 2], [0, 0, 0]),
    ),
    (aten.affine_grid_generator.default, (_t(2, 2, 3), [2, 3, 4, 5], False)),
    (aten.affine_grid_generator.default, (_t(2, 3, 4), [2, 3, 2, 4, 5], True)),
    (aten.upsample_nearest1d.default, (X1, [11])),
    (aten.upsample_nearest1d.vec, (X1, None, [1.5])),
    (aten.upsample_nearest2d.default, (X2, [9, 3])),
    (aten.upsample_nearest2d.vec, (X2, None, [2.0, 2.0])),
    (aten.upsample_nearest3d.default, (X3, [3, 4, 6])),
    (aten.upsample_nearest3d.vec, (X3, [3, 4, 6], None)),
    (aten._upsample_nearest_exact1d.default, (X1, [11])),
    (aten._upsample_nearest_exact1d.vec, (X1, [11], None)),
    (aten._upsample_nearest_exact2d.default, (X2, [9, 3])),
    (aten._upsample_nearest_exact2d.vec, (X2, None, [2.0, 0.5])),
    (aten._upsample_nearest_exact3d.default, (X3, [3, 4, 6])),
    (aten._upsample_nearest_exact3d.vec, (X3, [3, 4, 6], None)),
    (aten.upsample_linear1d.default, (X1, [5], True)),
    (aten.upsample_linear1d.vec, (X1, None, False, [2.0])),
    (aten.upsample_bilinear2d.default, (X2, [4, 9], False)),
    (aten.upsample_bilinear2d.vec, (X2, None, True, [2.0, 0.6])),
    (aten.upsample_trilinear3d.default, (X3, [3, 8, 6], False)),
    (aten.upsample_trilinear3d.vec, (X3, [3, 8, 6], True, None)),
    (aten.upsample_bicubic2d.default, (X2, [4, 9], True)),
    (aten.upsample_bicubic2d.vec, (X2, None, False, [2.0, 2.0])),
    (aten._upsample_bilinear2d_aa.default, (X2, [4, 3], False)),
    (aten._upsample_bilinear2d_aa.vec, (X2, [4, 3], False, None)),
    (aten._upsample_bicubic2d_aa.default, (X2, [4, 3], True)),
    (aten._upsample_bicubic2d_aa.vec, (X2, [4, 3], True, None)),
]
if hasattr(aten, "_upsample_lanczos2d_aa"):
    LINEAR += [
        (aten._upsample_lanczos2d_aa.default, (X2, [4, 3], False)),
        (aten._upsample_lanczos2d_aa.vec, (X2, [4, 3], False, None)),
    ]

MAXIMA: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.max_pool1d_with_indices.default, (X1, [3], [2], [1], [2], True)),
    (aten.max_pool2d_with_indices.default, (X2, [3, 2], [2, 1], [1, 1], [1, 2], True)),
    (aten.max_pool2d_with_indices.default, (X2[0], [2, 2])),
    (aten.max_pool2d_with_indices.default, (TIED, [2, 2], [1, 1])),
    (aten.max_pool2d_with_indices.default, (TIED, [2])),
    (aten.max_pool2d_with_indices.default, (X2, [3, 2], [3, 2])),
    (aten.max_pool2d_with_indices.default, (X2, [3, 2], [3, 2], [0, 0], [1, 1], True)),
    (aten.max_pool1d_with_indices.default, (X1, [2])),
    (aten.max_pool1d_with_indices.default, (X1, [3], [1])),
    (aten.max_pool2d_with_indices.default, (X2, [4, 5])),
    (aten.max_pool3d_with_indices.default, (X3, [2, 1, 2])),
    (aten.max_pool3d_with_indices.default, (X3, [2], [1])),
    (aten.max_pool2d_with_indices.default, (X2.to(memory_format=torch.channels_last), [2, 2])),
    (aten.max_pool3d_with_indices.default, (X3, [2, 2, 2], [], [1, 0, 1])),
    (aten.adaptive_max_pool1d.default, (X1, [3])),
    (aten.adaptive_max_pool2d.default, (X2, [4, 3])),
    (aten.adaptive_max_pool3d.default, (X3, [2, 3, 1])),
    (aten.fractional_max_pool2d.default, (X2, [2, 2], [3, 4], _u(2, 3, 2))),
    (aten.fractional_max_pool3d.default, (X3, [2, 2, 2], [2, 3, 2], _u(1, 2, 3))),
]


@pytest.mark.parametrize(("op", "args"), LINEAR)
def test_linear(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args)


@pytest.mark.parametrize(("op", "args"), MAXIMA)
def test_maxima(op: Any, args: tuple[Any, ...]) -> None:
    check(op, *args, wrt=(0,), second=args[0] is not TIED)


@pytest.mark.parametrize(
    ("op", "sizes", "strides"),
    [
        (aten.max_pool1d_with_indices.default, [3], [2]),
        (aten.max_pool2d_with_indices.default, [2, 2], []),
        (aten.max_pool2d_with_indices.default, [3, 2], [1, 2]),
        (aten.max_pool2d_with_indices.default, [3, 6], []),
        (aten.max_pool3d_with_indices.default, [2, 3, 2], [1, 2, 3]),
    ],
)
def test_tangents_are_those_of_the_elements_that_torch_takes(
    op: Any, sizes: list[int], strides: list[int]
) -> None:
    """Also of equals, of infinities and of numbers that are none."""
    values = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1.0, torch.inf, torch.nan])
    at = torch.randint(7, (200, *[6] * len(sizes)), generator=torch.Generator().manual_seed(0))
    x, d = values[at], torch.arange(at.numel(), dtype=torch.float32).view(at.shape)
    (_, indices), (out_dot, _) = jvp_by_rule(op, (x, sizes, strides), {}, {0: d})
    taken = d.flatten(1).gather(1, indices.flatten(1)).view(indices.shape)
    assert out_dot is not None
    torch.testing.assert_close(out_dot, taken, rtol=0, atol=0)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", [0, 1, 2])
@pytest.mark.parametrize(("dims", "mode"), [(2, 0), (2, 1), (2, 2), (3, 0), (3, 1)])
def test_grid_sampler(dims: int, mode: int, padding_mode: int, align_corners: bool) -> None:
    op = (aten.grid_sampler_2d if dims == 2 else aten.grid_sampler_3d).default
    x = _t(2, 3, 5, 4) if dims == 2 else _t(1, 2, 3, 4, 5)
    grid = 1.3 * _t(x.shape[0], *(2, 3, 2)[:dims], dims, seed=3)
    check(op, x, grid, mode, padding_mode, align_corners, oracle="difference")


@pytest.mark.parametrize("align_corners", [False, True])
def test_grid_sampler_of_one_pixel(align_corners: bool) -> None:
    grid = 0.4 * _t(2, 3, 2, 2)
    check(
        aten.grid_sampler_2d.default, _t(2, 3, 4, 1), grid, 0, 2, align_corners, oracle="difference"
    )


def test_grid_sampler_agrees_with_autograd_at_the_border() -> None:
    x, grid = _t(1, 2, 4, 4), torch.tensor([[[[1.0, -1.0], [0.3, 1.0]]]], dtype=torch.float64)
    for padding_mode in (0, 1, 2):
        settings = (0, padding_mode, True)
        grid_dot = torch.ones_like(grid)
        _, (out_dot,) = jvp_by_rule(
            aten.grid_sampler_2d.default, (x, grid, *settings), {}, {1: grid_dot}
        )
        leaf = grid.clone().requires_grad_()
        out = torch.grid_sampler(x, leaf, *settings)
        rows = [torch.autograd.grad(y, leaf, retain_graph=True)[0].sum() for y in out.flatten()]
        assert out_dot is not None
        torch.testing.assert_close(out_dot.flatten(), torch.stack(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(dtype: torch.dtype) -> None:
    x = X2.to(dtype)
    _, (out_dot, indices_dot) = jvp_by_rule(
        aten.max_pool2d_with_indices.default, (x, [2, 2]), {}, {0: x}
    )
    assert out_dot is not None and indices_dot is None
    assert out_dot.dtype == dtype
    torch.testing.assert_close(out_dot, torch.nn.functional.max_pool2d(x, 2), rtol=0, atol=0)


@pytest.mark.parametrize("size", [7, 13, 32, 56])
@pytest.mark.parametrize("align_corners", [False, True])
def test_grid_sampler_at_pixel_centres_takes_the_cell_of_torch(
    size: int, align_corners: bool
) -> None:
    image = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(2))

    def warped(theta: Tensor) -> Tensor:  # by the identity, as transformers of images begin
        grid = F.affine_grid(theta, [1, 1, size, size], align_corners=align_corners)
        return F.grid_sample(image, grid, align_corners=align_corners).square().mean()

    theta = torch.eye(2, 3).unsqueeze(0).requires_grad_()
    direction = torch.linspace(-1, 1, 6).view(1, 2, 3)
    _, slope = fwdcompile.jvp(warped, (theta.detach(),), (direction,))
    (gradient,) = torch.autograd.grad(warped(theta), theta)
    torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-4, atol=1e-4)
