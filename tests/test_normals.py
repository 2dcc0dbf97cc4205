import math

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from fwdcompile.normals import _minus_two_logs, _of_polynomials, normals, uniform
from fwdcompile.words import mix

EDGES = [0, 1, 2, 255, 2**24 + 1, 2**31 - 1, -(2**31), -(2**31) + 1, -(2**24), -129, -2, -1]
# where the number 2^-32 (word + 1/2) passes a power of two times the root of 1/2
TURNS = [round(2**n * math.sqrt(0.5)) + d for n in (31, 30, 29) for d in (-65, 0, 65)]
EPS = torch.finfo(torch.float32).eps


def words(count: int, key: int = 0) -> Tensor:
    edges = torch.tensor([*EDGES, *TURNS]).repeat(2)
    numbers = mix(torch.arange(count, dtype=torch.int32) + key * count)
    return torch.cat([edges.to(torch.int32), numbers])


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 32)])
def test_uniforms_reach_from_nearly_zero_to_one_and_are_never_zero(dtype, bits):
    x = uniform(torch.tensor(EDGES, dtype=torch.int32), dtype)
    assert 0 < float(x.min()) < 2.0**-bits
    assert 1 - 2.0**-bits <= float(x.max()) <= 1


def test_logarithms_by_a_polynomial_are_those_of_a_uniform():
    radii = words(1_000_000)
    found, expected = _minus_two_logs(radii), -2 * torch.log(uniform(radii, torch.float64))
    # a float32 near 1 is a quarter of eps off, in its logarithm half of eps times 2
    torch.testing.assert_close(found.double(), expected, rtol=4 * EPS, atol=EPS)
    assert float(found.min()) == 0


def test_pairs_by_polynomials_are_at_their_angle_and_radius():
    radii, angles = words(1_000_000), words(1_000_000, key=1).flip(0)
    a, b = _of_polynomials(radii, angles).double()
    angle = angles.double() * (2 * math.pi / 2**32)
    # the radius on its own has the error of the rounding of u
    radius = torch.sqrt(_minus_two_logs(radii)).double()
    assert bool(((a - radius * torch.cos(angle)).abs() <= 8 * EPS * radius).all())
    assert bool(((b - radius * torch.sin(angle)).abs() <= 8 * EPS * radius).all())
    torch.testing.assert_close((a**2 + b**2).sqrt(), radius, rtol=8 * EPS, atol=0)


@pytest.mark.compiled
def test_a_compiler_fuses_the_polynomials_into_one_kernel():
    def draw(radii: Tensor, angles: Tensor) -> Tensor:
        return normals(radii, angles, torch.float32)

    arguments = words(10_000), words(10_000, key=1)
    found, (code,) = run_and_get_code(torch.compile(draw, fullgraph=True), *arguments)
    torch.testing.assert_close(found, _of_polynomials(*arguments), rtol=0, atol=8 * EPS * 6.8)
    assert code.count("async_compile.cpp_pybinding") == 1
    assert not any(name in code for name in (".log()", ".cos()", ".sin()"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elsewhere_they_are_made_of_torchs_functions(dtype):
    radii, angles = words(1000), words(1000, key=1)
    a, b = normals(radii, angles, dtype)
    assert a.dtype == dtype
    torch.testing.assert_close(a**2 + b**2, -2 * torch.log(uniform(radii, dtype)))
    turned = torch.atan2(b, a).double() / (2 * math.pi) * 2**32 - angles.double()
    off = torch.remainder(turned[a.abs() + b.abs() > 0] + 2**31, 2**32) - 2**31
    assert float(off.abs().max()) < 2**32 * torch.finfo(dtype).eps
