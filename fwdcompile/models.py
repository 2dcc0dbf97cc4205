"""The three architectures of the paper (section 5), for images of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn


def logistic_regression(shape: Sequence[int], classes: int) -> nn.Module:
    """Multinomial logistic regression, section 5.3.

    Args:
        shape: of an image, [channels, height, width].
        classes: number of classes.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(_size(shape), classes))


def mlp(shape: Sequence[int], classes: int) -> nn.Module:
    """Fully connected layers of 1024, 1024 and `classes`, with ReLU between, section 5.4."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(_size(shape), 1024),
        nn.ReLU(),
        nn.Linear(1024, 1024),
        nn.ReLU(),
        nn.Linear(1024, classes),
    )


def cnn(shape: Sequence[int], classes: int) -> nn.Module:
    """Four 3x3 convolutions of 64 channels, pooled after the 2nd and 4th, section 5.5."""
    channels, height, width = shape

    def block(inputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]

    features = 64 * (height // 4) * (width // 4)
    head = [nn.Flatten(), nn.Linear(features, 1024), nn.ReLU(), nn.Linear(1024, classes)]
    return nn.Sequential(*block(channels), *block(64), *head)


MODELS: dict[str, Callable[[Sequence[int], int], nn.Module]] = {
    "logistic-regression": logistic_regression,
    "mlp": mlp,
    "cnn": cnn,
}


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size
