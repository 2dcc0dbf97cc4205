"""A whole training step for each method: directions, derivative and update, by name.

`STEPS[name](problem)` returns a function of no arguments that runs one step and returns the loss.
A peer that cannot run a problem raises whatever its framework raises, at the first step or before.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, replace_all_batch_norm_modules_
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from works import Problem, checkpointed

from fwdcompile import FGD, Normal, Rademacher
from fwdcompile.config import Config
from fwdcompile.directions import Directions
from fwdcompile.distributed import DistributedFGD
from fwdcompile.methods import METHODS

# small, because the deepest models leave float32 within a few steps of the paper's rate
LR, DECAY = 1e-6, 1e-4
Run = Callable[[], Any]
RIVAL, BASE = "backprop-compiled", "base"


def base(problem: Problem) -> Run:
    """The base runtime of the paper's section 5.2: forward and loss, no derivative."""

    @functools.partial(torch.compile, fullgraph=True, dynamic=False, mode=problem.mode)
    def objective(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(problem.model(x), y)

    return lambda: torch.no_grad()(objective)(problem.x, problem.y)


def runner_method(name: str, problem: Problem) -> Run:
    """A method as `fwdcompile train` runs it, with directions from the normal distribution."""
    step = METHODS[name](problem.model, Config(lr=LR, decay=DECAY, mode=problem.mode), 0)
    return lambda: step(problem.x, problem.y)


def with_detours(make: Callable[[Problem], Run], problem: Problem) -> Run:
    """A peer on the detours that torch names where it has no forward derivative.

    Batch norm without running means, and attention by its parts in place of the fused kernel.
    Plain sequences need none.
    """
    if not problem.stages:
        return make(problem)
    run = make(replace(problem, model=replace_all_batch_norm_modules_(problem.model)))
    detoured: Run = sdpa_kernel(SDPBackend.MATH)(run)
    return detoured


def peer_method(name: str) -> Callable[[Problem], Run]:
    return functools.partial(with_detours, functools.partial(runner_method, name))


def checkpointed_method(name: str, problem: Problem) -> Run:
    """Backpropagation with activation checkpointing, its rival where memory counts."""
    return runner_method(name, replace(problem, model=checkpointed(problem)))


def fgd(
    directions: Callable[[], Directions], problem: Problem, compile: bool = True, **options: Any
) -> Run:
    settings = {"lr": LR, "decay": DECAY, "compile": compile, "mode": problem.mode}
    trainer = FGD(problem.model, cross_entropy, directions=directions(), **settings, **options)
    trainer.calibrate(problem.x, problem.y)
    return lambda: trainer.step(problem.x, problem.y)


def fgd_in_parts(count: int, problem: Problem, compile: bool = True) -> Run:
    """Rank-one directions, the batch in parts one after another along the same direction."""
    settings = {"lr": LR, "decay": DECAY, "compile": compile, "mode": problem.mode}
    directions = Rademacher(rank_one=True)
    trainer = DistributedFGD(problem.model, cross_entropy, directions=directions, **settings)
    *parts, last = zip(problem.x.chunk(count), problem.y.chunk(count), strict=True)
    trainer.calibrate(*last)

    def step() -> Tensor:
        for part in parts:
            trainer.accumulate(*part)
        return trainer.step(*last)

    return step


def forward_ad_slope(
    problem: Problem, values: dict[str, Tensor], dots: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The loss and its derivative along `dots`, by dual tensors."""
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(values[name], dots[name]) for name in values}
        out = functional_call(problem.model, duals, (problem.x,))
        return forward_ad.unpack_dual(cross_entropy(out, problem.y))


def forward_ad_method(problem: Problem) -> Run:
    """The peer torch.autograd.forward_ad, which runs eagerly."""
    values = {name: p.detach() for name, p in problem.model.named_parameters()}
    generator = torch.Generator(problem.x.device).manual_seed(0)
    iteration = 0

    @torch.no_grad()
    def step() -> Tensor:
        nonlocal iteration
        dots = {n: torch.empty_like(v).normal_(generator=generator) for n, v in values.items()}
        loss, slope = forward_ad_slope(problem, values, dots)
        rate = LR * math.exp(-DECAY * iteration)
        if not math.isfinite(move := rate * float(slope)):
            raise ArithmeticError("the derivative is not finite")
        torch._foreach_add_(list(values.values()), list(dots.values()), alpha=-move)
        iteration += 1
        return loss

    return step


def jax_method(problem: Problem) -> Run:
    # how many threads XLA starts; JAX has no option for it
    os.environ.setdefault("NPROC", str(torch.get_num_threads()))
    from peers_jax import jax_step

    return jax_step(problem, LR, DECAY)


STEPS: dict[str, Callable[[Problem], Run]] = {
    BASE: base,
    "backprop": functools.partial(runner_method, "backprop"),
    RIVAL: functools.partial(runner_method, RIVAL),
    "backprop-checkpointed": functools.partial(checkpointed_method, "backprop"),
    "backprop-checkpointed-compiled": functools.partial(checkpointed_method, RIVAL),
    "fgd rademacher": functools.partial(fgd, Rademacher),
    "fgd rank-one": functools.partial(fgd, functools.partial(Rademacher, rank_one=True)),
    "fgd normal": functools.partial(fgd, Normal),
    "fgd normal regenerated": functools.partial(fgd, Normal, store_directions=False),
    "fgd rank-one in 4 parts": functools.partial(fgd_in_parts, 4),
    "torch-jvp": peer_method("torch-jvp"),
    "torch-jvp-compiled": peer_method("torch-jvp-compiled"),
    "torch-jvp-randn-compiled": peer_method("torch-jvp-randn-compiled"),
    "forward-ad": functools.partial(with_detours, forward_ad_method),
    "jax-jvp": jax_method,
}
PEERS = {"backprop-checkpointed-compiled", "torch-jvp", "torch-jvp-compiled", "forward-ad"}
PEERS |= {"torch-jvp-randn-compiled", "jax-jvp"}
