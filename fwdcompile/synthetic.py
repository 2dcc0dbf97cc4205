"""Images from a generator, for machines that have no data set: grey and small, or in colour.

A class is a few templates. A template is a smooth random field: normal numbers on a coarse grid,
interpolated by cubics, then sigmoid(3 field). All templates share a part of their field, as the
images of a real set share a mean. An image is a template of its class, chosen at random, that is
moved, scaled, bent, given another contrast and brightness, covered in part by a rectangle, and made
noisy. Closed-form linear regression on the pixels gets 74 % of "synthetic-grey" and 48 % of
"synthetic-colour" right, a small MLP about 95 % and 83 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CLASSES = 10
Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How images are drawn. Lengths are fractions of the side of an image.

    Attributes:
        channels: of an image.
        size: its height and width in pixels.
        templates: of each class.
        grid: points a side of a template's grid; each channel has a grid of its own.
        shared: the part of a template's variance that all templates have in common.
        shift: an image is moved by up to this, uniformly, down and to the right.
        scale: it is enlarged by exp(s), s uniform up to this, of either sign.
        bend: standard deviation of the moves of the points of a 4 by 4 grid, interpolated by cubics
            between them; beyond its edges a template is reflected.
        contrast: differences from one half are multiplied by a number from this to 1, uniformly.
        brightness: standard deviation of a number that is added to each channel.
        cover: longest side of the rectangle; sides are uniform, as are place and colour.
        noise: standard deviation of what is added to each pixel. Values are then cut to [0, 1].
    """

    channels: int
    size: int
    templates: int
    grid: int
    shared: float
    shift: float
    scale: float
    bend: float
    contrast: float
    brightness: float
    cover: float
    noise: float


GREY = Recipe(
    channels=1,
    size=28,
    templates=3,
    grid=6,
    shared=0.5,
    shift=0.1,
    scale=0.2,
    bend=0.04,
    contrast=0.4,
    brightness=0.0,
    cover=0.4,
    noise=0.15,
)
COLOUR = Recipe(
    channels=3,
    size=32,
    templates=8,
    grid=6,
    shared=0.5,
    shift=0.15,
    scale=0.25,
    bend=0.04,
    contrast=0.3,
    brightness=0.1,
    cover=0.5,
    noise=0.2,
)


def draw(recipe: Recipe, train: int = 10_000, validation: int = 2_000, seed: int = 0) -> list[Part]:
    """Two sets of images of the same templates.

    Args:
        recipe: how; `GREY` is like Fashion-MNIST in shape, `COLOUR` like CIFAR-10.
        train: images of the first set.
        validation: images of the second.
        seed: of all that is drawn; equal seeds give equal images.

    Returns:
        For each set, images as float32 [n, channels, size, size] in [0, 1] and labels as int64
        [n], which go round: 0 to 9, and again.

    Example:
        >>> [(images, labels), _] = draw(GREY, 20, 10)
        >>> images.shape
        torch.Size([20, 1, 28, 28])
    """
    source = torch.Generator().manual_seed(seed)
    templates = _templates(recipe, source)
    return [_images(recipe, templates, count, source) for count in (train, validation)]


def _templates(recipe: Recipe, source: torch.Generator) -> Tensor:
    """All templates, [classes, templates, channels, size, size]."""
    count, shape = CLASSES * recipe.templates, (recipe.channels, recipe.grid)
    own, common = (_fields(n, *shape, recipe.size, source) for n in (count, 1))
    fields = (1 - recipe.shared) ** 0.5 * own + recipe.shared**0.5 * common
    return torch.sigmoid(3 * fields).view(CLASSES, -1, *own.shape[1:])


def _images(recipe: Recipe, templates: Tensor, count: int, source: torch.Generator) -> Part:
    labels = torch.arange(count) % CLASSES
    chosen = torch.randint(recipe.templates, (count,), generator=source)
    places = _places(recipe, count, source)
    x = functional.grid_sample(
        templates[labels, chosen], places, padding_mode="reflection", align_corners=False
    )
    contrast = recipe.contrast + (1 - recipe.contrast) * _uniform(source, count, 1, 1, 1)
    light = recipe.brightness * torch.randn(count, recipe.channels, 1, 1, generator=source)
    x = 0.5 + contrast * (x - 0.5) + light
    x = torch.where(_covered(recipe, count, source), _uniform(source, *light.shape), x)
    x = x + recipe.noise * torch.randn(x.shape, generator=source)
    return x.clamp(0, 1), labels


def _places(recipe: Recipe, count: int, source: torch.Generator) -> Tensor:
    """Where in its template each pixel looks, [n, size, size, 2], from -1 to 1 and beyond."""
    scale = torch.exp(recipe.scale * (2 * _uniform(source, count) - 1))
    shift = 2 * recipe.shift * (2 * _uniform(source, count, 2) - 1)
    affine = torch.cat([torch.eye(2) / scale.view(-1, 1, 1), -shift.unsqueeze(2)], 2)
    grid = functional.affine_grid(affine, [count, 1, recipe.size, recipe.size], align_corners=False)
    bends = _fields(count, 2, 4, recipe.size, source).permute(0, 2, 3, 1)
    return grid + 2 * recipe.bend * bends


def _covered(recipe: Recipe, count: int, source: torch.Generator) -> Tensor:
    """The pixels below the rectangles, [n, 1, size, size]."""
    half = recipe.cover / 2 * _uniform(source, count, 2, 1)
    middle = _uniform(source, count, 2, 1)
    pixels = (torch.arange(recipe.size) + 0.5) / recipe.size
    inside = (pixels - middle).abs() < half
    return (inside[:, 0, :, None] & inside[:, 1, None, :]).unsqueeze(1)


def _fields(count: int, channels: int, grid: int, size: int, source: torch.Generator) -> Tensor:
    """Smooth fields, [n, channels, size, size], of normal numbers at the points of a grid."""
    coarse = torch.randn(count, channels, grid, grid, generator=source)
    return functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)


def _uniform(source: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=source)
