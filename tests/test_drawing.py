"""All directions of a step: those drawn together are those drawn one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn.functional import cross_entropy
from torch.torch_version import TorchVersion

from fwdcompile import FGD, Normal, Rademacher, RankOne, Sphere
from fwdcompile.directions import Directions, dense_tensor
from fwdcompile.drawing import SMALL, Draw, Kind, kinds_of
from fwdcompile.words import stream_keys

ALL = [Normal(), Normal(rank_one=True), Rademacher(), Rademacher(rank_one=True), Sphere()]
# the others compile as these do
FEW = [ALL[0], ALL[3], *(pytest.param(one, marks=pytest.mark.slow) for one in ALL[1:3])]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
CPU = torch.device("cpu")
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple) | st.sampled_from(
    [(2 * SMALL,), (2 * SMALL + 1,), (SMALL + 1, 2), (SMALL, 3), (31,), (32,), (33,), (65,)]
)


def one_by_one(
    directions: Directions, kinds: dict[str, Kind], samples: int, first: int, key: tuple[int, int]
) -> list[dict[str, Tensor | RankOne]]:
    seed, step = map(torch.tensor, key)
    keys = stream_keys(seed, step, samples, len(kinds), first)
    plain = type(directions)()
    return [
        {
            name: (directions if kind.outer else plain).draw(
                kind.shape, key=keys[k, row], dtype=kind.dtype
            )
            for row, (name, kind) in enumerate(kinds.items())
            if k in kind.samples
        }
        for k in range(samples)
    ]


def tensors(drawn: list[dict[str, Tensor | RankOne]]) -> list[dict[str, list[Tensor]]]:
    return [
        {n: [d.u, d.v] if isinstance(d, RankOne) else [d] for n, d in each.items()}
        for each in drawn
    ]


@settings(max_examples=60)
@given(st.data(), st.sampled_from(ALL), st.integers(1, 3), st.integers(0, 5))
def test_drawn_together_is_drawn_one_by_one(data, directions, samples, first) -> None:
    kinds = {}
    for number in range(data.draw(st.integers(1, 5))):
        shape = data.draw(SHAPES)
        own = data.draw(st.sets(st.integers(0, samples - 1), min_size=1))
        outer = directions.rank_one and len(shape) > 1 and data.draw(st.booleans())
        kinds[f"p{number}"] = Kind(shape, data.draw(st.sampled_from(DTYPES)), outer, sorted(own))
    key = data.draw(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40)))
    found = Draw(directions, kinds, samples, first, CPU)(*map(torch.tensor, key))
    expected = one_by_one(directions, kinds, samples, first, key)
    assert [set(each) for each in found] == [set(each) for each in expected]
    for mine, theirs in zip(tensors(found), tensors(expected), strict=True):
        for name, parts in theirs.items():
            for a, b in zip(mine[name], parts, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=False)


@pytest.mark.parametrize("directions", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_parameter_without_elements_has_a_direction_without_any(directions, dtype) -> None:
    kinds = {"none": Kind((0, 3), dtype, directions.rank_one, [0])}
    (drawn,) = Draw(directions, kinds, 1, 0, CPU)(torch.tensor(0), torch.tensor(0))
    dense = dense_tensor(drawn["none"])
    assert dense.shape == (0, 3) and dense.dtype == dtype


def test_directions_come_in_the_order_of_their_keys() -> None:
    kinds = {n: Kind((3,), torch.float32, False, [0]) for n in ("b", "a", "c")}
    (drawn,) = Draw(Normal(), kinds, 1, 0, CPU)(torch.tensor(0), torch.tensor(0))
    assert list(drawn) == ["b", "a", "c"]


@pytest.mark.compiled
@pytest.mark.parametrize("directions", FEW)
def test_a_compiled_step_moves_along_the_directions_of_their_keys(directions: Directions) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fgd = FGD(model, cross_entropy, lr=1.0, directions=directions, seed=3)
    kinds = kinds_of(fgd._forward.lower(x, y, **fgd._asked()))
    fgd.step(x, y)
    (dots,) = one_by_one(directions, kinds, 1, 0, (3, 0))
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    ratios = []
    for name, dot in dots.items():
        dense, move = dense_tensor(dot), moved[name]
        ratios.append((move * dense).sum() / dense.square().sum())
        torch.testing.assert_close(move, ratios[-1] * dense, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        torch.stack(ratios), ratios[0].expand(len(ratios)), rtol=1e-3, atol=0
    )


@pytest.mark.compiled
@pytest.mark.parametrize("directions", FEW)
def test_what_is_alike_is_compiled_once_and_drawn_each(
    directions: Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large directions of one size share their code, those of others have their own."""
    monkeypatch.setattr("fwdcompile.drawing.SMALL", 0)
    shapes = [(5, 70), (70, 5), (3, 41), (41, 3), (5, 70), (64, 2)]
    kinds = {
        f"{dtype}{number}": Kind(shape, dtype, directions.rank_one, [0, 1])
        for dtype in (torch.float32, torch.float64)
        for number, shape in enumerate(shapes)
    }
    draw, key = Draw(directions, kinds, 2, 0, CPU), (torch.tensor(3), torch.tensor(7))
    with fresh_cache():
        found, (code,) = run_and_get_code(torch.compile(draw.__call__, fullgraph=True), *key)
    regions = len(draw._alike) if TorchVersion(torch.__version__) >= "2.13" else 4 * len(shapes)
    assert code.count("def repeated_subgraph") == regions
    for mine, theirs in zip(tensors(found), tensors(draw(*key)), strict=True):
        for name, parts in theirs.items():
            for a, b in zip(mine[name], parts, strict=True):
                torch.testing.assert_close(a, b)
