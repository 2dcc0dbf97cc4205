"""The peer JAX: forward gradient descent over jax.jvp, one jitted step with donated parameters.

It reads a torch.nn.Sequential layer by layer, so that both frameworks train the same model from
the same weights; any other model is refused. Images and weights are laid out as JAX users do,
channels last and [inputs, outputs]: on the CPU that is faster than torch's order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor, nn
from works import Problem

# what torch does on a GPU by default; JAX would round factors to TF32 there
jax.config.update("jax_default_matmul_precision", "float32")
Apply = Callable[[Any, Any], Any]


def jax_step(problem: Problem, lr: float, decay: float) -> Callable[[], Any]:
    """One training step of the problem's model and batch, on the same kind of device."""
    device = jax.devices("gpu" if problem.x.is_cuda else "cpu")[0]
    parameters, apply = translate(problem.model)
    with jax.default_device(device):
        state = [weight(p) for p in parameters], jnp.zeros((), jnp.int32)
        key, x, y = jax.random.key(0), image(problem.x), array(problem.y)

    def update(state: Any, key: Any, x: Any, y: Any) -> Any:
        values, count = state
        keys = jax.random.split(jax.random.fold_in(key, count), len(values))
        pairs = zip(keys, values, strict=True)
        dots = [jax.random.normal(k, v.shape, v.dtype) for k, v in pairs]
        loss, slope = jax.jvp(lambda ps: cross_entropy(apply(ps, x), y), (values,), (dots,))
        move = lr * jnp.exp(-decay * count) * slope
        move = jnp.where(jnp.isfinite(loss) & jnp.isfinite(slope), move, 0).astype(slope.dtype)
        moved = [v - move * dot for v, dot in zip(values, dots, strict=True)]
        return (moved, count + 1), loss

    run = jax.jit(update, donate_argnums=0)

    def step() -> Any:
        nonlocal state
        state, loss = jax.block_until_ready(run(state, key, x, y))
        return loss

    return step


def cross_entropy(logits: Any, y: Any) -> Any:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
    return -chosen.mean()


def array(x: Tensor) -> Any:
    """A copy of a tensor; numpy knows no bfloat16."""
    if not x.is_floating_point():
        return jnp.array(x.cpu().numpy(), jnp.int32)
    dtype = jnp.bfloat16 if x.dtype == torch.bfloat16 else jnp.float32
    return jnp.array(x.detach().float().cpu().numpy(), dtype)


def image(x: Tensor) -> Any:
    return array(x.permute(0, 2, 3, 1))


def weight(p: Tensor) -> Any:
    order = {2: (1, 0), 4: (2, 3, 1, 0)}
    return array(p.permute(order[p.ndim]) if p.ndim in order else p)


def translate(model: nn.Module) -> tuple[list[Tensor], Callable[[list[Any], Any], Any]]:
    """The parameters of a sequence, and a function from them and an input to its output."""
    if not isinstance(model, nn.Sequential):
        raise NotImplementedError("the JAX peer reads torch.nn.Sequential, no other model")
    layers = [(layer(module), list(module.parameters())) for module in model]

    def apply(parameters: list[Any], x: Any) -> Any:
        rest = iter(parameters)
        for function, own in layers:
            x = function([next(rest) for _ in own], x)
        return x

    return [p for _, own in layers for p in own], apply


def layer(module: nn.Module) -> Apply:
    match module:
        case nn.Flatten():
            return lambda ps, x: jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
        case nn.ReLU():
            return lambda ps, x: jax.nn.relu(x)
        case nn.Linear():
            return lambda ps, x: sum(ps[1:], x @ ps[0])
        case nn.Conv2d(stride=(1, 1), groups=1, dilation=(1, 1), padding=(rows, columns)):
            padding = [(rows, rows), (columns, columns)]
            return lambda ps, x: convolve(ps, x, padding)
        case nn.MaxPool2d(kernel_size=size, stride=stride, padding=0) if size == stride:
            window = (1, size, size, 1)
            return lambda ps, x: jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, window, window, "VALID"
            )
    raise NotImplementedError(f"the JAX peer has no {module}")


def convolve(ps: list[Any], x: Any, padding: list[tuple[int, int]]) -> Any:
    order = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(x, ps[0], (1, 1), padding, dimension_numbers=order)
    return sum(ps[1:], out)
