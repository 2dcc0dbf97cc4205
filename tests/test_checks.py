from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import Case, compare
from torch import Tensor, nn
from torch.distributions import (
    Beta,
    Categorical,
    Dirichlet,
    Distribution,
    Gamma,
    LogNormal,
    MultivariateNormal,
    Normal,
    StudentT,
    kl_divergence,
)

import fwdcompile


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


X = torch.linspace(-1.5, 1.7, 12, dtype=torch.float64).view(4, 3)

DISTRIBUTED: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: Normal(x, x.exp()).rsample(),
    "gamma": lambda x: Gamma(x.exp(), 2 * x.exp()).rsample((2,)) ** 2,
    "gamma near zero": lambda x: Gamma(x * 0 + 1e-3, x.exp()).rsample((50,)).log(),
    "beta": lambda x: Beta(x.exp(), 2 * x.exp()).rsample() ** 2,
    "dirichlet": lambda x: Dirichlet(x.exp()).rsample() ** 2,
    "student": lambda x: StudentT(x.exp() + 1).rsample(),
    "log-normal": lambda x: LogNormal(x, 0.5).rsample(),
    "multivariate": lambda x: MultivariateNormal(x, torch.eye(3, dtype=x.dtype)).rsample(),
    "categorical": lambda x: Categorical(logits=x).log_prob(torch.tensor([0, 1, 2, 1])),
    "divergence": lambda x: kl_divergence(Normal(x, x.exp()), Normal(0.0, 1.0)),
}


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_distributions_are_made_inside_a_model(name: str) -> None:
    checked = Distribution._validate_args
    found = compare(Case.of(Lambda(DISTRIBUTED[name]), (X,)))
    assert found.is_right(torch.float64), found
    assert Distribution._validate_args is checked


def test_a_distribution_that_is_told_to_check_is_refused() -> None:
    with pytest.raises(fwdcompile.CaptureError, match="decides in Python"):
        fwdcompile.jvp(lambda x: Normal(x, x.exp(), validate_args=True).rsample(), (X,), (X,))
