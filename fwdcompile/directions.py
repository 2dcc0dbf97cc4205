"""Directions: the random vectors v along which a forward gradient is taken.

A direction needs zero mean and identity covariance, no more: that makes the forward gradient
unbiased (section 3.2 of Baydin et al. 2022). The numbers are a pure function of seed, step,
sample, parameter and element (see words.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .normals import normals
from .words import mix, signed, stored, words_of


@dataclass(frozen=True)
class RankOne:
    """The outer product of `u` and `v` as the direction of a weight, which is never made.

    Args:
        u: `[n]`, for a weight of shape `[n, *rest]`: its first dimension is that of the outputs
            of a linear layer or a convolution, and of the rows of an embedding.
        v: `[*rest]`, of at least one dimension.

    Example:
        >>> fwd(x, tangents={"weight": fwdcompile.RankOne(torch.randn(16), torch.randn(8))})
    """

    u: Tensor
    v: Tensor

    def dense(self) -> Tensor:
        """The direction itself, `[n, *rest]`."""
        return self.u.view(-1, *[1] * self.v.ndim) * self.v


@dataclass(frozen=True)
class Directions(ABC):
    """A distribution of directions of zero mean and identity covariance.

    Args:
        rank_one: draws the direction of every parameter of two or more dimensions as u v' with
            independent factors. Its covariance is the identity too, so that forward gradients
            stay unbiased; n + m numbers are drawn in place of n m.
    """

    rank_one: bool = False
    per_word: ClassVar[int]
    words_dim: ClassVar[int]

    def draw(self, shape: Sequence[int], *, key: Tensor, dtype: torch.dtype) -> Tensor | RankOne:
        """Draws the direction of one parameter.

        Args:
            shape: of the parameter.
            key: two words of `stream_keys`, on the device of the parameter.
            dtype: a floating dtype, that of the parameter.

        Returns:
            A tensor of that shape and dtype on the key's device, or its factors; equal arguments,
            equal numbers.

        Example:
            >>> key = stream_keys(torch.tensor(0), torch.tensor(0))[0, 0]
            >>> Normal().draw((3, 2), key=key, dtype=torch.float32)
        """
        numbers = self.stream(key, self.words(shape), dtype)
        return self.of_numbers(stored(numbers) if self._outer(shape) else numbers, shape)

    def stream(self, key: Tensor, words: int, dtype: torch.dtype) -> Tensor:
        """The numbers of so many words under a key, in one dimension."""
        return self.numbers(words_of(key, words), dtype).flatten()

    def words(self, shape: Sequence[int]) -> int:
        """How many hashed words the direction of a shape takes."""
        return -(-sum(map(math.prod, self._parts(shape))) // self.per_word)

    def of_numbers(self, numbers: Tensor, shape: Sequence[int]) -> Tensor | RankOne:
        """What `draw` makes of the numbers of its words, the last of which may be left over."""
        parts = self._parts(shape)
        sizes = [math.prod(part) for part in parts]
        split = torch.split(numbers[: sum(sizes)], sizes)
        u, *rest = (x.view(part) for x, part in zip(split, parts, strict=True))
        return RankOne(u.clone(), *(v.clone() for v in rest)) if rest else u

    def _parts(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shapes of the factors, or the shape alone."""
        return [tuple(shape[:1]), tuple(shape[1:])] if self._outer(shape) else [tuple(shape)]

    def _outer(self, shape: Sequence[int]) -> bool:
        return self.rank_one and len(shape) > 1

    def mixing(self, drawn: Sequence[Mapping[str, Tensor | RankOne]]) -> Tensor | None:
        """How the directions of a step are made of those that were drawn for it.

        Args:
            drawn: for each of K samples, what `draw` gave for every parameter, by name.

        Returns:
            `[K, K]`: direction k is the sum over j of `mixing[k, j]` times sample j, so that its
            derivative is the same sum of theirs; None where samples are directions as they are.
        """
        return None

    @abstractmethod
    def numbers(self, words: Tensor, dtype: torch.dtype) -> Tensor:
        """Independent numbers of zero mean and unit variance, `per_word` of each word.

        Of n words `[per_word, n]` or `[n, per_word]`: dimension `words_dim` is theirs.
        """


@dataclass(frozen=True)
class Normal(Directions):
    """Standard normal components, the paper's choice (section 3.4)."""

    per_word: ClassVar[int] = 2
    words_dim: ClassVar[int] = 1

    def numbers(self, words: Tensor, dtype: torch.dtype) -> Tensor:
        """Two words, one made of the other, give a pair of normals."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return normals(words, mix(words ^ signed(0x5BF03635)), wide).to(dtype)


@dataclass(frozen=True)
class Sphere(Normal):
    """Uniform on the sphere of radius sqrt(d), where d counts all parameters together.

    Normals over their length. The forward gradient of one direction has exactly d times the squared
    norm of the gradient as its second moment, one of K orthogonal directions d / K times.

    Args:
        orthogonal: the directions of one step are orthogonal to each other: the forward gradient
            is d / K times the projection of the gradient on what they span, and the gradient itself
            for K = d.

    Raises:
        ValueError: `rank_one`, whose lengths differ from parameter to parameter.

    Example:
        >>> FGD(model, loss_fn, lr=2e-4, directions=Sphere(orthogonal=True), samples=16)
    """

    orthogonal: bool = False

    def __post_init__(self) -> None:
        if self.rank_one:
            raise ValueError(
                "directions on the sphere cannot be rank_one: take Rademacher or Normal"
            )

    def mixing(self, drawn: Sequence[Mapping[str, Tensor | RankOne]]) -> Tensor:
        """Scales to the length sqrt(d); orthogonal ones by the inverse of Cholesky's factor."""
        gram, count = _gram(drawn)
        if not self.orthogonal:
            return torch.diag(torch.sqrt(count / gram.diagonal()))
        if len(drawn) > count:
            raise ValueError(f"{len(drawn)} directions of {count} numbers cannot be orthogonal")
        unit = torch.eye(len(drawn), dtype=gram.dtype, device=gram.device)
        factor = torch.linalg.cholesky(gram)
        inverse: Tensor = torch.linalg.solve_triangular(factor, unit, upper=False)
        return inverse * math.sqrt(count)


@dataclass(frozen=True)
class Rademacher(Directions):
    """Signs: 1 or -1 with equal probability, the least variance of all independent components.

    Factors of signs (`rank_one`) give each component of the forward gradient the same second
    moment as independent signs do: (u_i v_j) (u_k v_l) has mean 0 but for equal pairs.
    """

    per_word: ClassVar[int] = 32
    words_dim: ClassVar[int] = 0

    def numbers(self, words: Tensor, dtype: torch.dtype) -> Tensor:
        """Each word gives the signs of 32 neighbours: the hash costs more than the shift."""
        bits = torch.arange(32, dtype=torch.int32, device=words.device)
        return (((words[:, None] << bits) >> 31) | 1).to(dtype)


def dense_tensor(direction: Tensor | RankOne) -> Tensor:
    """The direction as one tensor."""
    return direction.dense() if isinstance(direction, RankOne) else direction


def scaled(direction: Tensor | RankOne, factor: Tensor) -> Tensor:
    """The direction times a number, in the direction's dtype."""
    if isinstance(direction, RankOne):
        return RankOne(direction.u * factor.to(direction.u.dtype), direction.v).dense()
    return direction * factor.to(direction.dtype)


def _gram(drawn: Sequence[Mapping[str, Tensor | RankOne]]) -> tuple[Tensor, int]:
    """Inner products of all samples, `[K, K]`, and how many numbers each has."""
    products, count = [], 0
    for name in drawn[0]:
        rows = torch.stack([dense_tensor(sample[name]).flatten() for sample in drawn])
        count += rows.shape[1]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        products.append(rows @ rows.mT)
    return sum(products[1:], products[0]), count
