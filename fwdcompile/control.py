"""Control flow of generated programs: emit prints these functions into the programs that need them.

Compiled, each is torch's own higher-order op. Eagerly, where that op would trace its functions in
every call, it is the plain Python statement, which autograd and a debugger can follow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def _cond(
    predicate: torch.Tensor,
    true: Callable[..., tuple[torch.Tensor, ...]],
    false: Callable[..., tuple[torch.Tensor, ...]],
    operands: list[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Calls one of two functions: torch.cond where compiled, else a plain if."""
    if torch.compiler.is_compiling():
        results: tuple[torch.Tensor, ...] = torch.cond(predicate, true, false, operands)
        return results
    return true(*operands) if predicate else false(*operands)


def _while_loop(
    condition: Callable[..., tuple[torch.Tensor, ...]],
    body: Callable[..., tuple[torch.Tensor, ...]],
    carried: list[torch.Tensor],
    fixed: list[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Replaces what is carried by the body's results for as long as the condition holds."""
    values = tuple(carried)
    if torch.compiler.is_compiling():
        results: tuple[torch.Tensor, ...] = torch.ops.higher_order.while_loop(
            lambda *args: condition(*args)[0], body, values, tuple(fixed)
        )
        return results
    while condition(*values, *fixed)[0]:
        values = body(*values, *fixed)
    return values


def _scan(
    body: Callable[..., tuple[torch.Tensor, ...]],
    carried: list[torch.Tensor],
    sliced: list[torch.Tensor],
    fixed: list[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Walks over the first dimension; the last carried values, then all other results stacked."""
    values, count = tuple(carried), len(carried)
    if torch.compiler.is_compiling():

        def step(
            carry: tuple[torch.Tensor, ...], slices: tuple[torch.Tensor, ...]
        ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
            results = body(*carry, *slices, *fixed)
            return results[:count], results[count:]

        values, stacked = torch._higher_order_ops.scan(step, values, tuple(sliced))
        return (*values, *stacked)
    rows = []
    for slices in zip(*sliced, strict=True):
        results = body(*values, *slices, *fixed)
        values = results[:count]
        rows.append(results[count:])
    return (*values, *map(torch.stack, zip(*rows, strict=True)))


def _map(
    body: Callable[..., tuple[torch.Tensor, ...]],
    sliced: list[torch.Tensor],
    fixed: list[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Calls the body on each slice of the first dimension and stacks its results."""
    if torch.compiler.is_compiling():
        stacked: tuple[torch.Tensor, ...] = torch.ops.higher_order.map_impl(body, sliced, fixed)
        return stacked
    rows = [body(*slices, *fixed) for slices in zip(*sliced, strict=True)]
    return tuple(map(torch.stack, zip(*rows, strict=True)))
