"""Jacobians by JAX: jax.jacfwd, jitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from peers_jax import inputs, translate, weight
from torch import Tensor, nn


def run_of(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """The Jacobian of a model that `peers_jax` knows; images have their channels last."""
    parameters, apply = translate(model)
    values, point = {name: weight(p) for name, p in parameters.items()}, inputs(x)
    jacobian = jax.jit(jax.jacfwd(apply, argnums=1))
    return lambda: jax.block_until_ready(jacobian(values, point))
