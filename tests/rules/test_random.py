"""Rows of rules/random.py: one mask for primal and tangent, and the model's own random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import check, jvp_by_rule
from torch import Tensor

import fwdcompile

aten = torch.ops.aten


def _t(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X = _t(2, 4, 5)
Q = _t(2, 2, 6, 4, seed=2)
SEEN = torch.ones(6, 6, dtype=torch.bool).tril()

# Each is linear in x once its random numbers are drawn.
LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout1d": lambda x: F.dropout1d(x, 0.5),
    "dropout2d": lambda x: F.dropout2d(x.unsqueeze(-1), 0.5),
    "rand": lambda x: x * torch.rand(5, dtype=x.dtype),
    "rand_like": lambda x: x * torch.rand_like(x),
    "randn_like": lambda x: x * torch.randn_like(x),
    "randint_like": lambda x: x * torch.randint_like(x, 7) * torch.randint_like(x, 2, 9),
    "bernoulli": lambda x: x * torch.bernoulli(torch.sigmoid(X)),
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(0.4),
    "exponential_": lambda x: x * torch.empty_like(x).exponential_(),
    "uniform_": lambda x: x * torch.empty_like(x).uniform_(-1, 2),
    "multinomial": lambda x: x[..., torch.multinomial(torch.ones(5), 3)],
}

# Samples, whose own distribution depends on x: torch gives no tangent to any of them.
SAMPLES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.bernoulli.default, (X.sigmoid(),), {}),
    (aten.bernoulli.p, (X, 0.3), {}),
    (aten.bernoulli.Tensor, (X, X.sigmoid()), {}),
    (aten.binomial.default, (X.abs().floor(), X.sigmoid()), {}),
    (aten.cauchy.default, (X,), {}),
    (aten.exponential.default, (X, 2.0), {}),
    (aten.geometric.default, (X, 0.3), {}),
    (aten.log_normal.default, (X,), {}),
    (aten.normal.Tensor_float, (X, 2.0), {}),
    (aten.normal.float_Tensor, (1.0, X.exp()), {}),
    (aten.normal.Tensor_Tensor, (X, X.exp()), {}),
    (aten.normal_functional.default, (X, 0.0, 1.0), {}),
    (aten.poisson.default, (X.exp(),), {}),
    (aten.rand_like.default, (X,), {}),
    (aten.randint_like.default, (X, 5), {}),
    (aten.randint_like.low_dtype, (X, 2, 5), {}),
    (aten.randn_like.default, (X,), {}),
    (aten.random.default, (X,), {}),
    (aten.random.to, (X, 5), {}),
    (aten.uniform.default, (X,), {}),
]


@pytest.mark.parametrize("name", LINEAR)
def test_tangent_uses_the_numbers_of_the_primal(name: str) -> None:
    function, x_dot = LINEAR[name], _t(*X.shape, seed=3)
    torch.manual_seed(5)
    reference, after = function(X), torch.rand(3)
    torch.manual_seed(5)
    out_of_dot = function(x_dot)
    torch.manual_seed(5)
    out, out_dot = fwdcompile.transform(function)(X, tangents={"x": x_dot})
    torch.testing.assert_close(torch.rand(3), after, rtol=0, atol=0)
    torch.testing.assert_close(out, reference, rtol=0, atol=0)
    torch.testing.assert_close(out_dot, out_of_dot, rtol=1e-12, atol=1e-12)
    assert out_dot.any()


@pytest.mark.parametrize("function", [F.alpha_dropout, F.feature_alpha_dropout])
def test_alpha_dropout(function: Callable[..., Tensor]) -> None:
    """An affine map of x: its tangent is the difference of two values under one seed."""

    def dropped(x: Tensor) -> Tensor:
        return function(x, 0.4, training=True)

    x_dot = _t(*X.shape, seed=3)
    values = []
    for point in (X, X + x_dot):
        torch.manual_seed(5)
        values.append(dropped(point))
    torch.manual_seed(5)
    out, out_dot = fwdcompile.transform(dropped)(X, tangents={"x": x_dot})
    torch.testing.assert_close(out, values[0], rtol=0, atol=0)
    torch.testing.assert_close(out_dot, values[1] - values[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("op", "args", "kwargs"), SAMPLES)
def test_samples_have_no_tangent(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tensors = [x for x in args if isinstance(x, Tensor)]
    torch.manual_seed(0)  # as `run` of check.py does
    reference = op(*args, **kwargs)
    (out,), (out_dot,) = jvp_by_rule(op, args, kwargs, dict(enumerate(tensors)))
    torch.testing.assert_close(out, reference, rtol=0, atol=0)
    assert out_dot is not None
    assert not out_dot.any()


@pytest.mark.parametrize(("p", "train"), [(0.3, False), (0.0, True), (1.0, True), (1.0, None)])
def test_native_dropout_without_chance(p: float, train: bool | None) -> None:
    check(aten.native_dropout.default, X, p, train)


def test_standard_gamma_is_pathwise() -> None:
    """E[z] = alpha, so the mean tangent of samples is that of alpha."""
    alpha = torch.full((20_000,), 2.5, dtype=torch.float64)
    torch.manual_seed(5)
    (out,), (out_dot,) = jvp_by_rule(
        aten._standard_gamma.default, (alpha,), {}, {0: torch.ones_like(alpha)}
    )
    assert out_dot is not None
    torch.testing.assert_close(out.mean(), alpha.mean(), rtol=0.02, atol=0)
    torch.testing.assert_close(out_dot.mean(), torch.ones((), dtype=out.dtype), rtol=0.02, atol=0)
    expected = torch._standard_gamma_grad(alpha, out)
    torch.testing.assert_close(out_dot, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": SEEN},
        {"attn_mask": torch.zeros(6, 6, dtype=torch.float64).masked_fill(~SEEN, -1.5)},
    ],
)
def test_attention_with_dropout(settings: dict[str, Any]) -> None:
    def attend(q: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, Q, v, dropout_p=0.4, **settings)

    v, q_dot, v_dot = _t(2, 2, 6, 3), _t(*Q.shape, seed=7), _t(2, 2, 6, 3, seed=8)
    torch.manual_seed(5)
    out, out_dot = fwdcompile.transform(attend)(Q, v, tangents={"q": q_dot, "v": v_dot})
    values = []
    for step in (0.0, 1e-6, -1e-6):
        torch.manual_seed(5)
        values.append(attend(Q + step * q_dot, v + step * v_dot))
    torch.testing.assert_close(out, values[0], rtol=1e-12, atol=1e-12)
    difference = (values[1] - values[2]) / 2e-6
    torch.testing.assert_close(out_dot, difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("training", [False, True])
def test_rrelu(training: bool) -> None:
    """Slope one where x is positive; elsewhere the drawn one, in evaluation the mean one."""
    x, x_dot = X.clone(), _t(*X.shape, seed=3)
    x[0, 0, 0] = 0.0
    torch.manual_seed(5)
    leaf = x.clone().requires_grad_()
    reference = F.rrelu(leaf, 0.1, 0.4, training)
    (slope,) = torch.autograd.grad(reference.sum(), leaf)
    torch.manual_seed(5)
    out, out_dot = fwdcompile.jvp(lambda x: F.rrelu(x, 0.1, 0.4, training), (x,), (x_dot,))
    torch.testing.assert_close(out, reference, rtol=0, atol=0)
    torch.testing.assert_close(out_dot, slope * x_dot, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    torch.manual_seed(5)
    (out, mask), (out_dot, mask_dot) = jvp_by_rule(
        aten.native_dropout.default, (x, 0.5, True), {}, {0: x}
    )
    assert out_dot is not None
    assert mask_dot is None
    assert out_dot.dtype == dtype
    assert mask.any() and not mask.all()
    torch.testing.assert_close(out_dot, out, rtol=0, atol=0)
