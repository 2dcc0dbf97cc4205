"""Jacobians by JAX: jax.jacfwd, jitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from forces import RADIAL, Forces
from peers_jax import Apply, inputs, translate, weight
from torch import Tensor, nn


def run_of(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """The Jacobian of a model that `peers_jax` knows; images have their channels last."""
    if isinstance(model, Forces):
        parameters, apply = _forces(model)
    else:
        parameters, apply = translate(model)
    values, point = {name: weight(p) for name, p in parameters.items()}, inputs(x)
    jacobian = jax.jit(jax.jacfwd(apply, argnums=1))
    return lambda: jax.block_until_ready(jacobian(values, point))


def _forces(model: Forces) -> tuple[dict[str, Tensor], Apply]:
    parameters, energy = translate(model.energy)

    def potential(values: Any, places: Any) -> Any:
        i, j = jnp.triu_indices(len(places), 1)
        apart = jnp.sqrt(jnp.square(places[i] - places[j]).sum(1, keepdims=True))
        return energy(values, jnp.exp(-((apart - jnp.arange(RADIAL) / 4) ** 2))).sum()

    return parameters, lambda values, places: -jax.grad(potential, 1)(values, places)
