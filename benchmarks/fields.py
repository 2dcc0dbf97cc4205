"""Functions of points in space, and the ways there are to their Laplacians.

Each way gives `(u, slopes, laplacians)` of a batch of points: `[B]`, `[B, D]`, `[B]`.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import fwdcompile

HEADS = 4
OURS = "fwdcompile.laplacian"
Derivatives = tuple[Tensor, Tensor, Tensor]
Way = Callable[[Tensor], Derivatives]


def perceptron(inputs: int, width: int) -> nn.Module:
    """Four layers with tanh, as physics-informed networks have them."""
    pairs = itertools.pairwise([inputs, width, width, width, width])
    layers = [part for a, b in pairs for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0))


class Particles(nn.Module):
    """Attention among particles in space, with layer norm and GELU, as wave functions have it.

    The attention is plain ops: torch's fused one has no second derivative.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.count = count
        self.read, self.norm1 = nn.Linear(3, width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.gelu, self.down = nn.GELU("tanh"), nn.Linear(2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x.unflatten(-1, (self.count, 3)))
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        scores = torch.einsum("...nhd,...mhd->...hnm", q, k) / math.sqrt(q.shape[-1])
        h = h + self.mix(torch.einsum("...hnm,...mhd->...nhd", scores.softmax(-1), v).flatten(-2))
        return self.down(self.gelu(self.up(self.norm2(h)))).sum((-2, -1))


@dataclass(frozen=True)
class Field:
    """A function of points, and how many points a batch has."""

    make: Callable[[], nn.Module]
    inputs: int
    batch: int


FIELDS = {
    "2 inputs": Field(lambda: perceptron(2, 64), 2, 1024),
    "3 inputs": Field(lambda: perceptron(3, 128), 3, 1024),
    "10 inputs": Field(lambda: perceptron(10, 256), 10, 512),
    "4 particles": Field(lambda: Particles(4, 64), 12, 128),
}


def ours(model: nn.Module, x: Tensor) -> Way:
    """The compiled program of `fwdcompile.laplacian`."""
    lap = fwdcompile.laplacian(model, compile=True)
    tangents = _axes(model, x)

    def run(x: Tensor) -> Derivatives:
        u, slopes, laplacian = lap(x, tangents=tangents)
        return u, torch.stack(slopes, -1), laplacian

    return run


def batched(model: nn.Module, x: Tensor) -> Way:
    """The same with all axes as one batch of directions."""
    lap = fwdcompile.laplacian(model, compile=True, batched=True)
    axes = torch.eye(x.shape[-1], dtype=x.dtype)[:, None].expand(-1, *x.shape).contiguous()

    def run(x: Tensor) -> Derivatives:
        u, (slopes,), laplacian = lap(x, tangents=[{_argument(model): axes}])
        return u, slopes.T, laplacian

    return run


def nested(model: nn.Module, x: Tensor) -> Way:
    """A compiled transform of a transform, run along one axis after another."""
    twice = fwdcompile.transform(fwdcompile.transform(model), compile=True)
    tangents = _axes(model, x)

    def run(x: Tensor) -> Derivatives:
        each = [twice(x, tangents=one) for one in tangents]
        slopes = [y_dot for (_, y_dot), _ in each]
        laplacian = torch.stack([y_ddot for _, (_, y_ddot) in each]).sum(0)
        return each[0][0][0], torch.stack(slopes, -1), laplacian

    return run


def backward_twice(model: Callable[[Tensor], Tensor], x: Tensor) -> Way:
    """Autograd through autograd, what is written most. torch.compile refuses it."""

    @torch.enable_grad()
    def run(x: Tensor) -> Derivatives:
        x = x.detach().requires_grad_()
        u = model(x)
        (slopes,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        each = (torch.autograd.grad(s.sum(), x, create_graph=True)[0] for s in slopes.unbind(-1))
        return u, slopes, torch.stack([d[:, i] for i, d in enumerate(each)]).sum(0)

    return run


def forward_twice(model: nn.Module, x: Tensor) -> Way:
    """torch.func.jvp of torch.func.jvp, along all axes by vmap. Compiled, it ends the process."""
    axes = torch.eye(x.shape[-1], dtype=x.dtype)

    def run(x: Tensor) -> Derivatives:
        def along(axis: Tensor) -> Derivatives:
            v = axis.expand(x.shape)
            (u, slope), (_, second) = jvp(lambda x: jvp(model, (x,), (v,)), (x,), (v,))
            return u, slope, second

        u, slopes, seconds = vmap(along)(axes)
        return u[0], slopes.T, seconds.sum(0)

    return run


def taylor_mode(model: nn.Module, x: Tensor) -> Way:
    """Collapsed Taylor mode by the authors of its paper, who have a package for torch, compiled."""
    jet = importlib.import_module("jet").jet
    collapsed = jet(model, (x,), collapsed=True)
    axes = torch.eye(x.shape[-1], dtype=x.dtype)[:, None].expand(-1, *x.shape)

    def run(x: Tensor) -> Derivatives:
        u, slopes, laplacian = collapsed((x, axes, torch.zeros_like(x)))
        return u, slopes.T, laplacian

    return torch.compile(run)


def traced(second: Callable[..., Callable[[Tensor], Tensor]]) -> Callable[..., Way]:
    """The trace of a Hessian by torch.func, for each point by vmap, compiled."""

    def way(model: nn.Module, x: Tensor) -> Way:
        state = dict(model.named_parameters())

        def point(x: Tensor) -> Tensor:
            return functional_call(model, state, (x[None],))[0]

        def each(x: Tensor) -> Derivatives:
            return point(x), grad(point)(x), second(point)(x).trace()

        return torch.compile(vmap(each))

    return way


WAYS: dict[str, Callable[[nn.Module, Tensor], Way]] = {
    OURS: ours,
    f"{OURS}, batched": batched,
    "fwdcompile, a transform of a transform": nested,
    "jet-for-pytorch, collapsed, compiled": taylor_mode,
    "autograd twice, eager": backward_twice,
    "torch.func, forward twice, eager": forward_twice,
    "torch.func.hessian, compiled": traced(hessian),
    "torch.func, reverse twice, compiled": traced(lambda f: jacrev(grad(f))),
}


def _argument(model: nn.Module) -> str:
    return "input" if isinstance(model, nn.Sequential) else "x"


def _axes(model: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    return [
        {_argument(model): e.expand(x.shape).contiguous()}
        for e in torch.eye(x.shape[-1], dtype=x.dtype)
    ]


def loss(found: Derivatives) -> Tensor:
    """The mean square of a nonlinear equation's residual, as a network is trained on it."""
    u, slopes, laplacians = found
    return (laplacians + (slopes * slopes).sum(-1) + u * u).square().mean()
