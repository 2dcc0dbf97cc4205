"""Data sets for the runner: handwritten digits, MNIST and Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .errors import DataError

NAMES = ("digits", "mnist", "fashion-mnist")


@dataclass(frozen=True)
class Dataset:
    """Images as float32 [n, channels, height, width] in [0, 1], labels as int64 [n]."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]

    @property
    def classes(self) -> int:
        """The number of different labels."""
        return int(self.train[1].max()) + 1

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on another device."""
        train, validation = ((x.to(device), y.to(device)) for x, y in (self.train, self.validation))
        return Dataset(train, validation)


def load(name: str, root: str | Path | None = None) -> Dataset:
    """Loads a data set by name.

    Args:
        name: "digits" (1,797 images of 8 by 8, shipped with scikit-learn), "mnist" or
            "fashion-mnist" (torchvision's; the validation set is their test set).
        root: for torchvision's sets, the directory that holds `MNIST/raw` or `FashionMNIST/raw`;
            what is missing there is downloaded.

    Raises:
        DataError: unknown name, missing directory, or a download that failed.

    Example:
        >>> data = load("digits")
        >>> data.train[0].shape
        torch.Size([1437, 1, 8, 8])
    """
    if name == "digits":
        return _digits()
    if name not in NAMES:
        raise DataError(f"no data set is called {name!r}; there are {', '.join(NAMES)}")
    if root is None:
        raise DataError(f"{name} needs a directory: give --data-root DIR")
    if not Path(root).is_dir():
        raise DataError(f"the data directory {root} does not exist")
    return _torchvision_set(name, Path(root))


def batches(
    data: tuple[Tensor, Tensor], size: int, seed: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless minibatches of one size, in an order that the seed decides.

    Each epoch is shuffled anew. A batch may run over the end of an epoch into the next, so that
    every image is used and every batch has the same size: no step recompiles.

    Args:
        data: images and labels.
        size: of a batch.
        seed: of the order.
        start: the number of the first batch, to continue a run.
    """
    images, labels = data
    count = len(labels)
    number = start
    while True:
        places = range(number * size, (number + 1) * size)
        epochs = {place // count for place in places}
        orders = {epoch: _order(count, seed, epoch, labels.device) for epoch in epochs}
        index = torch.stack([orders[place // count][place % count] for place in places])
        yield images[index], labels[index]
        number += 1


def import_torchvision() -> ModuleType:
    """Imports torchvision, also beside a CPU build of torch.

    The wheel on PyPI is built for CUDA: beside a CPU torch its compiled ops do not load and the
    import stops at `operator torchvision::nms does not exist`. Two declared schemas mend that.
    """
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        if not hasattr(torch.ops.torchvision, schema.split("(")[0]):
            _LIBRARY.define(schema)
    import torchvision

    return torchvision  # type: ignore[no-any-return]


_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
_orders: dict[tuple[int, int, int, str], Tensor] = {}


def _order(count: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    key = (count, seed, epoch, str(device))
    if key not in _orders:
        for old in [k for k in _orders if k[2] < epoch - 1]:
            del _orders[old]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        _orders[key] = torch.randperm(count, generator=generator).to(device)
    return _orders[key]


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out = len(labels) // 5
    validation, train = order[:held_out], order[held_out:]
    return Dataset((images[train], labels[train]), (images[validation], labels[validation]))


def _torchvision_set(name: str, root: Path) -> Dataset:
    datasets = import_torchvision().datasets
    kind = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
    parts = []
    for train in (True, False):
        try:
            part = kind(root, train=train, download=not (root / kind.__name__ / "raw").is_dir())
        except Exception as error:
            raise DataError(f"{name} is not in {root} and cannot be had: {error}") from error
        parts.append((part.data.unsqueeze(1).to(torch.float32) / 255, part.targets.long()))
    return Dataset(*parts)
