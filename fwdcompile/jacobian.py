"""Jacobians: all columns from one program, with the results of torch.func.jacfwd."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import TangentError
from .forward import Forward
from .kept import check_aux, own, served
from .parts import arguments_of, input_leaves
from .program import is_differentiable, is_random


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
        func: a function of tensors or pytrees of tensors, or a module. Programs are kept as for
            `fwdcompile.jvp`.
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
        ValueError: `chunk_size` is not positive, or `argnums` is no int and no tuple of ints.
        TangentError: a chosen argument is not there, chosen twice, or has a leaf that is no float;
            `has_aux` and `func` does not return two things; or `func` draws random numbers or
            writes to buffers, and would so for each chunk anew.

    Example:
        >>> fwdcompile.jacfwd(lambda x: x ** 2)(torch.arange(3.0))
        tensor([[0., 0., 0.],
                [0., 2., 0.],
                [0., 0., 4.]])
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, not {chunk_size}")
    options = {"batched": True, "compile": compile}
    model = own(func, **options)
    several = isinstance(argnums, tuple)
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    if not numbers or not all(type(number) is int for number in numbers):
        raise ValueError(f"argnums must be an int or a tuple of ints, not {argnums!r}")

    def jacobian(*args: Any, **kwargs: Any) -> Any:
        picked = tuple(_argument(args, number) for number in numbers)
        places = [number % len(args) for number in numbers]
        if len(set(places)) < len(places):
            raise TangentError(f"argnums {argnums} name an argument twice")
        inputs = _leaves_of(model.base, args, kwargs, places)

        def run(forward: Forward, held: dict[str, Any]) -> tuple[Any, list[list[Any]]]:
            return _columns(forward, inputs, chunk_size, args, kwargs | held)

        y, columns = served(func, run, model, **options)
        in_spec = pytree.tree_structure(picked if several else picked[0])
        blocks = [
            pytree.tree_unflatten(list(map(_block, each, inputs.values())), in_spec)
            for each in zip(*columns, strict=True)
        ]
        if has_aux:
            check_aux(y)
        whole = pytree.tree_unflatten(blocks, pytree.tree_structure(y))
        return (whole[0], y[1]) if has_aux else whole

    # not functools.wraps: modules behind `func` are found through `model`, by that name
    jacobian.__name__ = getattr(func, "__name__", type(func).__name__)
    jacobian.__signature__ = arguments_of(func)  # type: ignore[attr-defined]
    return jacobian


def _argument(args: Sequence[Any], number: int) -> Any:
    if not -len(args) <= number < len(args):
        raise TangentError(f"there is no positional argument {number} of {len(args)}")
    return args[number]


def _leaves_of(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Any, numbers: Sequence[int]
) -> dict[str, Tensor]:
    """The leaves of some positional arguments, by the names that their tangents have."""
    named = iter(input_leaves(func, args, kwargs))
    each = [list(itertools.islice(named, len(pytree.tree_leaves(arg)))) for arg in args]
    return dict(pair for number in numbers for pair in each[number])


def _columns(
    forward: Forward,
    inputs: Mapping[str, Tensor],
    chunk_size: int | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Any, list[list[Any]]]:
    """The output, and for each input the derivatives of all outputs along its axes, in rows."""
    bases = {name: _axes(name, x) for name, x in inputs.items()}
    chunks = {n: torch.split(basis, chunk_size or len(basis)) for n, basis in bases.items()}
    run = functools.partial(forward, *args, **kwargs)
    if chunk_size is not None and sum(map(len, chunks.values())) > 1:
        _check_repeatable(forward, inputs, args, kwargs)
        return _in_chunks(run, chunks)
    y, y_dots = run(tangents=[{name: basis} for name, basis in bases.items()])
    return y, [pytree.tree_leaves(dot) for dot in y_dots]


def _check_repeatable(
    model: Forward, inputs: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Refuses chunks of a function that is another one each time it runs."""
    program = model.lower(*args, tangents=list(inputs), **kwargs).program
    written = any(slot.kind in ("buffer", "input") for slot in program.outputs)
    if written or any(map(is_random, program.graph.nodes)):
        raise TangentError(
            f"{program.title} draws random numbers or writes to its buffers or inputs, and would "
            "for each chunk anew: leave chunk_size out"
        )


def _in_chunks(
    run: Callable[..., Any], chunks: Mapping[str, Sequence[Tensor]]
) -> tuple[Any, list[list[Any]]]:
    """The output, and for each input the derivatives of all outputs along its axes, in rows."""
    columns = []
    for name, parts in chunks.items():
        pairs = [run(tangents={name: part}) for part in parts]
        rows = zip(*(pytree.tree_leaves(y_dot) for _, y_dot in pairs), strict=True)
        columns.append([_joined(each) for each in rows])
    return pairs[0][0], columns


def _axes(name: str, x: Any) -> Tensor:
    """The unit tangents of a tensor, in a row."""
    if not is_differentiable(x) or not x.numel():
        raise TangentError(f"{name!r} is no floating-point tensor with elements")
    return torch.eye(x.numel(), dtype=x.dtype, device=x.device).view(-1, *x.shape)


def _joined(parts: Sequence[Any]) -> Any:
    return None if parts[0] is None else torch.cat(list(parts))


def _block(rows: Any, x: Tensor) -> Any:
    """Of derivatives along the axes of `x`, one a row, the Jacobian `[*out, *in]`."""
    return None if rows is None else rows.movedim(0, -1).reshape(*rows.shape[1:], *x.shape)
