"""Arguments for the rows that no entry of torch's operator database reaches.

Most stand in the lists of the test files beside this one, as (op, args) or (op, args, kwargs), and
are checked there. `OTHERS` has those of rows whose tests are functions of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

aten = torch.ops.aten

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y = _t(3, 4), _t(3, 4, seed=2)

# A tangent of one entry alone is none of a symmetric matrix; test_factorization.py mirrors it.
SYMMETRIC = (aten.cholesky, aten.linalg_cholesky, aten.linalg_cholesky_ex, aten._linalg_eigh)

# Two sequences of three steps, over four letters.
CTC = (_t(3, 2, 4).log_softmax(-1), torch.tensor([[1, 2], [3, 1]]))
LENGTHS = ([3, 3], [2, 1])
LENGTH_TENSORS = (torch.tensor([3, 3]), torch.tensor([2, 1]))
CTC_OUT = (_t(2), _t(2, 3, 5))
LDL, PIVOTS = torch.linalg.ldl_factor(X @ X.T)
GROUPED, EXPERTS = _t(8, 8).bfloat16(), _t(2, 8, 8).bfloat16()

OTHERS: list[tuple[Any, ...]] = [
    (aten.gelu_backward.default, (X, Y)),
    (aten.detach.default, (X,)),
    (aten.detach_copy.default, (X,)),
    (torch.ops.prims.convert_element_type.default, (X, torch.float32)),
    (aten.new_empty_strided.default, (X, [3, 4], [4, 1])),
    (aten.as_strided.default, (X, [2, 2], [1, 1])),
    (aten.as_strided_copy.default, (X, [2, 2], [1, 1])),
    (aten.as_strided_scatter.default, (X, Y[:2, :2], [2, 2], [1, 2])),
    (aten.masked_select.default, (X, X > 0)),
    (aten.geqrf.default, (X,)),
    (aten._grouped_mm.default, (GROUPED, EXPERTS, torch.tensor([2, 8], dtype=torch.int32))),
    (aten._sample_dirichlet.default, (X.exp(),)),
    (aten.linalg_eig.default, (X[:, :3],)),
    (aten.linalg_lstsq.default, (X.T, Y.T)),
    (aten.linalg_ldl_factor.default, (X @ X.T,)),
    (aten.linalg_ldl_factor_ex.default, (X @ X.T,)),
    (aten.linalg_ldl_solve.default, (LDL, PIVOTS, Y)),
    (aten._ctc_loss.default, (*CTC, *LENGTHS)),
    (aten._ctc_loss.Tensor, (*CTC, *LENGTH_TENSORS)),
    (aten._ctc_loss_backward.default, (CTC_OUT[0], *CTC, *LENGTHS, *CTC_OUT, 0)),
    (aten._ctc_loss_backward.Tensor, (CTC_OUT[0], *CTC, *LENGTH_TENSORS, *CTC_OUT, 0)),
    (aten.view.dtype, (X, torch.int64)),
    (aten.view_copy.dtype, (X, torch.int64)),
    (aten.remainder.Scalar_Tensor, (2.3, X)),
    (aten._neg_view.default, (X,)),
    (aten._standard_gamma.default, (X.exp(),)),
    (aten.rrelu_with_noise_functional.default, (X, X, 0.1, 0.4, True)),
    (aten.hardshrink.default, (X,)),
    (aten.softshrink.default, (X,)),
    (aten.igamma.default, (X.exp(), Y.exp())),
    (aten.igammac.default, (X.exp(), Y.exp())),
    (aten.special_zeta.default, (X.exp() + 1, Y.exp())),
    *((op.default, (X @ X.T,)) for op in SYMMETRIC),
    (aten._embedding_bag.default, (X, torch.tensor([1, 0]), torch.tensor([0]))),
    (aten._embedding_bag_forward_only.default, (X, torch.tensor([1, 0]), torch.tensor([0]))),
]


def samples() -> dict[str, Arguments]:
    """The first sample of each op that the test files or `OTHERS` have one of."""
    found: dict[str, Arguments] = {}
    for op, args, *kwargs in [*_listed(), *OTHERS]:
        found.setdefault(str(op), (args, *kwargs) if kwargs else (args, {}))
    return found


def _listed() -> Iterator[tuple[Any, ...]]:
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.stem not in ("test_table", "test_opinfo"):
            for value in vars(importlib.import_module(path.stem)).values():
                if isinstance(value, list):
                    yield from (item for item in value if _is_sample(item))


def _is_sample(item: Any) -> bool:
    return (
        isinstance(item, tuple)
        and len(item) in (2, 3)
        and isinstance(item[0], OpOverload)
        and isinstance(item[1], tuple)
        and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(item[1]))
    )
