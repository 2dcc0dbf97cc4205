"""Pooling, resampling and sampling: averages are linear, maxima pick the winner's tangent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..rule import jvp, linear

aten = torch.ops.aten

for _op in (
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
    aten.max_unpool2d.default,
    aten.max_unpool3d.default,
):
    linear(_op, wrt="self")

for _family in (
    aten.upsample_nearest1d,
    aten.upsample_nearest2d,
    aten.upsample_nearest3d,
    aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d,
    aten._upsample_nearest_exact3d,
    aten.upsample_linear1d,
    aten.upsample_bilinear2d,
    aten.upsample_trilinear3d,
    aten.upsample_bicubic2d,
    aten._upsample_bilinear2d_aa,
    aten._upsample_bicubic2d_aa,
    *([aten._upsample_lanczos2d_aa] if hasattr(aten, "_upsample_lanczos2d_aa") else []),
):
    linear(_family.default, wrt="self")
    linear(_family.vec, wrt="input")

linear(aten.affine_grid_generator.default, wrt="theta")


# windows of so few comparisons take them in place of indices
_FEW = 8


def _winners(d: Tensor, indices: Tensor, spatial: int) -> Tensor:
    """Reads d at indices that count through its last `spatial` dimensions."""
    if spatial == 1:
        return d.gather(-1, indices)
    # positions before channels, as convolutions on a CPU keep their images
    flat = d.flatten(-spatial).mT.gather(-2, indices.flatten(-spatial).mT).mT
    return flat.view(indices.shape)


def _first_maxima(x: Tensor, d: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Tangents of maxima along one axis after another: comparisons vectorise, reads do not."""
    for axis in range(-1, -len(sizes) - 1, -1):
        windows = (y.unfold(axis, sizes[axis], strides[axis]).unbind(-1) for y in (x, d))
        (x, *others), (d, *dots) = windows
        for other, dot in zip(others, dots, strict=True):
            # of equals torch takes the first, of NaNs the last; isnan itself does not vectorise
            d = torch.where((other > x) | (other != other), dot, d)
            x = torch.maximum(x, other)
    return d


def _max_pool(
    d: Tensor,
    self: Tensor,
    out: tuple[Tensor, Tensor],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    *,
    spatial: int,
) -> tuple[Tensor, None]:
    sizes, strides = ([*n] * (spatial // len(n)) for n in (kernel_size, stride or kernel_size))
    whole = set(padding) == {0} and set(dilation) == {1} and not ceil_mode
    if whole and sum(sizes) <= _FEW:
        return _first_maxima(self, d, sizes, strides), None
    return _winners(d, out[1], spatial), None


for _spatial, _op in enumerate(
    (
        aten.max_pool1d_with_indices.default,
        aten.max_pool2d_with_indices.default,
        aten.max_pool3d_with_indices.default,
    ),
    start=1,
):
    jvp(_op, self=partial(_max_pool, spatial=_spatial))

_SAMPLES = {"random_samples": lambda d: (None, None)}
for _op, _spatial, _more in (
    (aten.adaptive_max_pool1d.default, 1, {}),
    (aten.adaptive_max_pool2d.default, 2, {}),
    (aten.adaptive_max_pool3d.default, 3, {}),
    (aten.fractional_max_pool2d.default, 2, _SAMPLES),
    (aten.fractional_max_pool3d.default, 3, _SAMPLES),
):
    jvp(_op, self=lambda d, out, n=_spatial: (_winners(d, out[1], n), None), **_more)

_NEAREST, _BICUBIC = 1, 2  # interpolation_mode
_ZEROS, _REFLECTION = 0, 2  # padding_mode

# A neighbour along one axis: its index, its weight and that one's tangent; all 0 if outside.
Tap = tuple[Tensor, Tensor, Tensor]


def _grid_dot(
    d: Tensor,
    input: Tensor,
    grid: Tensor,
    interpolation_mode: int,
    padding_mode: int,
    align_corners: bool,
) -> Tensor | None:
    """Sums the pixels around each point, times the tangents of their weights."""
    if interpolation_mode == _NEAREST:
        return None
    taps = _cubic_taps if interpolation_mode == _BICUBIC else _linear_taps
    sizes = input.shape[:1:-1]  # a grid point begins with x, which is the last dimension
    axes = []
    for i, size in enumerate(sizes):
        scale = (size - 1) / 2 if align_corners else size / 2
        # in the order of torch's kernel: at pixel centres rounding chooses the cell
        x, x_dot = (grid[..., i] + 1) * scale, d[..., i] * scale
        x = x if align_corners else x - 0.5
        axes.append(taps(x, x_dot, size, partial(_padded, size, padding_mode, align_corners)))
    corners = [_corner(input.flatten(2), sizes, taps) for taps in product(*axes)]
    return sum(corners[1:], corners[0]).view(*input.shape[:2], *grid.shape[1:-1])


def _padded(
    size: int, padding_mode: int, align_corners: bool, x: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """A coordinate in pixels and its tangent, moved into the image by the padding."""
    if padding_mode == _REFLECTION:
        low, span = (0.0, size - 1) if align_corners else (-0.5, size)
        if span == 0:
            return x * 0, d * 0
        phase = (x - low).remainder(2 * span)
        x, d = low + span - (phase - span).abs(), torch.where(phase < span, d, -d)
    if padding_mode != _ZEROS:
        d = torch.where((x > 0) & (x < size - 1), d, 0.0)
        x = x.clamp(0, size - 1)
    return x, d


def _linear_taps(x: Tensor, d: Tensor, size: int, padded: Callable[..., Any]) -> list[Tap]:
    x, d = padded(x, d)
    low = x.floor()
    after = x - low
    return [_tap(low, 1 - after, -d, size), _tap(low + 1, after, d, size)]


def _cubic_taps(x: Tensor, d: Tensor, size: int, padded: Callable[..., Any]) -> list[Tap]:
    """Cubic convolution (Keys 1981) with a = -3/4; each of the four neighbours is padded."""
    low, a = x.floor(), -0.75
    taps = []
    for place in (-1, 0, 1, 2):
        sign = 1 if place <= 0 else -1
        far = (x - low - place) * sign
        if place in (0, 1):
            weight = ((a + 2) * far - (a + 3)) * far * far + 1
            slope = (3 * (a + 2) * far - 2 * (a + 3)) * far
        else:
            weight = ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
            slope = (3 * a * far - 10 * a) * far + 8 * a
        at, _ = padded(low + place, d)
        taps.append(_tap(at, weight, slope * d * sign, size))
    return taps


def _tap(at: Tensor, weight: Tensor, weight_dot: Tensor, size: int) -> Tap:
    inside = (at >= 0) & (at < size)
    index = torch.where(inside, at, 0.0).to(torch.int64)
    return index, torch.where(inside, weight, 0.0), torch.where(inside, weight_dot, 0.0)


def _corner(pixels: Tensor, sizes: Sequence[int], taps: Sequence[Tap]) -> Tensor:
    index, weight, weight_dot = taps[0]
    stride = 1
    for size, (place, w, w_dot) in zip(sizes, taps[1:], strict=False):
        stride *= size
        index = index + place * stride
        weight, weight_dot = weight * w, weight_dot * w + weight * w_dot
    index = index.flatten(1).unsqueeze(1).expand(-1, pixels.shape[1], -1)
    return pixels.gather(2, index) * weight_dot.flatten(1).unsqueeze(1)


for _op in (aten.grid_sampler_2d.default, aten.grid_sampler_3d.default):
    jvp(_op, input=lambda d, call: call(input=d), grid=_grid_dot)
