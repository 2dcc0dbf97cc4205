"""Parameters and buffers of a subclass of Tensor, such as quantized weights, beside plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

import fwdcompile

aten = torch.ops.aten


class Quantized(Tensor):
    """A matrix kept as int8 and a scale of each row; ops run on the matrix they stand for."""

    steps: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, steps: Tensor, scale: Tensor) -> Quantized:
        made: Quantized = Tensor._make_wrapper_subclass(cls, steps.shape, dtype=scale.dtype)
        made.steps, made.scale = steps, scale
        return made

    @classmethod
    def of(cls, x: Tensor) -> Quantized:
        scale = x.abs().amax(1, keepdim=True) / 127
        return cls((x / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["steps", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Quantized:
        return cls(inner["steps"], inner["scale"])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Quantized({list(self.shape)})"  # torch's own runs ops, where torch logs a capture

    def plain(self) -> Tensor:
        return self.steps * self.scale

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in (aten.detach.default, aten.alias.default):
            return cls(op(args[0].steps), op(args[0].scale))
        args, kwargs = tree_map_only(cls, cls.plain, (args, kwargs or {}))
        return op(*args, **kwargs)


class Adapted(nn.Module):
    """A quantized layer, tied to another one, with an adapter; a buffer is quantized, too."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.twin = nn.Linear(4, 4).double(), nn.Linear(4, 4, bias=False)
        self.base.weight = self.twin.weight = self.quantized()
        self.base.bias.requires_grad_(False)
        self.shift = nn.Buffer(Quantized.of(torch.randn(3, 4, dtype=torch.float64)))
        self.down = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(4, 2, dtype=torch.float64))

    @staticmethod
    def quantized() -> nn.Parameter:
        return nn.Parameter(Quantized.of(torch.randn(4, 4, dtype=torch.float64)), False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x) + F.linear(F.linear(x, self.down), self.up)
        return self.twin(y.tanh()) + self.shift * x


class Plain(nn.Module):
    """The same with plain tensors."""

    def __init__(self, model: Adapted) -> None:
        super().__init__()
        self.down, self.up = (nn.Parameter(p.detach().clone()) for p in (model.down, model.up))
        self.weight, self.shift = model.base.weight.plain(), model.shift.plain()  # type: ignore
        self.bias = model.base.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up)
        return F.linear(y.tanh(), self.weight) + self.shift * x


X, V = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def expected(model: Adapted, dots: dict[str, Tensor]) -> Any:
    twin = Plain(model)
    names = [name for name in dots if name != "x"]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        y: Tensor = torch.func.functional_call(twin, state, (x,))
        return y

    primals = [X, *(getattr(twin, name).detach() for name in names)]
    return torch.func.jvp(function, tuple(primals), tuple(dots[n] for n in ("x", *names)))


def test_adapters_and_inputs_have_tangents(tmp_path: Path) -> None:
    model = Adapted()
    dots = {"x": V, "down": model.down.detach().cos(), "up": model.up.detach().sin()}
    fwd = fwdcompile.transform(model)
    torch.testing.assert_close(fwd(X, tangents=dots), expected(model, dots))
    names = [slot.name for slot in fwd.program.inputs if slot.kind in ("parameter", "buffer")]
    assert {"base.weight.steps", "base.weight.scale", "shift.steps", "shift.scale"} < {*names}
    assert not any(name.startswith("twin") for name in names)  # they are tied
    assert isinstance(model.base.weight, Quantized)
    fwd.save(tmp_path / "adapted.py")
    loaded = fwdcompile.load(tmp_path / "adapted.py", model)
    torch.testing.assert_close(loaded(X, tangents=dots), expected(model, dots))


def test_weights_are_looked_up_anew() -> None:
    model = Adapted()
    fwd = fwdcompile.transform(model)
    fgd = fwdcompile.FGD(model, F.mse_loss, lr=1e-12, compile=False)
    for count in (1, 2, 2):
        torch.testing.assert_close(fwd(X, tangents={"x": V}), expected(model, {"x": V}))
        torch.testing.assert_close(fgd.step(X, V), F.mse_loss(Plain(model)(X), V))
        assert len(fwd._cache) == len(fgd._plans) == count
        if count == 1:  # untied
            model.twin.weight = nn.Parameter(Quantized.of(model.base.weight.plain()), False)  # type: ignore
        model.base.weight.steps = model.base.weight.steps.clone()  # type: ignore[method-assign]


@pytest.mark.parametrize("compile", [False, True])
def test_adapters_learn_by_forward_gradients(compile: bool) -> None:
    model = Adapted()
    signs = fwdcompile.Rademacher()
    grad = fwdcompile.ForwardGradient(model, F.mse_loss, directions=signs, compile=compile)
    fgd = fwdcompile.FGD(model, F.mse_loss, lr=0.01, directions=signs, samples=4, compile=compile)
    first = grad(X, V)
    torch.testing.assert_close(first, F.mse_loss(Plain(model)(X), V))
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"down", "up"}
    losses = [fgd.step(X, V) for _ in range(60)]
    assert losses[-1] < 0.95 * losses[0]


def test_what_has_no_tangent_is_refused() -> None:
    model = Adapted()
    fwd = fwdcompile.transform(model)
    message = "'base.weight' is a Quantized, which has no tangent; .* base.weight.scale"
    with pytest.raises(fwdcompile.TangentError, match=message):
        fwd(X, tangents={"base.weight": torch.ones(4, 4, dtype=torch.float64)})
    with pytest.raises(fwdcompile.TangentError, match="'x' is a Quantized: give a plain"):
        fwd(Quantized.of(X), tangents={"up": model.up.detach()})
    with pytest.raises(fwdcompile.CaptureError, match="returns a tensor of a subclass"):
        fwdcompile.transform(lambda x: (2 * x, model.shift))(X, tangents={"x": V})
    scale = model.base.weight.scale  # type: ignore[union-attr]
    _, y_dot = fwd(X, tangents={"base.weight.scale": scale})
    assert bool(y_dot.any())


def test_a_trained_weight_of_a_subclass_is_refused() -> None:
    model = Adapted()
    model.base.weight.requires_grad_()
    with pytest.raises(fwdcompile.TangentError, match="'base.weight' is a Quantized"):
        fwdcompile.FGD(model, F.mse_loss, lr=0.1, compile=False).step(X, V)
