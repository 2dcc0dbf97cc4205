"""Jacobians: all columns from one program, with the signature of torch.func.jacfwd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import TangentError
from .forward import Forward
from .parts import input_leaves


def jacfwd(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    chunk_size: int | None = None,
    compile: bool = False,
) -> Callable[..., Any]:
    """The Jacobian of a function by forward mode, with the results of torch.func.jacfwd.

    One program computes the output once and all columns beside it, as one batch of directions.
    It is right for functions with more outputs than inputs, and for Hessians, as
    `jacfwd(torch.func.grad(loss))`.

    Args:
        func: a function of tensors or pytrees of tensors.
        argnums: the positional argument to differentiate by, or several.
        has_aux: `func` returns `(output, aux)`, of which only the first is differentiated.
        chunk_size: at most so many columns at a time, which bounds memory; by default all.
        compile: runs the program through torch.compile.

    Returns:
        A function of the arguments of `func` that gives, for each output of shape `[*out]` and
        each chosen input of shape `[*in]`, a tensor `[*out, *in]`, in the structure of the output
        and then, within each leaf, that of the argument; a tuple of arguments for several
        `argnums`. `(jacobian, aux)` if `has_aux`. An output that is no float has None.

    Raises:
        ValueError: `chunk_size` is not positive.
        TangentError: a chosen argument is not there, or has a leaf that is no float.

    Example:
        >>> fwdcompile.jacfwd(lambda x: x ** 2)(torch.arange(3.0))
        tensor([[0., 0., 0.],
                [0., 2., 0.],
                [0., 0., 4.]])
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, not {chunk_size}")
    forward = Forward(func, batched=True, compile=compile)
    several = isinstance(argnums, tuple)
    numbers: Sequence[int] = argnums if isinstance(argnums, tuple) else (argnums,)

    @functools.wraps(func)
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        chosen = _leaves(func, numbers, args, kwargs)
        y, columns = _columns(forward, chosen, chunk_size, args, kwargs)
        if has_aux:
            y, columns = y[0], [each[0] for each in columns]
        picked = tuple(args[i] for i in numbers) if several else args[numbers[0]]
        spec = pytree.tree_structure(picked)
        leaves, out_spec = pytree.tree_flatten(y)
        parts = [pytree.tree_leaves(each, is_leaf=lambda x: x is None) for each in columns]
        inputs = list(chosen.values())
        blocks = [
            pytree.tree_unflatten([_block(p[i], x) for p, x in zip(parts, inputs, strict=True)], spec)
            for i in range(len(leaves))
        ]
        jac = pytree.tree_unflatten(blocks, out_spec)
        return (jac, forward_aux(y)) if has_aux else jac

    return jacobian
