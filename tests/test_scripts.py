"""TorchScript in a model: the program of a script is that of the module it was made of."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from oracle import Case, compare
from torch import Tensor, nn
from torch.nn import functional as F

import fwdcompile


class Part(nn.Module):
    """What TorchScript has and tracing has not: a loop, a branch, attributes, further methods."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(1))
        self.factor, self.count = 2.0, 0

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        self.count += 1
        self.calls = self.calls + 1
        for _ in range(times):
            x = torch.tanh(self.linear(x)) * self.factor
        if x.shape[0] > 2:
            x = x * x
        return self.norm(x) + self.calls

    @torch.jit.export
    def wave(self, x: Tensor) -> Tensor:
        return self.linear(x).sin()


class Around(nn.Module):
    """Plain Python round a part that may be a script."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first, self.part = nn.Linear(3, 3), part

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(self.first(x), times=1) + self.part(x)
        return self.part.wave(x) * self.part.factor


def part() -> Part:
    torch.manual_seed(0)
    return Part().double()


def loaded(script: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    return torch.jit.load(file)


def points() -> Tensor:
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def around(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(2)
    return Around(change(part())).double()


def nested() -> nn.Module:
    return nn.Sequential(part().linear, nn.Sequential(nn.Tanh(), part().linear))


def optimised(module: nn.Module) -> nn.Module:
    """A script that TorchScript has made a derivative of."""
    script = torch.jit.script(module)
    for _ in range(4):
        script.wave(script(points().requires_grad_())).sum().backward()
    script.zero_grad()
    script.load_state_dict(part().state_dict())
    return script


SCRIPTS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "script": lambda: (torch.jit.script(part()), part()),
    "loaded": lambda: (loaded(torch.jit.script(part())), part()),
    "within": lambda: (around(torch.jit.script), around(lambda module: module)),
    "optimised": lambda: (around(optimised), around(lambda module: module)),
    "traced": lambda: (torch.jit.trace(nested(), points()), nested()),
    "nested": lambda: (torch.jit.script(nested()), nested()),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_the_tangents_of_its_module(name: str, training: bool) -> None:
    script, module = (model.train(training) for model in SCRIPTS[name]())
    case = Case.of(script, (points(),))
    for _ in range(2):  # a script may be optimised after its first calls
        expected, found = (
            fwdcompile.transform(model)(*case.args, tangents=case.dots)
            for model in (module, script)
        )
        assert torch.allclose(found[0], expected[0], rtol=1e-12)
        assert torch.allclose(found[1], expected[1], rtol=1e-12)
    assert compare(case).is_right(torch.float64)


def test_a_script_in_two_places_is_one() -> None:
    script = torch.jit.script(part().linear)
    compared = compare(Case.of(nn.Sequential(script, nn.Tanh(), script), (points(),)))
    assert compared.is_right(torch.float64)
    assert [s.name for s in compared.lowered.program.inputs if s.kind == "parameter"] == [
        "0.weight",
        "0.bias",
    ]


def test_capture_leaves_a_script_as_it_was() -> None:
    model = Around(torch.jit.script(part())).double()
    weight, methods = model.part.linear.weight, dict(vars(model.part))
    fwdcompile.transform(model).lower(points(), tangents=["x"])
    assert model.part.linear.weight is weight
    assert dict(vars(model.part)) == methods
    assert model.part.count == 0
    assert model.part.calls == 0
    model(points())
    assert model.part.count == 2


def test_functions_may_call_scripts() -> None:
    script = torch.jit.script(part().linear)
    dot = torch.ones(3, 3).double()
    _, y_dot = fwdcompile.transform(lambda x: script(x))(points(), tangents={"script.weight": dot})
    assert torch.equal(y_dot, F.linear(points(), dot))


@torch.jit.script
def bent(x: Tensor, times: int = 3) -> Tensor:
    for _ in range(times):
        x = x.sin()
    return x


def test_scripted_functions() -> None:
    expected = torch.func.jvp(lambda x: x.sin().sin().sin(), (points(),), (points(),))
    for function in (bent, lambda x: bent(x)):
        found = fwdcompile.transform(function)(points(), tangents={"x": points()})
        assert torch.allclose(found[1], expected[1])


def test_a_frozen_script_has_constants_for_parameters() -> None:
    frozen = torch.jit.freeze(torch.jit.script(part().linear.eval()))
    _, y_dot = fwdcompile.transform(frozen)(points(), tangents={"input": points()})
    assert torch.allclose(y_dot, F.linear(points(), part().linear.weight))


def test_fgd_trains_scripts() -> None:
    models = [around(torch.jit.script), around(lambda module: module)]
    runs = [fwdcompile.FGD(model, F.mse_loss, lr=1e-2, compile=False) for model in models]
    for _ in range(3):
        losses = [fgd.step(points(), points().sin()) for fgd in runs]
        assert torch.allclose(*losses, rtol=1e-12)
    assert models[0].part.calls == models[1].part.calls == 6
    for x, y in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-12)


class Keeping(nn.Module):
    """Keeps a tensor from call to call."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        if buffer:
            self.register_buffer("last", torch.zeros(3))
        else:
            self.last = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) + self.last
        self.last = y.mean(0)
        return y


@pytest.mark.parametrize(("within", "x"), [(False, "x"), (True, "input")])
def test_tensors_that_a_script_keeps_are_buffers(within: bool, x: str) -> None:
    def made(buffer: bool) -> nn.Module:
        script = torch.jit.script(Keeping(buffer))
        return nn.Sequential(script).double() if within else script.double()

    assert compare(Case.of(made(buffer=True), (points(),))).is_right(torch.float64)
    with pytest.raises(fwdcompile.CaptureError, match="reads its attribute 'last' and changes"):
        fwdcompile.transform(made(buffer=False)).lower(points(), tangents=[x])


class Listing(nn.Module):
    """Keeps tensors in a list and a dict, which it changes if it is told to."""

    def __init__(self, changes: str) -> None:
        super().__init__()
        self.rows, self.named, self.changes = [torch.ones(3)], {"a": torch.ones(3)}, changes

    def forward(self, x: Tensor) -> Tensor:
        if self.changes == "rows":
            self.rows.append(x)
        if self.changes == "named":
            self.named["a"] = x
        return x.sin() * self.rows[0] * self.named["a"]


@pytest.mark.parametrize("changes", ["nothing", "rows", "named"])
def test_lists_that_a_script_changes_are_refused_and_left(changes: str) -> None:
    script = torch.jit.script(Listing(changes))
    x = points().float()
    if changes == "nothing":
        found = fwdcompile.transform(script)(x, tangents={"x": x})
        torch.testing.assert_close(found, (x.sin(), x * x.cos()))
        return
    with pytest.raises(fwdcompile.CaptureError, match=f"reads its attribute '{changes}' and chang"):
        fwdcompile.transform(script).lower(x, tangents=["x"])
    assert len(script.rows) == 1
    assert torch.equal(script.named["a"], torch.ones(3))


def tripled(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
    return out * 3


def test_hooks_of_a_script_are_kept_within_one_and_refused_outside() -> None:
    linear = part().linear
    linear.register_forward_hook(tripled)
    for script in (torch.jit.script(linear), nn.Sequential(torch.jit.script(linear))):
        with pytest.raises(fwdcompile.CaptureError, match="script of Linear has hooks"):
            fwdcompile.transform(script).lower(points(), tangents=["input"])
    whole = torch.jit.script(nn.Sequential(linear))
    found = fwdcompile.transform(whole)(points(), tangents={"input": points()})
    torch.testing.assert_close(found[0], 3 * F.linear(points(), linear.weight, linear.bias))
    torch.testing.assert_close(found[1], 3 * F.linear(points(), linear.weight))


def test_arguments_that_a_script_does_not_have_are_named() -> None:
    script = torch.jit.script(part())
    with pytest.raises(fwdcompile.CaptureError, match="forward has no arguments often"):
        fwdcompile.transform(lambda x: script(x, often=2))(points(), tangents={"x": points()})
