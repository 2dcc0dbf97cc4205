"""The ops that random programs are made of, one template of plain torch a row.

In a template `{x}` and `{y}` are floating-point operands, `{i}` is an integer or boolean one and
`{w}` one that may be written to; `{out}` is the result, where the template assigns it itself.
All other fields are static arguments, drawn by `programs.STATICS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def broadcasts(x: Tensor, y: Tensor) -> bool:
    return all(a == b or 1 in (a, b) for a, b in zip(x.shape[::-1], y.shape[::-1], strict=False))


def same_shape(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape


def same_last(x: Tensor, y: Tensor) -> bool:
    return x.shape[-1:] == y.shape[-1:] and x.ndim > 0


def same_rows(x: Tensor, y: Tensor) -> bool:
    """Whether x @ y.mT exists: equal last sizes, and other dimensions that broadcast."""
    batches = zip(x.shape[-3::-1], y.shape[-3::-1], strict=False)
    return (
        min(x.ndim, y.ndim) >= 2
        and same_last(x, y)
        and all(a == b or 1 in (a, b) for a, b in batches)
    )


def weight_of(x: Tensor, y: Tensor) -> bool:
    """Whether y is a kernel for x: as many dimensions and channels, and no larger than x."""
    return (
        x.ndim == y.ndim >= 3
        and x.shape[1] == y.shape[1]
        and all(0 < a <= b for a, b in zip(y.shape[2:], x.shape[2:], strict=True))
    )


@dataclass(frozen=True)
class Op:
    """A row: the template, what the second operand must be, how many dimensions the first has.

    `second_order` is False where torch's own second derivative is wrong, or there is none.
    Derivatives agree to `tolerance`.
    """

    text: str
    fits: Callable[[Tensor, Tensor], bool] = broadcasts
    ndim: tuple[int, int] = (0, 9)
    second_order: bool = True
    tolerance: float = 1e-9


# The first row is what a program shrinks to.
SMOOTH = [
    *map(Op, """
torch.sin({x})
torch.tanh({x})
torch.cos({x})
torch.sigmoid({x})
torch.exp(torch.clamp({x}, max=2))
torch.expm1(torch.tanh({x}))
torch.log({x} * {x} + 0.5)
torch.log1p({x}.square())
torch.log2({x}.abs() + 1)
torch.sqrt({x} * {x} + 0.5)
torch.rsqrt({x} * {x} + 0.5)
torch.reciprocal({x} * {x} + 0.5)
torch.atan({x})
torch.asinh({x})
torch.acosh({x}.abs() + 1.5)
torch.atanh(torch.tanh({x}) * 0.9)
torch.asin(torch.sin({x}) * 0.9)
torch.acos(torch.sin({x}) * 0.9)
torch.sinh(torch.tanh({x}))
torch.cosh(torch.tanh({x}))
torch.tan(torch.tanh({x}))
torch.erf({x})
torch.erfc({x})
torch.lgamma({x}.abs() + 1)
torch.digamma({x}.abs() + 1)
torch.special.ndtr({x})
torch.logit(torch.sigmoid({x}))
torch.exp2(torch.tanh({x}))
torch.sinc({x} + 3)
{x} ** 3
{x}.square()
2.0 ** torch.tanh({x})
-{x}
{x} * {c}
{x} + {c}
{c} - {x}
{c} / ({x}.abs() + 1)
F.softplus({x}, beta={k})
F.gelu({x})
F.gelu({x}, approximate="tanh")
F.silu({x})
F.mish({x})
F.elu({x}, alpha=0.7)
F.celu({x}, alpha=0.5)
F.selu({x})
F.logsigmoid({x})
F.softsign({x})
F.tanhshrink({x})
""".strip().splitlines()),
]  # fmt: skip

KINKED = [
    *map(Op, """
torch.abs({x})
torch.relu({x})
F.leaky_relu({x}, 0.2)
F.hardtanh({x})
F.hardswish({x})
F.relu6({x} + 3)
F.threshold({x}, 0.1, 0.3)
F.hardshrink({x})
F.softshrink({x})
F.prelu({x}, {x}.sin().mean().reshape(1))
torch.clamp({x}, -0.5, 0.7)
torch.clamp({x}, min={c})
torch.floor({x})
torch.round({x})
torch.sign({x})
torch.div({x}, 0.7, rounding_mode="floor")
torch.nan_to_num({x})
{x}.detach()
{x}.detach() * {x}
{x}.to(torch.complex128).exp().real
torch.ones_like({x}) * {x}
""".strip().splitlines()),
    # torch lends these results the tangent of their operand, which writing to them would change
    *map(
        Op,
        (
            "torch.frac({x}) * {c}",
            "({x} % 1.3) * {c}",
            "torch.fmod({x}, 0.7) * {c}",
            "torch.remainder({x}, {y}.abs() + 0.5) * {c}",
            "torch.fmod({x}, {y}.abs() + 0.5) * {c}",
        ),
    ),
    Op("{x}.float().double()", tolerance=1e-5),
    # torch rounds its slope, 1 / 6, to float32
    Op("F.hardsigmoid({x})", second_order=False, tolerance=1e-6),
]  # fmt: skip

BINARY = [
    *map(Op, """
{x} + {y}
{x} - {y}
{x} * {y}
torch.add({x}, {y}, alpha={c})
torch.rsub({x}, {y}, alpha={c})
{x} / ({y} * {y} + 0.5)
torch.maximum({x}, {y})
torch.minimum({x}, {y})
torch.fmax({x}, {y})
torch.fmin({x}, {y})
torch.clamp({x}, max={y})
torch.atan2({x}, {y}.abs() + 0.5)
torch.atan2({x}, -{y}.abs() - 0.5)
torch.hypot({x}, {y}.abs() + 0.5)
torch.logaddexp({x}, {y})
torch.logaddexp2({x}, {y})
torch.xlogy({x}, {y}.abs() + 0.5)
torch.copysign({x}, {y} + 0.1)
({x}.abs() + 0.5) ** {y}
torch.lerp({x}, {y}, {c})
torch.lerp({x}, {y}, torch.sigmoid({y}))
torch.addcmul({x}, {y}, {y}, value={c})
torch.addcdiv({x}, {y}, {y} * {y} + 0.5, value={c})
torch.where({x} > {y}, {x}, {y})
torch.where({x} > {c}, {y}, {c})
torch.where({i} > 0, {x}, {y})
{x} * {i}
{x}.masked_fill({i} > 0, {c})
torch.broadcast_tensors({x}, {y})[0]
torch.polar({x}, {y}).imag
torch.view_as_real(torch.complex({x}, {y}).sin())
(torch.complex({x}, {y}) * torch.complex({y}, {x}).conj()).imag
(torch.complex({x}, {y}) + 3).abs()
(torch.complex({x}, {y}) + 9).angle()
torch.view_as_complex(torch.stack([{x} + {y}, {x} - {y}], -1)).square().real
""".strip().splitlines()),
]  # fmt: skip

REDUCTIONS = [
    *map(Op, """
torch.sum({x}, {dims}, keepdim={keep})
torch.mean({x}, {dims}, keepdim={keep})
torch.amax({x}, {dims}, keepdim={keep})
torch.amin({x}, {dims}, keepdim={keep})
torch.logsumexp({x}, {dims}, keepdim={keep})
torch.var({x}, {dims}, correction=0, keepdim={keep})
torch.var({x}, {dims}, keepdim={keep})
torch.std({x} + torch.linspace(1, 3, {x}.shape[-1], dtype=torch.float64), -1, keepdim={keep})
torch.stack(torch.var_mean({x}, {dims}, correction=0, keepdim={keep}))
torch.linalg.vector_norm({x} + 9, {p}, {dims}, keepdim={keep})
torch.norm({x} + 9)
torch.nansum({x}, {dim})
torch.prod({x}, {dim}, keepdim={keep})
torch.max({x}, {dim}, keepdim={keep}).values
torch.min({x}, {dim}).values
torch.median({x}, {dim}, keepdim={keep}).values
torch.kthvalue({x}, 1, {dim}, keepdim={keep}).values
torch.topk({x}, 1, {dim}, largest={keep}).values
torch.sort({x}, {dim}, descending={keep}).values
torch.cumsum({x}, {dim})
torch.cumprod({x}, {dim})
torch.logcumsumexp({x}, {dim})
torch.cummax({x}, {dim}).values
torch.softmax({x}, {dim})
torch.log_softmax({x}, {dim})
F.softmin({x}, {dim})
F.glu({x}, {dim})
torch.diff({x}, dim={dim})
torch.trapezoid({x}, dim={dim})
torch.subtract(*torch.aminmax({x}))
{x}.sum()
{x}.mean()
{x}.max()
{x}.prod()
F.normalize({x} + 9, dim={dim})
torch.renorm({x} + 9, 2, {dim}, 4.0)
torch.fft.rfft({x}, dim={dim}).imag
torch.fft.ifft({x}, dim={dim}).real
""".strip().splitlines()),
    Op("F.cosine_similarity({x} + 9, {y} + 9, dim=-1)", same_shape),
    Op("F.mse_loss({x}, {y})", same_shape),
    Op("F.l1_loss({x}, {y}, reduction='none')", same_shape),
    Op("F.smooth_l1_loss({x}, {y})", same_shape),
    Op("F.huber_loss({x}, {y}, delta=0.5)", same_shape, second_order=False),
    Op("F.binary_cross_entropy_with_logits({x}, torch.sigmoid({y}))", same_shape),
    Op("F.kl_div({x}, torch.sigmoid({y}), reduction='sum')", same_shape),
    Op("F.cross_entropy({x}, {y}.argmax(1))", same_shape, (2, 3)),
]  # fmt: skip
