"""What a step draws its directions for, and how, in little code: compiling it takes long.

All that is small is drawn in one loop, and what is large and of one size by one region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .directions import Directions, RankOne
from .lowered import Lowered
from .program import value
from .words import hashed, stored, stream_keys

Drawn = dict[str, Tensor | RankOne]
# so many words are little to keep
SMALL = 2**11


@dataclass
class Kind:
    """What directions are drawn for: a shape of a dtype, as one tensor or as two factors.

    `samples` are the numbers of the directions in which it moves.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    outer: bool
    samples: list[int]


Kinds = dict[str, Kind]


def kinds_of(lowered: Lowered) -> Kinds:
    """What a step draws directions for, in the order of their keys."""
    kinds: Kinds = {}
    for node, slot in lowered.program.placeholders():
        if slot.kind != "tangent":
            continue
        kind = kinds.setdefault(slot.name, Kind((), value(node).dtype, bool(slot.factor), []))
        if slot.direction not in kind.samples:
            kind.samples.append(slot.direction)
        if slot.direction == kind.samples[0]:
            kind.shape = (*kind.shape, *value(node).shape)
    return kinds


class Draw:
    """The directions of one step as a function of seed and step.

    Args:
        directions: where they come from.
        kinds: what they are drawn for.
        samples: how many directions a step takes.
        first: number of the first of them.
        device: of seed and step.

    They are those of `Directions.draw` for the keys of `stream_keys`, bit by bit.
    """

    def __init__(
        self, directions: Directions, kinds: Kinds, samples: int, first: int, device: torch.device
    ) -> None:
        self.kinds = kinds
        self._samples, self._first = samples, first
        dense = replace(directions, rank_one=False)
        self._sources = {name: directions if k.outer else dense for name, k in kinds.items()}
        sizes = {name: self._sources[name].words(kind.shape) for name, kind in kinds.items()}
        small: dict[torch.dtype, dict[int, int]] = {}
        large: dict[tuple[int, torch.dtype], list[int]] = {}
        for number, _, name in self._each():
            words, dtype = sizes[name], kinds[name].dtype
            if words <= SMALL:
                small.setdefault(dtype, {})[number] = words
            else:
                large.setdefault((words, dtype), []).append(number)
        self._small = [SmallDraws(dense, dtype, words, device) for dtype, words in small.items()]
        repeated = [(what, numbers) for what, numbers in large.items() if len(numbers) > 1]
        self._alike = [(stream_of(dense, *what), numbers) for what, numbers in repeated]

    def __call__(self, seed: Tensor, step: Tensor) -> list[Drawn]:
        """For each sample, the directions of all that has one, by name."""
        keys = stream_keys(seed, step, self._samples, len(self.kinds), self._first).flatten(0, 1)
        numbers: dict[int, Tensor] = {}
        for small in self._small:
            numbers |= small(keys)
        own = torch.split(keys.flatten(), 2)
        for stream, alike in self._alike:
            numbers |= {number: stream(own[number]) for number in alike}
        drawn: list[Drawn] = [{} for _ in range(self._samples)]
        for number, sample, name in self._each():
            kind, source = self.kinds[name], self._sources[name]
            drawn[sample][name] = (
                source.of_numbers(numbers[number], kind.shape)
                if number in numbers
                else source.draw(kind.shape, key=own[number], dtype=kind.dtype)
            )
        return drawn

    def _each(self) -> Iterator[tuple[int, int, str]]:
        """The number of its key, the sample and the name of all that is drawn."""
        for row, (name, kind) in enumerate(self.kinds.items()):
            for sample in kind.samples:
                yield sample * len(self.kinds) + row, sample, name


def stream_of(directions: Directions, words: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """`Directions.stream` of a key, which torch.compile compiles once for all keys of a step."""

    def stream(key: Tensor) -> Tensor:
        return directions.stream(key, words, dtype)

    # dynamo takes regions of equal code for one, whatever they close over
    name = f"stream_{words}_{str(dtype).removeprefix('torch.')}"
    stream.__code__ = stream.__code__.replace(co_name=name)
    region = torch.compiler.nested_compile_region(stream)

    def chosen(key: Tensor) -> Tensor:
        # an exported step is for engines that know no regions
        return region(key) if torch.compiler.is_dynamo_compiling() else stream(key)

    return chosen


class SmallDraws:
    """The numbers of all that is small and of one dtype, made in one loop.

    Args:
        directions: where they come from.
        dtype: of the numbers.
        words: how many words each takes, by the number of its key.
        device: of the keys.
    """

    def __init__(
        self,
        directions: Directions,
        dtype: torch.dtype,
        words: dict[int, int],
        device: torch.device,
    ) -> None:
        self._directions, self._dtype, self._words = directions, dtype, words
        counts = torch.tensor([*words.values()], dtype=torch.int64)
        starts = counts.cumsum(0) - counts
        places = torch.arange(int(counts.sum())) - starts.repeat_interleave(counts)
        # of each word: the number of its key, its own under that key
        self._keys = torch.tensor([*words], dtype=torch.int32).repeat_interleave(counts).to(device)
        self._places = places.to(device, torch.int32)
        # numbers of a word that are side by side are in order
        self._order = self._ordered(len(places)).to(device) if directions.words_dim else None

    def __call__(self, keys: Tensor) -> dict[int, Tensor]:
        """The numbers by the number of their key, some left over at their ends."""
        first, second = keys.index_select(0, self._keys).unbind(1)
        numbers = self._directions.numbers(hashed(self._places, first, second), self._dtype)
        if self._order is not None:
            numbers = stored(numbers).flatten().index_select(0, self._order)
        sizes = [count * self._directions.per_word for count in self._words.values()]
        parts = torch.split(stored(numbers.flatten()), sizes)
        # torch.cond takes no two operands that share memory; a compiled step makes no copies
        return {number: x.clone() for number, x in zip(self._words, parts, strict=True)}

    def _ordered(self, count: int) -> Tensor:
        """Where in the numbers of all words those of one tensor are, for one after the other."""
        per_word = self._directions.per_word
        places = torch.arange(per_word * count).view(per_word, count)
        parts = torch.split(places, [*self._words.values()], 1)
        return torch.cat([part.flatten() for part in parts])
