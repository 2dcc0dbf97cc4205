"""Words of 32 bits, the source of all that is random: a hash of seed, step, sample and parameter.

Everything is integer ops on int32, which wrap around: a compiler fuses them into whatever reads
them, and they are the same eager and compiled, on CPU and GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 2**32


def stream_keys(
    seed: Tensor, step: Tensor, samples: int = 1, parameters: int = 1, first: int = 0
) -> Tensor:
    """The keys of all directions of one step, computed together: a compiler makes them one loop.

    Args:
        seed: int64 tensor of no dimensions.
        step: int64 tensor of no dimensions, the iteration.
        samples: how many directions the step takes.
        parameters: how many parameters each direction has.
        first: number of the first direction; other workers have those before and behind.

    Returns:
        An int32 tensor `[samples, parameters, 2]` on the seed's device, two words a key.
    """
    device = seed.device
    numbers = torch.arange(first, first + samples, dtype=torch.int32, device=device)
    sample = numbers[:, None, None]
    parameter = torch.arange(parameters, dtype=torch.int32, device=device)[:, None]
    word = torch.arange(2, dtype=torch.int32, device=device)
    halves = [(x & 0xFFFFFFFF).to(torch.int32) for n in (seed, step) for x in (n, n >> 32)]
    # an xor, equal to the sum here: Inductor folds sums and products of places into constants, and
    # Triton refuses those beyond 32 bits
    key = (word ^ signed(0x243F6A88)).expand(samples, parameters, 2)
    for number in (*halves, sample, parameter):
        key = stored(mix(key * signed(0x9E3779B1) ^ number))
    return key


def words_of(key: Tensor, count: int) -> Tensor:
    """One hashed 32-bit word for each element: a keyed permutation of the element's number."""
    index = torch.arange(min(count, _WORD // 2), dtype=torch.int32, device=key.device)
    words = hashed(index, key[0], key[1])
    rest = count - words.numel()
    return torch.cat([words, words_of(mix(key), rest)]) if rest else words


def hashed(index: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The words at some places under the two words of a key, or under those of many keys."""
    return stored(mix(stored(mix(index ^ first)) + second))


def mix(x: Tensor) -> Tensor:
    """Scrambles 32-bit words one to one; a change of one input bit changes half of the output.

    Shifts and multipliers are those of C. Wellons's search for unbiased hashes, "lowbias32".
    """
    x = (x ^ shift(x, 16)) * signed(0x7FEB352D)
    x = (x ^ shift(x, 15)) * signed(0x846CA68B)
    return x ^ shift(x, 16)


def stored(x: Tensor) -> Tensor:
    """The same tensor, which Inductor makes once: inlined, it is made again for every use."""
    return x.as_strided(x.shape, x.stride())


def shift(x: Tensor, bits: int) -> Tensor:
    """Shifts right and fills with zeros; torch's own shift copies the sign bit."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def signed(word: int) -> int:
    """A 32-bit word as the signed number that int32 holds."""
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word
