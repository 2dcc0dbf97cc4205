"""Jacobians against those by reverse mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import Mlp
from torch import Tensor, nn

import fwdcompile
from fwdcompile.errors import TangentError

F64 = torch.float64


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def pair(x: Tensor, y: Tensor) -> dict[str, Any]:
    return {"product": x[:, None] * y.exp(), "sums": (x.sum(), y.square().sum(0))}


def nested(inputs: dict[str, Tensor], scale: Tensor) -> Tensor:
    return inputs["a"].sin() * scale + inputs["b"].outer(inputs["a"]).sum()


X, Y = torch.randn(3, dtype=F64), torch.randn(3, 2, dtype=F64)
INPUTS = {"a": torch.randn(4, dtype=F64), "b": torch.randn(2, dtype=F64)}
SCALE = torch.tensor(2.0, dtype=F64)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize(
    ("function", "args", "argnums"),
    [
        (pair, (X, Y), 0),
        (pair, (X, Y), 1),
        (pair, (X, Y), -1),
        (pair, (X, Y), (0, 1)),
        (pair, (X, Y), (1, 0)),
        (nested, (INPUTS, SCALE), 0),
        (nested, (INPUTS, SCALE), 1),
        (nested, (INPUTS, SCALE), (1, 0)),
    ],
)
def test_it_is_that_by_reverse_mode(
    function: Any, args: Any, argnums: Any, chunk_size: int | None
) -> None:
    found = fwdcompile.jacfwd(function, argnums, chunk_size=chunk_size)(*args)
    close(found, torch.func.jacrev(function, argnums)(*args))  # torch's jacfwd is wrong for -1


def test_auxiliary_and_integer_outputs() -> None:
    def function(x: Tensor) -> Any:
        return (x.square(), x.argmax()), {"aux": x + 1}

    (square, winner), aux = fwdcompile.jacfwd(function, has_aux=True)(X)
    close(square, 2 * X.diag())
    assert winner is None
    close(aux, {"aux": X + 1})


def test_complex_inputs() -> None:
    z = torch.randn(3, dtype=torch.complex128)
    close(fwdcompile.jacfwd(torch.exp)(z), z.exp().diag())


def test_hessians() -> None:
    model, x = Mlp().double(), torch.randn(6, dtype=F64)

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    expected = torch.func.hessian(loss)(x)
    close(fwdcompile.jacfwd(torch.func.grad(loss))(x), expected)
    close(fwdcompile.jacfwd(fwdcompile.jacfwd(loss))(x), expected)


def test_autograd_goes_through_it() -> None:
    model, x = Mlp().double(), torch.randn(6, dtype=F64)
    parameters = dict(model.named_parameters())

    def square(jacobian: Tensor) -> list[Tensor]:
        weights = [p for name, p in parameters.items() if name != "fc2.bias"]
        return list(torch.autograd.grad(jacobian.square().sum(), weights))

    def with_graph(x: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(model, x, create_graph=True)

    close(square(fwdcompile.jacfwd(model)(x)), square(with_graph(x)))


def test_compiled() -> None:
    jacobian = fwdcompile.jacfwd(pair, (0, 1), compile=True)
    close(jacobian(X, Y), torch.func.jacfwd(pair, (0, 1))(X, Y))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk_size must be positive, not 0"):
        fwdcompile.jacfwd(pair, chunk_size=0)
    with pytest.raises(ValueError, match="an int or a tuple of ints"):
        fwdcompile.jacfwd(pair, [0, 1])  # type: ignore[arg-type]
    with pytest.raises(TangentError, match="name an argument twice"):
        fwdcompile.jacfwd(pair, (0, -2))(X, Y)
    with pytest.raises(TangentError, match="no positional argument 2 of 2"):
        fwdcompile.jacfwd(pair, 2)(X, Y)
    with pytest.raises(TangentError, match="'x' is no floating-point tensor"):
        fwdcompile.jacfwd(pair)(torch.arange(3), Y)
    for chunk_size in (None, 2):
        with pytest.raises(TangentError, match="no tangent given"):
            fwdcompile.jacfwd(lambda x: torch.ones(2), chunk_size=chunk_size)({})


def test_parameters_of_a_module_behind_it_move() -> None:
    model, x = Mlp().double(), torch.randn(6, dtype=F64)
    moved = torch.randn_like(model.fc1.weight)
    fwd = fwdcompile.transform(fwdcompile.jacfwd(model))
    jacobian, j_dot = fwd(x, tangents={"model.fc1.weight": moved})
    close(jacobian, torch.func.jacrev(model)(x))

    def along(step: Tensor) -> Tensor:
        weights = {"fc1.weight": model.fc1.weight + step * moved}
        return torch.func.jacrev(lambda x: torch.func.functional_call(model, weights, x))(x)

    zero, one = torch.zeros((), dtype=F64), torch.ones((), dtype=F64)
    close(j_dot, torch.func.jvp(along, (zero,), (one,))[1])


@pytest.mark.parametrize("layer", [nn.Dropout(), nn.BatchNorm1d(3)])
def test_chunks_of_what_changes_are_refused(layer: nn.Module) -> None:
    x, before = torch.randn(2, 3), {name: b.clone() for name, b in layer.named_buffers()}
    with pytest.raises(TangentError, match="for each chunk anew: leave chunk_size out"):
        fwdcompile.jacfwd(layer, chunk_size=4)(x)
    torch.testing.assert_close(dict(layer.named_buffers()), before)
    torch.manual_seed(0)
    found = fwdcompile.jacfwd(layer, chunk_size=6)(x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(layer, x))


def test_one_function_is_captured_once() -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(x)
        return x.sin()

    for _ in range(3):
        close(fwdcompile.jacfwd(function)(X), X.cos().diag())
    assert len(calls) == 1
