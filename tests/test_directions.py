from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from fwdcompile.directions import Directions, Normal, Rademacher, dense_tensor
from fwdcompile.words import stream_keys

KINDS = [Normal(), Rademacher()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COUNT = 1_000_000
LEAST_P = 1e-4


def draw(
    directions: Directions,
    shape: tuple[int, ...] = (COUNT,),
    *,
    seed: int = 0,
    step: int = 0,
    sample: int = 0,
    parameter: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    keys = stream_keys(torch.tensor(seed), torch.tensor(step), sample + 1, parameter + 1)
    return directions.draw(shape, key=keys[sample, parameter], dtype=dtype)


def two_sided(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def assert_uncorrelated(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Tests all pairs at once: the spread of their correlations, and the largest of them."""
    z = np.array([float((x * y).mean()) * x.numel() ** 0.5 for x, y in pairs])
    assert stats.chi2(len(z)).sf(float((z**2).sum())) > LEAST_P
    # the largest of many is large by chance: Bonferroni's bound
    assert two_sided(np.abs(z).max()) > LEAST_P / len(z)


@pytest.mark.parametrize("seed", [0, 1, -7, 2**40])
def test_normal_moments_to_the_fourth(seed):
    x = draw(Normal(), seed=seed)
    # the variances of x, x^2, x^3 and x^4 under the standard normal law
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        z = (float((x**power).mean()) - mean) / (variance / COUNT) ** 0.5
        assert two_sided(z) > LEAST_P, power


@pytest.mark.parametrize("seed", [0, 1, -7, 2**40])
def test_signs_are_balanced_and_of_unit_size(seed):
    x = draw(Rademacher(), seed=seed)
    assert torch.equal(x.abs(), torch.ones_like(x))
    assert two_sided(float(x.mean()) * COUNT**0.5) > LEAST_P


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("half", [slice(None, COUNT // 2), slice(COUNT // 2, None)])
def test_normal_follows_the_normal_law(dtype, half):
    x = draw(Normal(), dtype=dtype)[half].double().numpy()
    assert stats.kstest(x, "norm").pvalue > LEAST_P


def test_the_tails_are_filled():
    x = draw(Normal(), (4_000_000,), dtype=torch.float32).double().abs()
    for bound in (3, 4, 4.5):
        expected = 2 * stats.norm.sf(bound) * x.numel()
        found = int((x > bound).sum())
        assert two_sided((found - expected) / expected**0.5) > LEAST_P, bound


def test_the_two_normals_of_a_pair_are_independent():
    x = draw(Normal())
    a, b = x[: COUNT // 2], x[COUNT // 2 :]
    angle = torch.atan2(b, a).numpy()
    square = (a * a + b * b).numpy()
    assert stats.kstest(angle, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > LEAST_P
    assert stats.kstest(square, stats.chi2(2).cdf).pvalue > LEAST_P
    table = np.histogram2d(stats.norm.cdf(a), stats.norm.cdf(b), bins=32, range=[(0, 1), (0, 1)])
    assert stats.chisquare(table[0].ravel()).pvalue > LEAST_P


@pytest.mark.parametrize("directions", KINDS)
def test_near_elements_are_uncorrelated(directions):
    x = draw(directions)
    lags = [*range(1, 66), 128, 256, 1024, 4096, 65536, COUNT // 2]
    assert_uncorrelated([(x[:-lag], x[lag:]) for lag in lags])


@pytest.mark.parametrize("directions", KINDS)
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("parameter", [0, 1, 2, 3, 64, 65]),
        ("step", [0, 1, 2, 3, 2**31, 2**32]),
        ("seed", [0, 1, -1, 2**31, 2**32, 2**62]),
        ("sample", [0, 1, 2, 3, 64, 65]),
    ],
)
def test_streams_are_uncorrelated(directions, name, values):
    streams = [draw(directions, (200_000,), **{name: value}) for value in values]
    pairs = list(itertools.combinations(streams, 2))
    moved = [(x[1:], y[:-1]) for x, y in pairs] + [(x[:-1], y[1:]) for x, y in pairs]
    assert_uncorrelated(pairs + moved)


def test_seeds_that_differ_by_one_bit_are_uncorrelated():
    x = draw(Rademacher(), (100_000,))
    seeds = [1 << bit for bit in range(63)] + [-(2**63)]
    assert_uncorrelated([(x, draw(Rademacher(), (100_000,), seed=seed)) for seed in seeds])


def test_seed_step_sample_and_parameter_are_not_interchangeable():
    names = ("seed", "step", "sample", "parameter")
    draws = [draw(Rademacher(), (256,), **{name: 1}) for name in names]
    for x, y in itertools.combinations(draws, 2):
        assert not torch.equal(x, y)


def test_sums_over_short_streams_have_the_right_spread():
    # one short draw a step, as training makes them: neighbours in time, not in one stream
    sums = torch.stack([draw(Rademacher(), (64,), step=step).sum() for step in range(1500)])
    statistic = float((sums**2).sum()) / 64
    low, high = stats.chi2(1500).ppf([LEAST_P, 1 - LEAST_P])
    assert low < statistic < high


@pytest.mark.parametrize("width", [1, 4, 8])
def test_packed_signs_are_uniform(width):
    bits = (draw(Rademacher(), (COUNT,)) > 0).long().reshape(-1, width)
    codes = (bits << torch.arange(width)).sum(dim=1)
    counts = torch.bincount(codes, minlength=2**width).numpy()
    assert stats.chisquare(counts).pvalue > LEAST_P


def test_each_place_of_a_byte_is_balanced():
    bits = draw(Rademacher(), (COUNT,)).reshape(-1, 8)
    z = bits.sum(dim=0) / len(bits) ** 0.5
    assert float(stats.chi2(8).sf(float((z**2).sum()))) > LEAST_P


@pytest.mark.parametrize("place", range(32))
def test_bytes_of_places_32_apart_are_uniform(place):
    bits = (draw(Rademacher(), (2**20,)) > 0).long()[place::32].reshape(-1, 8)
    counts = torch.bincount((bits << torch.arange(8)).sum(dim=1), minlength=256).numpy()
    assert stats.chisquare(counts).pvalue > LEAST_P


def test_float64_normals_do_not_repeat_within_a_stream():
    x = draw(Normal(), (4_000_000,))
    pairs = torch.complex(x[:2_000_000], x[2_000_000:])
    assert len(np.unique(pairs.numpy())) == 2_000_000


@pytest.mark.parametrize("directions", KINDS)
def test_equal_arguments_give_equal_numbers(directions):
    where = {"seed": -3, "step": 5, "sample": 2, "parameter": 9}
    assert torch.equal(draw(directions, (999,), **where), draw(directions, (999,), **where))


@pytest.mark.parametrize("directions", KINDS)
def test_torchs_own_generator_is_neither_read_nor_moved(directions):
    torch.manual_seed(1)
    x, after = draw(directions, (99,)), torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(()))
    assert torch.equal(x, draw(directions, (99,)))


@pytest.mark.parametrize("directions", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (31,), (33,), (3, 5, 7), (2, 1, 64)])
def test_shape_dtype_and_layout(directions, dtype, shape):
    x = draw(directions, shape, dtype=dtype)
    assert x.shape == shape
    assert x.dtype == dtype
    assert x.device == torch.device("cpu")
    assert x.is_contiguous()
    assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("directions", KINDS)
def test_the_numbers_depend_on_the_count_alone_and_not_on_the_shape(directions):
    flat = draw(directions, (210,))
    assert torch.equal(flat.view(6, 35), draw(directions, (6, 35)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_rounded_float32(dtype):
    assert torch.equal(draw(Normal(), dtype=dtype), draw(Normal(), dtype=torch.float32).to(dtype))
    assert torch.equal(draw(Rademacher(), dtype=dtype), draw(Rademacher()).to(dtype))


def test_keys_are_two_words_each_and_take_their_device_from_the_seed():
    keys = stream_keys(torch.tensor(1), torch.tensor(2), 3, 4)
    assert keys.shape == (3, 4, 2)
    assert keys.dtype == torch.int32
    assert len(keys.unique()) == keys.numel()
    meta = torch.tensor(1, device="meta")
    key = stream_keys(meta, meta)[0, 0]
    assert Normal().draw((4,), key=key, dtype=torch.float32).is_meta


def test_a_key_does_not_depend_on_how_many_are_made():
    seed, step = torch.tensor(1), torch.tensor(2)
    assert torch.equal(stream_keys(seed, step, 2, 3), stream_keys(seed, step, 5, 7)[:2, :3])


@pytest.mark.parametrize("directions", KINDS)
def test_more_elements_than_a_word_counts_keep_their_shape(directions):
    meta = torch.tensor(1, device="meta")
    key = stream_keys(meta, meta)[0, 0]
    x = directions.draw((3, 2**31), key=key, dtype=torch.float32)
    assert x.shape == (3, 2**31)


@pytest.mark.parametrize("directions", KINDS)
def test_directions_are_frozen_values(directions):
    assert directions == type(directions)()
    assert hash(directions) == hash(type(directions)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        directions.scale = 2.0


def test_the_base_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Directions()


@pytest.mark.compiled
def test_compiled_and_eager_agree_and_a_new_seed_does_not_recompile():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return torch._inductor.compile(graph, inputs)

    def both(seed: Tensor, step: Tensor) -> list[Tensor]:
        key = stream_keys(seed, step, 1, 4)[0, 3]
        return [d.draw((37, 101), key=key, dtype=torch.float32) for d in KINDS]

    compiled = torch.compile(both, fullgraph=True, dynamic=False, backend=backend)
    # 8 eps of the length of a pair, the greatest of which are 6.8
    precision = 8 * torch.finfo(torch.float32).eps
    for seed, step in [(0, 0), (-5, 2**33), (2**62, 7)]:
        arguments = torch.tensor(seed), torch.tensor(step)
        (normal, signs), (eager_normal, eager_signs) = compiled(*arguments), both(*arguments)
        torch.testing.assert_close(normal, eager_normal, rtol=precision, atol=6.8 * precision)
        assert torch.equal(signs, eager_signs)
    assert len(compilations) == 1


@pytest.mark.compiled
def test_kernels_have_no_constants_beyond_their_words() -> None:
    """Inductor folds sums and products of places; Triton refuses what then needs 64 bits."""

    def draw(seed: Tensor, step: Tensor) -> list[Tensor]:
        keys = stream_keys(seed, step, 2, 3, first=1)
        kinds = Normal(), Rademacher()
        return [dense_tensor(k.draw((40, 50), key=keys[0, 1], dtype=torch.float32)) for k in kinds]

    _, codes = run_and_get_code(torch.compile(draw), torch.tensor(5), torch.tensor(7))
    found = [int(n) for code in codes for n in re.findall(r"(?<![\w.])-?\d+(?![\w.])", code)]
    words = {0x9E3779B1 - 2**32, 0x7FEB352D}
    assert words <= {*found}
    assert {n for n in found if not -(2**31) <= n < 2**31} <= {0xFFFFFFFF}


def test_the_numbers_of_a_key_never_change():
    """Histories of runs and runs that resume rest on them (docs/decisions.md)."""
    keys = stream_keys(torch.tensor(3), torch.tensor(2**33 + 5), 2, 3, first=1)
    assert keys[:, 2].tolist() == [[-1496179795, 246433428], [745405453, -1409035644]]
    normals = Normal().draw((5,), key=keys[1, 2], dtype=torch.float64)
    expected = [0.9952151288593996, -0.9271399318858716, 0.8795327739177708]
    expected += [-0.5710793275054701, -0.13074191173290983]
    torch.testing.assert_close(normals, torch.tensor(expected, dtype=torch.float64))
    signs = Rademacher().draw((40,), key=keys[1, 2], dtype=torch.float32)
    assert "".join("+" if x > 0 else "-" for x in signs) == (
        "-++++-++-+++-+-++-++++-++--------+-++-+-"
    )
