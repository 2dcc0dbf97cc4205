from __future__ import annotations

import pytest
import torch
from oracle import Case, compare
from torch import nn


@pytest.mark.parametrize(
    ("causal", "hint"), [(True, None), (True, True), (True, False), (False, None), (False, False)]
)
def test_a_mask_of_a_transformer_decides_whatever_it_is(causal: bool, hint: bool | None) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double()
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    found = compare(Case.of(model, (x, mask if causal else mask.mT), {"is_causal": hint}))
    assert found.is_right(torch.float64), found


@pytest.mark.parametrize("shape", [(5, 3), (5, 1), (5,)])
def test_the_variance_of_a_gaussian_loss(shape: tuple[int, ...]) -> None:
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)
    variance = torch.rand(shape, dtype=torch.float64)
    variance.view(-1)[0] = 0
    found = compare(Case.of(nn.GaussianNLLLoss(full=True), (x, y, variance)), ("jvp",))
    assert found.is_right(torch.float64), found


def test_the_checks_are_back_after_capture() -> None:
    test_the_variance_of_a_gaussian_loss((5, 3))
    x = torch.ones(2)
    with pytest.raises(ValueError, match="negative"):
        nn.functional.gaussian_nll_loss(x, x, -x)
