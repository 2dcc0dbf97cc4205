from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Block
from torch import nn
from torch.nn import functional as F

import fwdcompile
from fwdcompile import FGD, Rademacher
from fwdcompile.costs import best_form, calibrate
from fwdcompile.models import cnn, mlp
from fwdcompile.stack import forms, groups

F64 = torch.float64


@pytest.fixture
def costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache" / "costs.json"
    monkeypatch.setenv("FWDCOMPILE_COSTS", str(path))
    return path


def take(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fwdcompile.stack.best_form", lambda product: form)


def lowered(model: Any, *inputs: Any, **kwargs: Any) -> fwdcompile.Lowered:
    return fwdcompile.transform(model).lower(*inputs, **kwargs)


MODELS: dict[str, tuple[nn.Module, torch.Tensor]] = {
    "mlp": (mlp((1, 6, 6), 10), torch.randn(5, 1, 6, 6)),
    "cnn": (cnn((1, 8, 8), 10), torch.randn(2, 1, 8, 8)),
    "transformer": (Block(16, 2), torch.randn(2, 5, 16)),
    "conv1d": (nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 2)), torch.randn(2, 3, 9)),
    "without a batch": (nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 2)), torch.randn(3, 9)),
    "vector": (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(3)),
}
OPS = {"linear", "conv1d", "conv2d"}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["stacked", "turned", "stacked and turned"])
@pytest.mark.parametrize("directions", [1, 3])
def test_forms_are_equal(
    name: str, form: str, directions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = MODELS[name]
    model, x = model.double(), x.double()
    dots = [
        {n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(directions)
    ]
    expected = fwdcompile.transform(model, passes=())(x, tangents=dots)
    take(form, monkeypatch)
    found = fwdcompile.transform(model)(x, tangents=dots)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_products_with_one_weight_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp((1, 6, 6), 10), torch.randn(5, 1, 6, 6)
    plain = lowered(model, x, directions=4, rank_one=True).code
    assert plain.count("aten.linear(") == 1 + 2 * 5
    take("stacked", monkeypatch)
    code = lowered(model, x, directions=4, rank_one=True).code
    assert code.count("aten.linear(") == 3 and code.count("aten.cat(") == 2
    assert "linear_1: f32[5, 1024]" in code and "linear_1_dot3: f32[5, 1024]" in code


def test_nothing_changes_where_nothing_was_measured(costs: Path) -> None:
    model, x = mlp((1, 6, 6), 10), torch.randn(5, 1, 6, 6)
    passes = ("reassociate", "identities", "cse", "dce")
    without = fwdcompile.transform(model, passes=passes).lower(x).code
    assert lowered(model, x).code == without.replace("cse, dce", "cse, stack, dce")


def test_groups_hold_a_primal_and_its_tangents() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), torch.randn(5, 6)
    found = groups(lowered(model, x, directions=2).program.graph)
    assert sorted(len(group.nodes) for group in found) == [1, 1, 1, 1, 1, 3]
    (shared,) = (group for group in found if len(group.nodes) == 3)
    assert shared.product.key == "3 linear 5x6 by 6x6 float32"
    assert shared.nodes[0].meta["role"] == "primal"


def test_tied_weights_are_grouped_by_use(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(6, 6).double()
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer)
    x = torch.randn(5, 6, dtype=F64)
    dots = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    expected = fwdcompile.transform(model, passes=())(x, tangents=dots)
    take("stacked", monkeypatch)
    torch.testing.assert_close(fwdcompile.transform(model)(x, tangents=dots), expected)


def test_calibration_keeps_the_fastest_form_for_later_programs(
    costs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = (
        nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)),
        torch.randn(5, 6),
        torch.arange(5) % 3,
    )
    seconds = {"apart": 3.0, "stacked": 2.0, "turned": 2.9, "stacked and turned": 4.0}
    named = {id(f): n for n, f in seconds.items()}
    assert len(named) == 4

    def fastest(product: Any, forms: Any) -> str:
        return min(forms, key=seconds.__getitem__)

    monkeypatch.setattr("fwdcompile.costs._fastest", fastest)
    fgd = FGD(model, F.cross_entropy, lr=0.1, directions=Rademacher(rank_one=True), compile=False)
    fgd.calibrate(x, y)
    (known,) = json.loads(costs.read_text()).values()
    assert known == {
        "1 linear 5x6 by 6x6 float32": "turned",
        "2 linear 5x6 by 3x6 float32": "stacked",
    }
    fgd.step(x, y)
    assert "aten.cat(" in fgd.code and "arg_0_weight @" in fgd.code


def test_measuring_takes_a_form_only_for_a_clear_gain(
    costs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = lowered(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), torch.randn(5, 6)).program
    product = next(g.product for g in groups(program.graph) if g.product.count == 2)
    clock = {"apart": 1.0, "stacked": 0.97, "turned": 0.96, "stacked and turned": 2.0}

    def slow(name: str) -> Any:
        return lambda xs, w: name

    monkeypatch.setattr("fwdcompile.costs.timed", lambda run, repeats, device: clock[run()])
    calibrate([product], lambda product: {name: slow(name) for name in forms(product)})
    assert best_form(product) == "apart"
    clock["turned"] = 0.5
    calibrate([product], lambda product: {name: slow(name) for name in forms(product)})
    assert best_form(product) == "turned"


def test_calibration_measures_for_real(costs: Path) -> None:
    fwd = fwdcompile.transform(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))
    products = fwd.calibrate(torch.randn(5, 6), directions=2)
    assert {product.count for product in products} == {1, 3}
    for product in products:
        assert best_form(product) in forms(product)
    other = fwdcompile.transform(nn.Conv2d(3, 4, 3))
    other.calibrate(torch.randn(2, 3, 5, 5))
    (known,) = json.loads(costs.read_text()).values()
    assert len(known) == len(set(products)) + 1
    assert best_form(products[0]) is not None
