"""Data sets for the runner: digits, MNIST, Fashion-MNIST, and images from a generator."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import synthetic
from .errors import DataError

SYNTHETIC = {"synthetic-grey": synthetic.GREY, "synthetic-colour": synthetic.COLOUR}
NAMES = ("digits", "mnist", "fashion-mnist", *SYNTHETIC)


@dataclass(frozen=True)
class Dataset:
    """Images as float32 [n, channels, height, width], from `load` in [0, 1]; labels as int64 [n].

    Attributes:
        train: images and labels to train on.
        validation: images and labels held out.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]

    @property
    def shape(self) -> torch.Size:
        """Of one image: channels, height, width."""
        return self.train[0].shape[1:]

    @property
    def classes(self) -> int:
        """The number of different labels."""
        return int(self.train[1].max()) + 1

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on another device."""
        train, validation = ((x.to(device), y.to(device)) for x, y in (self.train, self.validation))
        return Dataset(train, validation)

    def centred(self) -> Dataset:
        """The same data less the mean training image, pixel by pixel.

        It matters most where activations are perturbed: the noise in a layer's gradient multiplies
        the layer's input, and the mean of the inputs drags all weights the same way.

        Example:
            >>> float(load("digits").centred().train[0].mean(0).abs().max()) < 1e-6
            True
        """
        mean = self.train[0].mean(0)
        train, validation = ((x - mean, y) for x, y in (self.train, self.validation))
        return Dataset(train, validation)

    def held_out(self, count: int, seed: int = 0) -> Dataset:
        """The training set alone, of which some images are held out for validation.

        For searches, as of a learning rate, that must not look at the validation set.

        Args:
            count: how many images, the last of the shuffled training set.
            seed: of the shuffle.

        Raises:
            ValueError: nothing is held out, or nothing is left.

        Example:
            >>> len(load("digits").held_out(300).validation[1])
            300
        """
        images, labels = self.train
        if not 0 < count < len(labels):
            raise ValueError(
                f"of {len(labels)} images 1 to {len(labels) - 1} can be held out, not {count}"
            )
        order = _order(len(labels), seed, 0).to(labels.device)
        train, validation = order[:-count], order[-count:]
        return Dataset((images[train], labels[train]), (images[validation], labels[validation]))


def load(name: str, root: str | Path | None = None, *, download: bool = True) -> Dataset:
    """Loads a data set by name.

    Args:
        name: "digits" (1,797 images of 8 by 8, shipped with scikit-learn, of which a fixed fifth
            is held out), "mnist" or "fashion-mnist" (torchvision's, with its test set held out),
            "synthetic-grey" or "synthetic-colour" (10,000 images of 10 classes from a generator,
            like Fashion-MNIST's or CIFAR-10's in shape, and 2,000 held out; the same on each call).
        root: for torchvision's sets, the directory that holds `MNIST/raw` or `FashionMNIST/raw`.
        download: fetches files that are missing there.

    Raises:
        DataError: unknown name, missing directory or files, or a download that failed.

    Example:
        >>> load("digits").train[0].shape
        torch.Size([1438, 1, 8, 8])
    """
    if name not in NAMES:
        raise DataError(f"no data set is called {name!r}; there are {', '.join(NAMES)}")
    if name == "digits":
        return _digits()
    if name in SYNTHETIC:
        return Dataset(*synthetic.draw(SYNTHETIC[name]))
    if root is None:
        raise DataError(f"{name} needs a directory: give --data-root DIR")
    if not Path(root).is_dir():
        raise DataError(f"the data directory {root} does not exist; create it, or name another")
    return _torchvision_set(name, Path(root), download)


def batches(
    data: tuple[Tensor, Tensor], size: int, seed: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless minibatches of one size, in an order that the seed decides.

    Each epoch is shuffled anew. A batch may run over the end of an epoch into the next, so that
    every image is used and every batch has the same size: no step recompiles.

    Args:
        data: images and labels, of equal length.
        size: of a batch.
        seed: of the order.
        start: the number of the first batch, to continue a run.

    Yields:
        Images [size, ...] and labels [size], on the device of the data.

    Raises:
        ValueError: no data, or a size below 1.

    Example:
        >>> x, y = next(batches(load("digits").train, 64, seed=0))
    """
    images, labels = data
    count = len(labels)
    if count < 1 or size < 1:
        raise ValueError(f"cannot draw batches of {size} from {count} images; both need at least 1")
    return _stream(images, labels, size, seed, start)


def _stream(
    images: Tensor, labels: Tensor, size: int, seed: int, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    count = len(labels)
    order = functools.lru_cache(maxsize=2)(functools.partial(_order, count, seed))
    place = start * size
    while True:
        first, last = place // count, (place + size - 1) // count
        orders = torch.cat([order(epoch) for epoch in range(first, last + 1)])
        index = orders[place - first * count :][:size].to(labels.device)
        yield images[index], labels[index]
        place += size


def _order(count: int, seed: int, epoch: int) -> Tensor:
    """The shuffle of an epoch; made on the CPU, so that it is the same for every device."""
    mixed = (seed * 1_000_003 + epoch) % 2**63
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))


@functools.cache
def import_torchvision() -> ModuleType:
    """Imports torchvision, also beside a CPU build of torch.

    The wheel on PyPI is built for CUDA: beside a CPU torch its compiled ops do not load and the
    import stops at `operator torchvision::nms does not exist`. Two declared schemas mend that;
    where the import works as it is, nothing is declared.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for op in ("nms", "qnms"):
        schema = f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    _kept.append(library)
    return importlib.import_module("torchvision")


_kept: list[torch.library.Library] = []  # a library's ops are gone once it is collected


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out = len(labels) // 5
    validation, train = order[:held_out], order[held_out:]
    return Dataset((images[train], labels[train]), (images[validation], labels[validation]))


def _torchvision_set(name: str, root: Path, download: bool) -> Dataset:
    datasets = importlib.import_module(f"{import_torchvision().__name__}.datasets")
    kind = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
    parts = []
    for train in (True, False):
        try:
            part = kind(root, train=train, download=download)
        except (RuntimeError, OSError, ValueError) as error:
            reason = f"{name} is not in {root}/{kind.__name__}/raw"
            way_out = f"and the download failed: {error}" if download else "and may not be fetched"
            raise DataError(f"{reason}, {way_out}") from error
        parts.append((part.data.unsqueeze(1).to(torch.float32) / 255, part.targets.long()))
    return Dataset(*parts)
