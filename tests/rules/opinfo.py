"""Torch's own operator database as test cases: every sample a function of tensors, checked.

The oracle is torch.func.jvp where torch has a forward derivative, and else reverse mode, by
u'(Jv) = (J'u)'v for random u, together with central differences.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import REVIEWED
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

import fwdcompile
from fwdcompile.program import is_differentiable

Outputs = tuple[Tensor, ...]

# Entries of which some samples are refused, with the words of the user's error that say why.
REFUSED: dict[str, str] = {
    "as_strided_partial_views": "lead out of its tensor's own memory",
    "combinations": "cannot be captured",
    "narrow": "cannot be captured",
    "nextafter": "no row in the rule table",
    "sparse_mm_reduce": "to_dense",
    "sparse_sampled_addmm": "to_dense",
    "tensor_split": "decides in Python by the value of a tensor",
    "to_sparse": "sparse layouts",
}
if not REVIEWED:  # torch 2.11 compares ranks, to leave out the mean of two
    REFUSED |= dict.fromkeys(("nanquantile", "quantile"), "by the value of a tensor")
# Entries that torch itself differentiates wrongly, forward; the oracle is a central difference.
DIFFERENCE: dict[str, str] = {
    "cholesky_inverse": "wrong by 1e-5",
    "logcumsumexp": "wrong by 1e-6",
    "nn_functional_cross_entropy": "drops the tangent of the classes' weights",
    "nn_functional_linear_cross_entropy": "drops the tangent of the classes' weights",
    "nn_functional_linear_cross_entropy_chunked": "zero",
    "nn_functional_linear_cross_entropy_chunked_none": "zero",
    "nn_functional_nll_loss": "drops the tangent of the classes' weights",
    "nn_functional_ctc_loss": "reverse mode is right behind log_softmax alone",
    "native_layer_norm": "the saved statistics get none",
    "native_batch_norm": "the saved statistics get none",
    "_native_batch_norm_legit": "the saved statistics get none",
    "_batch_norm_with_update": "the saved statistics get none",
    "linalg_lstsq": "singular values get none",
    "scatter_reduce_prod": "zero",
}
# Entries whose derivative differences do not show.
REVERSE: dict[str, str] = {
    "normal": "a draw does not depend on its mean and deviation",
    "grid_sampler_2d": "so many points that a difference crosses kinks",
    "grid_sampler_3d": "so many points that a difference crosses kinks",
}
# Tolerances, relative and absolute, of entries whose samples are badly conditioned.
TOLERANCES: dict[str, tuple[float, float]] = {"linalg_lstsq": (2e-3, 2e-3)}


@dataclass(frozen=True)
class Case:
    """One sample of an entry: `function(*tensors)` returns a tuple of tensors.

    `reference` computes the same and is what torch differentiates: it differs from `function` for
    variants, not all of which torch differentiates.
    """

    function: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    tensors: tuple[Tensor, ...]

    @property
    def active(self) -> list[int]:
        """Numbers of the tensors that get a tangent: all that can have one."""
        return [i for i, t in enumerate(self.tensors) if is_differentiable(t)]


def entries() -> dict[str, Any]:
    """The entries of the database that torch differentiates in float64 on the CPU, by name."""
    found = (e for e in op_db if e.supports_autograd and torch.float64 in e.supported_dtypes("cpu"))
    return {entry.formatted_name: entry for entry in found}


def cases(
    entry: Any, dtype: torch.dtype = torch.float64, variant: str = "", limit: int | None = None
) -> list[Case]:
    """Samples of an entry, `limit` of them chosen by a fixed seed, or all.

    Args:
        entry: of `entries()`.
        dtype: of the samples' differentiable tensors.
        variant: "" for the op itself, "inplace" or "out" for these variants of it.
        limit: how many at most.
    """
    if (variant == "inplace" and entry.inplace_variant is None) or (
        variant == "out" and not entry.supports_out
    ):
        return []
    torch.manual_seed(0)
    samples = list(entry.sample_inputs("cpu", dtype, requires_grad=True))
    if variant == "inplace":
        samples = [sample for sample in samples if not sample.broadcasts_input]
    if limit is not None and len(samples) > limit:
        chosen = random.Random(entry.formatted_name).sample(range(len(samples)), limit)
        samples = [samples[i] for i in sorted(chosen)]
    return [case for sample in samples for case in _case(entry, sample, variant)]


def _case(entry: Any, sample: Any, variant: str) -> Iterator[Case]:
    leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = tuple(leaves[i].detach().clone() for i in places)

    def arguments(xs: Outputs) -> Any:
        filled = list(leaves)
        for i, x in zip(places, xs, strict=True):
            filled[i] = x
        return pytree.tree_unflatten(filled, spec)

    def plain(*xs: Tensor) -> Outputs:
        x, args, kwargs = arguments(xs)
        out = entry.gradcheck_wrapper(entry.op, x, *args, **kwargs)
        return _flat(sample.output_process_fn_grad(out))

    def in_place(*xs: Tensor) -> Outputs:
        x, args, kwargs = arguments(xs)
        x = pytree.tree_map_only(Tensor, torch.clone, x)
        out = entry.gradcheck_wrapper(entry.inplace_variant, x, *args, **kwargs)
        return _flat(sample.output_process_fn_grad(out))

    def out_given(*xs: Tensor) -> Outputs:
        x, args, kwargs = arguments(xs)
        places = pytree.tree_map_only(Tensor, torch.empty_like, likes)
        given = entry.gradcheck_wrapper(entry.op, x, *args, **kwargs, out=places)
        return _flat(sample.output_process_fn_grad(places if given is None else given))

    if variant == "":
        yield Case(plain, plain, tensors)
    elif variant == "inplace":
        before = sample.input[0] if isinstance(sample.input, list | tuple) else sample.input
        after = plain(*tensors)[0]
        if (after.dtype, after.shape) == (before.dtype, before.shape):
            yield Case(in_place, plain, tensors)
    else:
        likes = entry.op(sample.input, *sample.args, **sample.kwargs)
        yield Case(out_given, plain, tensors)


def gradient(case: Case) -> Case:
    """The gradient of a sum over what a case gives, by torch.func.grad, as a case of its own."""

    def loss(*xs: Tensor) -> Tensor:
        outs = [out for out in case.function(*xs) if is_differentiable(out)]
        parts = [part for x in outs for part in ((x.real, x.imag) if x.is_complex() else (x,))]
        return torch.stack([part.sin().sum() for part in parts]).sum()

    function = torch.func.grad(loss, argnums=tuple(case.active))
    return Case(function, function, case.tensors)


def _flat(out: Any) -> Outputs:
    return tuple(leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor))


def directions(case: Case, seed: int = 1) -> dict[int, Tensor]:
    """A tangent for each active tensor, by its number."""
    generator = torch.Generator().manual_seed(seed)
    return {i: _random_like(case.tensors[i], generator) for i in case.active}


def check(case: Case, rtol: float, atol: float, oracle: str = "jvp") -> None:
    """Compares the generated program of a case with torch, primal outputs and tangents.

    Args:
        case: a sample with at least one floating-point tensor.
        rtol: relative tolerance of the tangents.
        atol: absolute tolerance of the tangents.
        oracle: "jvp" for torch.func.jvp, or for reverse mode where torch has none; "difference"
            where torch's own derivative is wrong; "reverse" for reverse mode alone.
    """
    dots = directions(case)
    tangents = {f"xs.{i}": dot for i, dot in dots.items()}
    outs, out_dots = seeded(
        lambda: fwdcompile.transform(case.function)(*case.tensors, tangents=tangents)
    )
    expected = seeded(lambda: case.reference(*case.tensors))
    torch.testing.assert_close(
        outs, expected, rtol=1e-9 if rtol < 1e-6 else rtol, atol=atol, equal_nan=True
    )
    pairs = [(x, d) for x, d in zip(outs, out_dots, strict=True) if is_differentiable(x)]
    theirs = _torch_jvp(case, dots) if oracle == "jvp" else None
    if theirs is not None:
        _assert_close([d for _, d in pairs], theirs, rtol, atol)
        return
    if oracle != "difference":
        _check_reverse(case, dots, [d for _, d in pairs], rtol, atol)
    if oracle == "difference" or (rtol < 1e-6 and oracle == "jvp"):
        mine, loose = [d for _, d in pairs], (max(rtol, 1e-5), max(atol, 1e-5))
        try:
            _assert_close(mine, _differences(case, dots, 1e-6), *loose)
        except AssertionError:  # singular values that are as near as 1e-5 turn within that step
            _assert_close(mine, _differences(case, dots, 1e-7), *loose)


def check_second(case: Case, rtol: float, atol: float) -> None:
    """Compares the sum of second derivatives with transforms of a transform, or both refuse.

    Those are checked as first derivatives of first derivatives, by `gradient` and by the rules.
    """
    ways = [{f"xs.{i}": dot for i, dot in directions(case, seed).items()} for seed in range(1, 3)]
    twice = fwdcompile.transform(fwdcompile.transform(case.function))
    try:
        each = [seeded(lambda way=way: twice(*case.tensors, tangents=way)) for way in ways]
    except fwdcompile.FwdcompileError as error:
        with pytest.raises(type(error)):
            fwdcompile.laplacian(case.function)(*case.tensors, tangents=ways)
        return
    found = seeded(lambda: fwdcompile.laplacian(case.function)(*case.tensors, tangents=ways))
    y, y_dots = each[0][0][0], tuple(dots for (_, dots), _ in each)
    seconds = [ddots for _, (_, ddots) in each]
    y_ddot = tuple(a if a is None else a + b for a, b in zip(*seconds, strict=True))
    torch.testing.assert_close(found, (y, y_dots, y_ddot), rtol=rtol, atol=atol, equal_nan=True)


def check_batched(case: Case, rtol: float, atol: float) -> None:
    """Compares derivatives along a batch of directions with those along one after another."""
    ways = [{f"xs.{i}": dot for i, dot in directions(case, seed).items()} for seed in range(1, 4)]
    both = [{name: torch.stack([way[name] for way in ways]) for name in ways[0]}]
    for maker in (fwdcompile.transform, fwdcompile.laplacian):
        try:
            one_by_one = maker(case.function)
            y, y_dots, *sums = seeded(lambda made=one_by_one: made(*case.tensors, tangents=ways))
        except fwdcompile.FwdcompileError as error:
            with pytest.raises(type(error)):
                maker(case.function, batched=True)(*case.tensors, tangents=both)
            continue
        together = maker(case.function, batched=True)
        found = seeded(lambda made=together: made(*case.tensors, tangents=both))
        each = zip(*y_dots, strict=True)
        stacked = tuple(None if d[0] is None else torch.stack(d) for d in each)
        expected = (y, (stacked,), *sums)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


def _assert_close(mine: list[Tensor], theirs: list[Tensor], rtol: float, atol: float) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def seeded(function: Callable[[], Any]) -> Any:
    """What the function returns, always with the same random numbers."""
    torch.manual_seed(42)  # as the entries do that seed inside, which capture does not see
    return function()


def _random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, generator=generator)


def filled(case: Case, dots: Iterable[int], xs: Iterable[Tensor]) -> list[Tensor]:
    """The tensors of a case with those of the numbers `dots` replaced by `xs`."""
    changed = dict(zip(dots, xs, strict=True))
    return [changed.get(i, x) for i, x in enumerate(case.tensors)]


def along(case: Case, dots: dict[int, Tensor]) -> Callable[..., Outputs]:
    """The reference as a function of its active tensors, restricted to differentiable outputs."""

    def function(*xs: Tensor) -> Outputs:
        outs = case.reference(*filled(case, dots, xs))
        return tuple(x for x in outs if is_differentiable(x))

    return function


def _torch_jvp(case: Case, dots: dict[int, Tensor]) -> list[Tensor] | None:
    primals = tuple(case.tensors[i] for i in dots)
    try:
        return seeded(
            lambda: list(torch.func.jvp(along(case, dots), primals, tuple(dots.values()))[1])
        )
    except (NotImplementedError, RuntimeError):
        return None


def _check_reverse(
    case: Case, dots: dict[int, Tensor], mine: list[Tensor], rtol: float, atol: float
) -> None:
    """u'(Jv) against (J'u)'v, for one random u."""
    primals = [case.tensors[i].detach().requires_grad_() for i in dots]
    try:
        outs = seeded(lambda: along(case, dots)(*primals))
    except RuntimeError as error:
        if "not differentiable with respect to" not in str(error):
            raise
        return  # torch has no derivative of either mode: differences are the oracle
    generator = torch.Generator().manual_seed(3)
    u = [_random_like(x, generator) for x in outs]
    pairs = [(x, w) for x, w in zip(outs, u, strict=True) if x.requires_grad]
    if not pairs:
        assert all(not d.any() for d in mine)
        return
    reached, weights = zip(*pairs, strict=True)
    grads = torch.autograd.grad(reached, primals, weights, allow_unused=True)
    given = [(g, d) for g, d in zip(grads, dots.values(), strict=True) if g is not None]
    theirs = [_inner(g, d) for g, d in given]
    mixed = zip(outs, u, mine, strict=True)
    ours = sum(_inner(w, d) for x, w, d in mixed if x.requires_grad)
    # the terms of the sum may cancel, their errors do not
    atol += rtol * float(sum((g * d).abs().sum() for g, d in given))
    torch.testing.assert_close(ours, sum(theirs), rtol=rtol, atol=atol, equal_nan=True)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The real inner product, which torch's convention for complex gradients goes with."""
    return (a.conj() * b).sum().real


def _differences(case: Case, dots: dict[int, Tensor], step: float) -> list[Tensor]:
    def at(sign: int) -> Outputs:
        moved = [case.tensors[i] + sign * step * d for i, d in dots.items()]
        return seeded(lambda: along(case, dots)(*moved))

    return [(a - b) / (2 * step) for a, b in zip(at(1), at(-1), strict=True)]
