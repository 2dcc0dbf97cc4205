"""The peer JAX: forward gradient descent over jax.jvp, one jitted step with donated parameters.

It reads a torch model module by module, so that both frameworks train the same model from the
same weights; a module it does not know is refused. Images and weights are laid out as JAX users
do, channels last and [inputs, outputs]: on the CPU that is faster than torch's order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from forces import RADIAL, Forces
from jax.nn import standardize
from torch import Tensor, nn
from works import HEADS, Attention, Decoder, Encoder, Perceptron, Problem

from fwdcompile.data import import_torchvision

# as torch was told; JAX would round factors to TF32 on a GPU
ROUNDED = torch.get_float32_matmul_precision() == "high"
jax.config.update("jax_default_matmul_precision", "tensorfloat32" if ROUNDED else "float32")
resnet = import_torchvision().models.resnet
# from the values of parameters by name, and an input, to an output
Apply = Callable[[Any, Any], Any]


def jax_step(problem: Problem, lr: float, decay: float) -> Callable[[], Any]:
    """One training step of the problem's model and batch, on the same kind of device."""
    device = jax.devices("gpu" if problem.x.is_cuda else "cpu")[0]
    parameters, apply = translate(problem.model)
    with jax.default_device(device):
        values = {name: weight(p) for name, p in parameters.items()}
        state = values, jnp.zeros((), jnp.int32)
        key, x, y = jax.random.key(0), inputs(problem.x), array(problem.y)

    def update(state: Any, key: Any, x: Any, y: Any) -> Any:
        values, count = state
        keys = jax.random.split(jax.random.fold_in(key, count), len(values))
        pairs = zip(keys, values.items(), strict=True)
        dots = {name: jax.random.normal(k, v.shape, v.dtype) for k, (name, v) in pairs}
        loss, slope = jax.jvp(lambda ps: cross_entropy(apply(ps, x), y), (values,), (dots,))
        move = lr * jnp.exp(-decay * count) * slope
        move = jnp.where(jnp.isfinite(loss) & jnp.isfinite(slope), move, 0).astype(slope.dtype)
        return ({name: v - move * dots[name] for name, v in values.items()}, count + 1), loss

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


def inputs(x: Tensor) -> Any:
    return array(x.permute(0, 2, 3, 1) if x.ndim == 4 else x)


def weight(p: Tensor) -> Any:
    order = {2: (1, 0), 4: (2, 3, 1, 0)}
    return array(p.permute(order[p.ndim]) if p.ndim in order else p)


def translate(model: nn.Module) -> tuple[dict[str, Tensor], Apply]:
    """The parameters of a model, tied ones once, and a function from their values and an input."""
    parameters = dict(model.named_parameters())
    return parameters, layer(model, {p: name for name, p in parameters.items()})


def layer(module: nn.Module, names: dict[Tensor, str]) -> Apply:
    """One module; its parameters are found among the values by the names of their tensors."""
    part = functools.partial(layer, names=names)
    w, b = (names.get(getattr(module, attribute, None)) for attribute in ("weight", "bias"))
    match module:
        case nn.Sequential():
            return chain(map(part, module))
        case nn.Identity():
            return lambda ps, x: x
        case nn.Flatten():
            return lambda ps, x: jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
        case nn.ReLU():
            return lambda ps, x: jax.nn.relu(x)
        case nn.GELU(approximate=approximate):
            return lambda ps, x: jax.nn.gelu(x, approximate=approximate == "tanh")
        case nn.Linear():
            return lambda ps, x: plus(x @ ps[w], ps, b)
        case nn.Embedding():
            return lambda ps, x: ps[w].T[x]
        case nn.LayerNorm(normalized_shape=(_,), eps=eps):
            return lambda ps, x: plus(standardize(x, -1, epsilon=eps) * ps[w], ps, b)
        case nn.BatchNorm2d(eps=eps):  # of this batch; the running means are left out
            return lambda ps, x: plus(standardize(x, (0, 1, 2), epsilon=eps) * ps[w], ps, b)
        case nn.Conv2d(stride=stride, groups=1, dilation=(1, 1), padding=(rows, columns)):
            padding, order = [(rows, rows), (columns, columns)], ("NHWC", "HWIO", "NHWC")
            convolve = jax.lax.conv_general_dilated
            return lambda ps, x: plus(
                convolve(x, ps[w], stride, padding, dimension_numbers=order), ps, b
            )
        case nn.MaxPool2d(kernel_size=size, stride=stride, padding=pad, dilation=1):
            window, strides = (1, size, size, 1), (1, stride, stride, 1)
            padding = [(0, 0), (pad, pad), (pad, pad), (0, 0)]
            return lambda ps, x: jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, window, strides, padding
            )
        case nn.AdaptiveAvgPool2d(output_size=(1, 1)):
            return lambda ps, x: x.mean((1, 2), keepdims=True)
        case resnet.BasicBlock() as m:
            body = chain(map(part, (m.conv1, m.bn1, m.relu, m.conv2, m.bn2)))
            short = part(m.downsample or nn.Identity())
            return lambda ps, x: jax.nn.relu(body(ps, x) + short(ps, x))
        case resnet.ResNet() as m:
            stem = m.conv1, m.bn1, m.relu, m.maxpool
            stages = m.layer1, m.layer2, m.layer3, m.layer4
            return chain(map(part, (*stem, *stages, m.avgpool, nn.Flatten(), m.fc)))
        case Forces() as m:
            return forces(part(m.energy))
        case Attention(causal=causal) as m:
            norm, qkv, out = part(m.norm), part(m.qkv), part(m.out)
            return lambda ps, x: x + out(ps, attend(qkv(ps, norm(ps, x)), causal))
        case Perceptron() as m:
            body = chain(map(part, (m.norm, m.up, m.gelu, m.down)))
            return lambda ps, x: x + body(ps, x)
        case Encoder() as m:
            body, head = chain(map(part, (m.attention, m.perceptron))), part(m.head)
            return lambda ps, x: head(ps, body(ps, x)[:, 0])
        case Decoder() as m:
            words, places = part(m.words), part(m.places)
            body = chain(map(part, (m.attention, m.perceptron, m.norm, m.head)))
            return lambda ps, x: flat(body(ps, words(ps, x) + places(ps, jnp.arange(x.shape[1]))))
    raise NotImplementedError(f"the JAX peer has no {module}")


def forces(energy: Apply) -> Apply:
    def potential(ps: Any, places: Any) -> Any:
        i, j = jnp.triu_indices(len(places), 1)
        apart = jnp.sqrt(jnp.square(places[i] - places[j]).sum(1, keepdims=True))
        return energy(ps, jnp.exp(-((apart - jnp.arange(RADIAL) / 4) ** 2))).sum()

    return lambda ps, places: -jax.grad(potential, 1)(ps, places)


def chain(layers: Iterable[Apply]) -> Apply:
    """One layer after another."""
    layers = list(layers)
    return lambda ps, x: functools.reduce(lambda value, function: function(ps, value), layers, x)


def plus(x: Any, ps: Any, bias: str | None) -> Any:
    return x if bias is None else x + ps[bias]


def attend(qkv: Any, causal: bool) -> Any:
    """Attention among the heads that lie beside each other in the last dimension."""
    query, key, value = jnp.moveaxis(qkv.reshape(*qkv.shape[:2], 3, HEADS, -1), 2, 0)
    mixed = jax.nn.dot_product_attention(query, key, value, is_causal=causal)
    return mixed.reshape(*mixed.shape[:2], -1)


def flat(logits: Any) -> Any:
    return logits.reshape(-1, logits.shape[-1])
