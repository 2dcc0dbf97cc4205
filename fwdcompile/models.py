"""The architectures of the paper (section 5) and one with local losses, for any size of image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from .local import Local

HIDDEN = 1024
CHANNELS = 64


def logistic_regression(shape: Sequence[int], classes: int) -> nn.Module:
    """Multinomial logistic regression, section 5.3.

    Args:
        shape: of an image, (channels, height, width).
        classes: number of classes.

    Returns:
        A float32 module from [batch, *shape] to logits [batch, classes].

    Raises:
        ValueError: a shape that is not three positive numbers, or fewer than one class.

    Example:
        >>> logistic_regression((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    _check(shape, classes)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))


def mlp(shape: Sequence[int], classes: int) -> nn.Module:
    """Fully connected layers of 1024, 1024 and `classes`, with ReLU between, section 5.4.

    Arguments, result and errors as for `logistic_regression`.

    Example:
        >>> mlp((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    _check(shape, classes)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, classes),
    )


def cnn(shape: Sequence[int], classes: int) -> nn.Module:
    """Four 3x3 convolutions of 64 channels, pooled after the 2nd and 4th, section 5.5.

    Arguments, result and errors as for `logistic_regression`; images need at least 4 by 4 pixels.

    Example:
        >>> cnn((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    _check(shape, classes)
    channels, height, width = shape
    if height < 4 or width < 4:
        raise ValueError(f"two poolings need images of at least 4 by 4, not {height} by {width}")
    features = CHANNELS * (height // 4) * (width // 4)
    return nn.Sequential(
        *_block(channels),
        *_block(CHANNELS),
        nn.Flatten(),
        nn.Linear(features, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, classes),
    )


def deep_mlp(depth: int, shape: Sequence[int], classes: int) -> nn.Module:
    """Layers of width 1024 with ReLU behind each and one of `classes` at the end, section 5.6.

    No layer has a bias. Weights are He's: under torch's own, 100 layers shrink the signal to
    denormal numbers.

    Args:
        depth: number of layers of width 1024, at least 1.
        shape: of an image, (channels, height, width).
        classes: number of classes.

    Returns:
        A float32 module from [batch, *shape] to logits [batch, classes].

    Raises:
        ValueError: no layer, a shape that is not three positive numbers, or fewer than one class.

    Example:
        >>> deep_mlp(3, (1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    _check(shape, classes)
    if depth < 1:
        raise ValueError(f"depth must be at least 1, not {depth}")
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(depth):
        layer = nn.Linear(HIDDEN if i else math.prod(shape), HIDDEN, bias=False)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, classes, bias=False))


def local_mlp(shape: Sequence[int], classes: int, depth: int = 3, width: int = 256) -> Local:
    """Blocks of one linear layer with ReLU, each with a linear head and a loss of its own.

    The losses are another objective than that of the last head, greedy and so biased: see `Local`,
    and Ren, Kornblith, Liao and Hinton, "Scaling forward gradient with local losses", 2023.

    Args:
        shape: of an image, (channels, height, width).
        classes: number of classes.
        depth: number of blocks, at least 1.
        width: of each.

    Returns:
        A float32 module from [batch, *shape] to `depth` logits [batch, classes] in a list; in
        evaluation mode to the last of them.

    Raises:
        ValueError: no block or no width, a shape that is not three positive numbers, or fewer than
            one class.

    Example:
        >>> len(local_mlp((1, 8, 8), 10)(torch.zeros(2, 1, 8, 8)))
        3
    """
    _check(shape, classes)
    if depth < 1 or width < 1:
        raise ValueError(f"depth and width must be at least 1, not {depth} and {width}")
    layers = [nn.Linear(width if i else math.prod(shape), width) for i in range(depth)]
    blocks = [nn.Sequential(layer, nn.ReLU()) for layer in layers]
    blocks[0].insert(0, nn.Flatten())
    return Local(blocks, [nn.Linear(width, classes) for _ in layers])


MODELS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "logistic-regression": logistic_regression,
    "mlp": mlp,
    "cnn": cnn,
    "local-mlp": local_mlp,
}


def _block(inputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, CHANNELS, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]


def _check(shape: Sequence[int], classes: int) -> None:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"an image is channels, height and width, each positive, not {shape}")
    if classes < 1:
        raise ValueError(f"a classifier needs at least one class, not {classes}")
