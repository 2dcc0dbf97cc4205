"""The whole operator database of torch: what the generated programs compute for its samples."""

from __future__ import annotations

from typing import Any

import opinfo
import pytest
import torch
from opinfo import DIFFERENCE, REFUSED, REVERSE, TOLERANCES

import fwdcompile

# some samples call what torch has deprecated, or has in beta
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ENTRIES = opinfo.entries()
SOME, ALL = 1, None
DTYPES = {torch.float32: (2e-4, 2e-4), torch.bfloat16: (6e-2, 6e-2), torch.complex128: (1e-8, 1e-8)}


def _oracle(name: str) -> str:
    return "difference" if name in DIFFERENCE else "reverse" if name in REVERSE else "jvp"


def _check(name: str, limit: int | None, variant: str = "") -> int:
    """Checks samples; returns how many are refused, with the words that `REFUSED` promises."""
    refused = 0
    for case in opinfo.cases(ENTRIES[name], variant=variant, limit=limit):
        try:
            if case.active:
                opinfo.check(case, *TOLERANCES.get(name, (1e-8, 1e-8)), _oracle(name))
        except fwdcompile.FwdcompileError as error:
            if REFUSED.get(name, "no such entry") not in str(error):
                raise
            refused += 1
    return refused


@pytest.mark.parametrize("name", ENTRIES)
def test_samples(name: str) -> None:
    _check(name, SOME)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
def test_all_samples(name: str) -> None:
    assert bool(_check(name, ALL)) == (name in REFUSED)


def _some(count: int) -> list[Any]:
    """All entries, of which one in `count` is part of the default tests."""
    slow = pytest.mark.slow
    return [pytest.param(n, marks=slow if i % count else ()) for i, n in enumerate(ENTRIES)]


# Entries whose gradient torch has no derivative of, or a wrong one.
GRADIENT_DIFFERENCE = {
    "cdist",
    "cholesky_inverse",
    "logcumsumexp",
    "nn_functional_hardsigmoid",
    "nn_functional_multi_margin_loss",
    "nn_functional_multilabel_margin_loss",
    "nn_functional_pdist",
    "triangular_solve",
}
# Entries whose gradient is refused, and words of the reason.
GRADIENT_REFUSED = {
    **dict.fromkeys(
        (
            "_batch_norm_with_update",
            "linalg_pinv",
            "native_batch_norm",
            "nn_functional_instance_norm",
            "nn_functional_linear_cross_entropy_chunked",
            "nn_functional_soft_margin_loss",
        ),
        "is not differentiable with respect to argument",  # by torch
    ),
    **dict.fromkeys(
        (
            "_segment_reduce_lengths",
            "_segment_reduce_offsets",
            "grid_sampler_2d",
            "grid_sampler_3d",
            "nn_functional_embedding_bag",
            "nn_functional_grid_sample",
            "nn_functional_rrelu",
        ),
        "_backward.default, node .* no row",
    ),
    **dict.fromkeys(
        ("index_reduce_prod", "scatter_reduce_prod", "tensor_split"), "by the value of a tensor"
    ),
    "nextafter": "no row",
    "nn_functional_ctc_loss": "second derivative of ctc_loss is not known",
    "nn_functional_linear_cross_entropy_chunked_none": "autograd.Function with functorch",
    "sparse_mm_reduce": "use x.to_dense",
    "sparse_sampled_addmm": "use x.to_dense",
    "to_sparse": "keep the tensor dense",
}


@pytest.mark.parametrize("name", _some(8))
def test_gradients(name: str) -> None:
    oracle = "difference" if name in GRADIENT_DIFFERENCE else "jvp"
    for case in opinfo.cases(ENTRIES[name], limit=SOME):
        # the start of narrow is a tensor, which torch.func.grad wraps
        if not case.active or name == "narrow":
            continue
        if name not in GRADIENT_REFUSED:
            opinfo.check(opinfo.gradient(case), *TOLERANCES.get(name, (1e-7, 1e-7)), oracle)
            continue
        with pytest.raises(fwdcompile.FwdcompileError, match=GRADIENT_REFUSED[name]):
            opinfo.check(opinfo.gradient(case), 1e-7, 1e-7)


@pytest.mark.parametrize("name", _some(4))
def test_sums_of_second_derivatives(name: str) -> None:
    for case in opinfo.cases(ENTRIES[name], limit=SOME):
        if case.active:
            opinfo.check_second(case, *TOLERANCES.get(name, (1e-7, 1e-8)))


@pytest.mark.parametrize("name", _some(4))
def test_batches_of_directions(name: str) -> None:
    for case in opinfo.cases(ENTRIES[name], limit=SOME):
        if case.active:
            opinfo.check_batched(case, *TOLERANCES.get(name, (1e-8, 1e-9)))


# Entries without a check of variants, and why.
NO_VARIANTS = {
    **dict.fromkeys(
        (n for n in ENTRIES if n.startswith("polygamma")), "torch.export refuses polygamma_"
    ),
    **dict.fromkeys(
        ("masked_select", "linalg_lstsq"), "torch knows no shapes for the out= variant"
    ),
    "fft_ihfftn": "torch's out= variant gives other numbers, run by torch",
    **dict.fromkeys(
        ("native_batch_norm", "_batch_norm_with_update"), "torch's schemas for out= do not agree"
    ),
}
# Entries that torch differentiates to another dtype than that of the output.
OTHER_DTYPE = {"frexp", "renorm"}


@pytest.mark.parametrize("variant", ["inplace", "out"])
@pytest.mark.parametrize("name", _some(8))
def test_variants(name: str, variant: str) -> None:
    if name not in NO_VARIANTS:
        _check(name, 1, variant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", _some(8))
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    entry = ENTRIES[name]
    wide = dtype is torch.complex128
    if name in REFUSED or dtype not in entry.supported_backward_dtypes("cpu"):
        return
    if (name in DIFFERENCE and not wide) or name in OTHER_DTYPE:
        return  # torch is no oracle, and a difference of short numbers says nothing
    for case in opinfo.cases(entry, dtype, limit=1):
        opinfo.check(case, *DTYPES[dtype], _oracle(name))
