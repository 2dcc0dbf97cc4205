"""Standard normals of hashed words, by Box and Muller's transform.

A pair is `r cos(t)` and `r sin(t)`, where `r` is the root of -2 log(u) and `u` and `t` are uniform.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import NDArray
from torch import Tensor

from .words import shift, stored

_Function = Callable[[NDArray[np.float64]], NDArray[np.float64]]
# the bits of the root of 1/2, and of 2^32 times it, as float32
_ROOT = 0x3F3504F3
_ROOT_OF_WORDS = _ROOT + (32 << 23)
# the bits of 2^32
_WORD_BITS = 0x4F800000
_MANTISSA = 0x7FFFFF


def normals(words: Tensor, angles: Tensor, dtype: torch.dtype) -> Tensor:
    """Two independent standard normals of each pair of words.

    Args:
        words: `[n]`, int32: the radii. As numbers without sign, 0 gives the greatest.
        angles: `[n]`, int32: 2^32 of them are a turn.
        dtype: float64, or float32 for all others.

    Returns:
        `[2, n]` of that dtype. A compiled step has them from polynomials, which agree with torch's
        functions to float32's rounding and take less time there; elsewhere each operation of a
        polynomial would be a pass over memory.
    """
    if dtype == torch.float32 and torch.compiler.is_dynamo_compiling():
        return _of_polynomials(words, angles)
    radius = torch.sqrt(-2 * torch.log(uniform(words, dtype)))
    angle = angles.to(dtype) * (2 * math.pi / 2**32)
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)])


def uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in (0, 1], never 0, the same but for rounding in every dtype."""
    # two halves: a float32 of the whole word would round the smallest numbers coarsely
    low = ((words & 0xFFFF).to(dtype) + 0.5) * 2**-16
    return (shift(words, 16).to(dtype) + low) * 2**-16


def _of_polynomials(words: Tensor, angles: Tensor) -> Tensor:
    """With `s` and `c` the sine and cosine of t / 2 times the root of 2: cos(t) = 1 - s^2."""
    radius = torch.sqrt(_minus_two_logs(words))
    x = stored(angles.to(torch.float32) * 2**-31)
    square = x * x
    s, c = x * _polynomial(_SINE, square), _polynomial(_COSINE, square)
    along = radius * s
    return torch.stack([radius - along * s, along * c])


def _minus_two_logs(words: Tensor) -> Tensor:
    """-2 log(u): of u = 2^e (1 + m), where m is small, by a polynomial of m."""
    # 2^32 u: a word of the upper half is negative as int32
    wrapped = ((words >> 31) & _WORD_BITS).view(torch.float32)
    bits = ((words.to(torch.float32) + 0.5) + wrapped).view(torch.int32) - _ROOT_OF_WORDS
    m = stored(((bits & _MANTISSA) + _ROOT).view(torch.float32) - 1)
    exponent = (bits >> 23).to(torch.float32)
    return m * _polynomial(_LOG, m) + exponent * (-2 * math.log(2))


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    """Horner's scheme, from the coefficient of the highest power down."""
    result = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        result = result * x + coefficient
    return result


def _fit(function: _Function, low: float, high: float, degree: int) -> list[float]:
    """Coefficients of the polynomial through a function at Chebyshev's points, highest first."""
    through = Chebyshev.interpolate(function, degree, domain=[low, high])
    powers = through.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1])
    return [float(c) for c in powers.coef[::-1]]


# none of Chebyshev's points is 0, where the first and the third have a limit
_SINE = _fit(lambda y: math.sqrt(2) * np.sin(np.pi / 2 * np.sqrt(y)) / np.sqrt(y), 0, 1, 4)
_COSINE = _fit(lambda y: math.sqrt(2) * np.cos(np.pi / 2 * np.sqrt(y)), 0, 1, 4)
_LOG = _fit(lambda m: -2 * np.log1p(m) / m, math.sqrt(0.5) - 1, math.sqrt(2) - 1, 8)
