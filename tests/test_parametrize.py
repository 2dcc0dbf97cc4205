"""Models whose weights are computed: parametrizations, and modules called with given weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import directions
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations

import fwdcompile

F = torch.nn.functional
pytestmark = [  # of the hooks that came before parametrizations
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attribute .* was assigned during export"),
]
BUILDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm_hook": utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm_hook": utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.fixture
def build(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    name, training = request.param

    def make() -> nn.Module:
        torch.manual_seed(0)
        return BUILDERS[name](nn.Linear(3, 3).double()).train(training)

    return make


CASES = [(name, training) for name in BUILDERS for training in (True, False)]


@pytest.mark.parametrize("build", CASES, indirect=True, ids=str)
def test_the_derivative_is_that_of_what_the_module_computes(
    build: Callable[[], nn.Module],
) -> None:
    """Torch's own forward mode refuses weight_norm, and spectral_norm in training mode."""
    model, x = build(), torch.randn(5, 3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    dots = directions(parameters)

    def at(step: float) -> tuple[Tensor, dict[str, Tensor]]:
        fresh = build()
        moved = {name: p + step * dots[name] for name, p in parameters.items()}
        return torch.func.functional_call(fresh, moved, (x,)), dict(fresh.named_buffers())

    y, y_dot = fwdcompile.transform(model)(x, tangents=dots)
    expected, buffers = at(0.0)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dict(model.named_buffers()), buffers)
    numeric = (at(1e-6)[0] - at(-1e-6)[0]) / 2e-6
    torch.testing.assert_close(y_dot, numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["spectral_norm", "spectral_norm_hook", "orthogonal"])
def test_where_torch_has_the_derivative_it_is_the_same(name: str) -> None:
    model = BUILDERS[name](nn.Linear(3, 3).double()).eval()
    x, parameters = torch.randn(5, 3).double(), dict(model.named_parameters())
    parameters = {name: p.detach() for name, p in parameters.items()}
    dots = directions(parameters)

    def call(p: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(model, p, (x,))

    expected = torch.func.jvp(call, (parameters,), (dots,))
    torch.testing.assert_close(fwdcompile.transform(model)(x, tangents=dots), expected)


def test_no_grad_in_a_power_iteration_stops_no_tangent() -> None:
    """As in torch.func.jvp; reverse mode takes u and v for constants there."""
    torch.manual_seed(0)
    model = utils.spectral_norm(nn.Linear(3, 3).double(), n_power_iterations=1)
    x, u = torch.randn(5, 3).double(), model.weight_u.clone()
    weight, bias = model.weight_orig.detach(), model.bias.detach()
    w_dot = torch.randn(3, 3).double()

    def plain(w: Tensor) -> Tensor:
        with torch.no_grad():
            v = F.normalize(w.t() @ u, dim=0)
            new_u = F.normalize(w @ v, dim=0)
        return F.linear(x, w / (new_u @ w @ v), bias)

    expected = torch.func.jvp(plain, (weight,), (w_dot,))
    torch.testing.assert_close(
        fwdcompile.transform(model)(x, tangents={"weight_orig": w_dot}), expected
    )


def test_a_module_called_with_given_weights() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)

    def stateless(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x,))

    weights = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    primals, tangents = (weights, x), (directions(weights), torch.randn(5, 3))
    expected = torch.func.jvp(stateless, primals, tangents)
    torch.testing.assert_close(fwdcompile.jvp(stateless, primals, tangents), expected)


def test_some_weights_are_given_and_others_are_the_modules_own() -> None:
    model, x = parametrizations.orthogonal(nn.Linear(3, 3).double()), torch.randn(5, 3).double()
    name = "parametrizations.weight.original"
    original = dict(model.named_parameters())[name].detach()

    def stateless(w: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: w}, (x,))

    w, w_dot, bias_dot = original + 1, torch.randn(3, 3).double(), torch.randn(3).double()
    fwd = fwdcompile.transform(stateless)
    _, y_dot = fwd(w, x, tangents={"w": w_dot, "model.bias": bias_dot})
    _, expected = torch.func.jvp(lambda w: stateless(w, x), (w,), (w_dot,))
    torch.testing.assert_close(y_dot, expected + bias_dot)
