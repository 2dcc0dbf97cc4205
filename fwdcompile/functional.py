"""The public functions: `transform`, and `jvp` with the signature of torch.func.jvp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils import _pytree as pytree

from .errors import TangentError
from .forward import Forward
from .kept import check_aux, served, transform_of
from .parts import Model
from .route import Given, flatten
from .simplify import PASSES


def transform(
    model: Model | Forward,
    *,
    tracks_grad: bool = True,
    compile: bool = False,
    mode: str = "default",
    passes: Sequence[str] = tuple(PASSES),
    dynamic: bool = False,
    batched: bool = False,
) -> Forward:
    """Makes the forward-mode version of a model; nothing is traced before the first call.

    Args:
        model: an nn.Module, a function of tensors and pytrees, or the result of `transform`.
        tracks_grad: False cuts the tangent off autograd: the primal output stays differentiable,
            the tangent costs autograd no memory.
        compile: runs the generated program through `torch.compile(fullgraph=True)`.
        mode: torch.compile's mode: "default", "reduce-overhead" or "max-autotune".
        passes: simplifying passes to take, in order.
        dynamic: one program, captured once, serves every size from 2 that the first dimension of
            the inputs may take. Where the model fixes or asks for a size, a call of another size
            is captured anew.
        batched: tangents have one axis more, in front, along which K directions stand, and so has
            `y_dot`. The program is no longer for more directions, and has one product for all.

    Returns:
        A callable `fwd(*inputs, tangents={name: tangent})` that gives `(y, y_dot)`.

    Raises:
        ValueError: settings that cannot be, as a mode or a pass that there is not.
        TangentError: the model is a `laplacian`.

    Example:
        >>> fwd = fwdcompile.transform(model)
        >>> y, y_dot = fwd(x, tangents={"fc1.weight": w_dot, "x": x_dot})
        >>> print(fwd.code)

    The mathematics is forward-mode AD as in section 2.1 of Baydin et al. (2022): y and J v
    together, in one evaluation.
    """
    return transform_of(
        Forward,
        model,
        tracks_grad=tracks_grad,
        compile=compile,
        mode=mode,
        passes=tuple(passes),
        dynamic=dynamic,
        batched=batched,
    )


def jvp(
    func: Callable[..., Any],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    strict: bool = False,
    has_aux: bool = False,
    tracks_grad: bool = True,
    compile: bool = False,
) -> tuple[Any, ...]:
    """The Jacobian-vector product of `func`, called as torch.func.jvp.

    Results are those of torch.func.jvp, but that an output that is no float has None in place of
    zeros, and that outputs may be no tensors at all.

    Args:
        func: a function of tensors or pytrees of tensors. The programs of the last 32 functions
            are kept; one serves all functions of one code that differ in the tensors they hold,
            such as a lambda that is written in a loop.
        primals: the positional arguments of `func`, in a tuple or list.
        tangents: for each primal a tangent of the same structure, shape, dtype and device.
        strict: raises where an output of floats has no derivative, in place of zeros: it does not
            depend on any primal, or by steps alone, as `x.floor()` does. torch.func.jvp gives zeros
            for such steps, and raises for an output that is no float.
        has_aux: `func` returns `(output, aux)`, of which only the first is differentiated.
        tracks_grad: as of `transform`; False where no gradient is taken of the jvp.
        compile: runs the program through torch.compile, once for all functions that it serves.

    Returns:
        `(output, jvp_output)`, and `aux` behind them if `has_aux`.

    Raises:
        TangentError: structure, shape, dtype or device of tangents and primals differ; `has_aux`
            and `func` does not return two things; or `strict` and an output has no derivative.

    Example:
        >>> fwdcompile.jvp(torch.sin, (torch.zeros(2),), (torch.ones(2),))
        (tensor([0., 0.]), tensor([1., 1.]))
    """
    for name, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, tuple | list):
            raise TangentError(f"{name} must be a tuple, not {type(given).__name__}: write (x,)")
    (leaves, spec), (dots, dot_spec) = flatten(primals, {}), flatten(tangents, {})
    if spec != dot_spec or not leaves:
        specs = (str(pytree.tree_structure(tuple(each))) for each in (primals, tangents))
        raise TangentError(f"primals and tangents differ in structure: {' and '.join(specs)}")

    def run(forward: Forward, held: dict[str, Any]) -> tuple[Any, Any, Forward]:
        more, more_spec = flatten((), held)
        call = Given([*leaves, *more], (spec, more_spec), dots)
        return *forward._along(primals, held, call), forward

    y, y_dot, forward = served(func, run, tracks_grad=tracks_grad, compile=compile)
    if has_aux:
        check_aux(y)
    if strict:
        still = [slot.name for node, slot in forward.program.results() if node.meta.get("absent")]
        still = [name for name in still if not (has_aux and name.split(".")[1] == "1")]
        if still:
            raise TangentError(
                f"strict=True: {', '.join(still)} does not depend on the primals, or by steps alone"
            )
    return (y[0], y_dot[0], y[1]) if has_aux else (y, y_dot)
