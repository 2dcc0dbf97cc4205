"""Laplacians of the fields by JAX, jitted: its Hessian's trace, and its Taylor mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from fields import HEADS, Particles
from jax.experimental.jet import jet
from jax.nn import standardize
from peers_jax import array
from torch import Tensor, nn

# A field of one point `[D]`, given parameters.
Point = Callable[[Any, Any], Any]
Way = Callable[[Point, Any], Callable[[Any, Any], Any]]


def translate(model: nn.Module) -> tuple[dict[str, Any], Point]:
    """The parameters of a field, and the same function of them and of a point."""
    values = {name: array(p) for name, p in model.named_parameters()}
    if isinstance(model, Particles):
        return values, lambda ps, x: _particles(ps, x, model.count, model.norm1.eps)
    layers = [name.removesuffix(".weight") for name in values if name.endswith(".weight")]
    return values, lambda ps, x: _perceptron(ps, x, layers)


def _linear(ps: Any, name: str, x: Any) -> Any:
    return x @ ps[f"{name}.weight"].T + ps[f"{name}.bias"]


def _perceptron(ps: Any, x: Any, layers: list[str]) -> Any:
    for name in layers[:-1]:
        x = jnp.tanh(_linear(ps, name, x))
    return _linear(ps, layers[-1], x)[0]


def _particles(ps: Any, x: Any, count: int, eps: float) -> Any:
    def norm(name: str, h: Any) -> Any:
        return standardize(h, -1, epsilon=eps) * ps[f"{name}.weight"] + ps[f"{name}.bias"]

    h = _linear(ps, "read", x.reshape(count, 3))
    qkv = _linear(ps, "qkv", norm("norm1", h)).reshape(count, 3, HEADS, -1)
    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
    scores = jnp.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
    mixed = jnp.einsum("hnm,mhd->nhd", jax.nn.softmax(scores), v)
    h = h + _linear(ps, "mix", mixed.reshape(count, -1))
    wide = jax.nn.gelu(_linear(ps, "up", norm("norm2", h)), approximate=True)
    return _linear(ps, "down", wide).sum()


def by_hessian(point: Point, x: Any) -> Callable[[Any, Any], Any]:
    """jax.hessian, forward over reverse."""

    def each(ps: Any, x: Any) -> Any:
        f = lambda x: point(ps, x)  # noqa: E731
        u, slope = jax.value_and_grad(f)(x)
        return u, slope, jnp.trace(jax.hessian(f)(x))

    return jax.vmap(each, (None, 0))


def by_taylor_mode(point: Point, x: Any) -> Callable[[Any, Any], Any]:
    """jax.experimental.jet to the second order, along all axes by vmap."""
    axes = jnp.eye(x.shape[-1], dtype=x.dtype)

    def each(ps: Any, x: Any) -> Any:
        def along(axis: Any) -> Any:
            u, (slope, second) = jet(lambda x: point(ps, x), (x,), ((axis, jnp.zeros_like(axis)),))
            return u, slope, second

        u, slopes, seconds = jax.vmap(along)(axes)
        return u[0], slopes, seconds.sum()

    return jax.vmap(each, (None, 0))


WAYS: dict[str, Way] = {"jax.hessian, jitted": by_hessian, "jax jet, jitted": by_taylor_mode}


def run_of(way: str, model: nn.Module, x: Tensor, train: bool) -> Callable[[], Any]:
    """One evaluation at a batch, or the gradient of `fields.loss` by the parameters."""
    values, point = translate(model)
    points = array(x)
    derivatives = WAYS[way](point, points)

    def loss(ps: Any) -> Any:
        u, slopes, laplacians = derivatives(ps, points)
        return ((laplacians + (slopes * slopes).sum(-1) + u * u) ** 2).mean()

    function = jax.jit(jax.grad(loss) if train else lambda ps: derivatives(ps, points))
    return lambda: jax.block_until_ready(function(values))
