"""Random ops: dropout reuses the primal's mask, noise itself has no tangent."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rule import jvp, pointwise, zero
from .elementwise import times

aten = torch.ops.aten

zero(
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.bernoulli.Tensor,
    aten.binomial.default,
    aten.cauchy.default,
    aten.exponential.default,
    aten.geometric.default,
    aten.log_normal.default,
    aten.normal.Tensor_float,
    aten.normal.float_Tensor,
    aten.normal.Tensor_Tensor,
    aten.normal_functional.default,
    aten.poisson.default,
    aten.rand_like.default,
    aten.randint_like.default,
    aten.randint_like.low_dtype,
    aten.randn_like.default,
    aten.random.default,
    aten.random.to,
    aten.uniform.default,
)

# The sample as a function of its shape parameter, at a fixed quantile.
pointwise(aten._standard_gamma.default, lambda self, out: aten._standard_gamma_grad(self, out))


def _dirichlet(d: Tensor, self: Tensor, out: Tensor) -> Tensor:
    """Of gamma samples over their sum: each moves with its own parameter, all with the sum."""
    moved: Tensor = d * aten._dirichlet_grad(out, self, self.sum(-1, True).expand_as(self))
    return moved - out * moved.sum(-1, True)


jvp(aten._sample_dirichlet.default, self=_dirichlet)


def _dropped(d: Tensor, p: float, train: bool | None, out: tuple[Tensor, Tensor]) -> Tensor:
    if train is False or p == 0:
        return d
    return times(d * out[1], 1 / (1 - p) if p < 1 else 0.0)


jvp(aten.native_dropout.default, input=lambda d, p, train, out: (_dropped(d, p, train, out), None))


def _leaked(
    d: Tensor, self: Tensor, lower: float, upper: float, training: bool, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, None]:
    """In training the second output holds the slopes that were drawn, and 1 for positive inputs."""
    return d * out[1] if training else torch.where(self > 0, d, d * ((lower + upper) / 2)), None


jvp(aten.rrelu_with_noise_functional.default, self=_leaked)
