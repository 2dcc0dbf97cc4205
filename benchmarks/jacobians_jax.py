"""Jacobians and products with them by JAX: jax.jacfwd and jax.jvp, jitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from peers_jax import Apply, inputs, translate, weight
from torch import Tensor, nn


def run_of(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """The Jacobian of a model that `peers_jax` knows; images have their channels last."""
    values, apply = of(model)
    point, jacobian = inputs(x), jax.jit(jax.jacfwd(apply, argnums=1))
    return lambda: jax.block_until_ready(jacobian(values, point))


def jvp_of(model: nn.Module, x: Tensor, v: Tensor) -> Callable[[], Any]:
    """Output and jvp of such a model."""
    values, apply = of(model)
    primal, tangent = inputs(x), inputs(v)
    jvp = jax.jit(lambda ps, x, v: jax.jvp(lambda x: apply(ps, x), (x,), (v,)))
    return lambda: jax.block_until_ready(jvp(values, primal, tangent))


def of(model: nn.Module) -> tuple[dict[str, Any], Apply]:
    parameters, apply = translate(model)
    return {name: weight(p) for name, p in parameters.items()}, apply
