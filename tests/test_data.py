from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fwdcompile.data import Dataset, batches, import_torchvision, load
from fwdcompile.errors import DataError
from fwdcompile.synthetic import COLOUR, GREY, Recipe, draw


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count)
    return labels.to(torch.float32).view(count, 1, 1, 1), labels


def write_mnist(folder: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    """The raw files of MNIST, as torchvision reads them."""
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        head = struct.pack(">IIII", 0x803, *images.shape)
        pixels = bytes(images.flatten().tolist())
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + pixels)
        head = struct.pack(">II", 0x801, len(labels))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(labels.tolist()))


def test_digits_are_scaled_split_and_complete() -> None:
    data = load("digits")
    (images, labels), (held_images, held_labels) = data.train, data.validation
    assert images.shape == (1438, 1, 8, 8) and held_images.shape == (359, 1, 8, 8)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.min() == 0 and images.max() == 1
    assert data.classes == 10 and data.shape == (1, 8, 8)
    assert torch.bincount(labels).min() > 100 and torch.bincount(held_labels).min() > 15
    assert torch.equal(torch.cat([labels, held_labels]).bincount().sum(), torch.tensor(1797))


def test_digits_split_is_fixed_and_without_overlap() -> None:
    first, second = load("digits"), load("digits")
    assert torch.equal(first.train[0], second.train[0])
    together = torch.cat([first.train[0], first.validation[0]]).flatten(1)
    assert len(together.unique(dim=0)) == len(together)


def test_to_moves_every_tensor() -> None:
    data = Dataset(numbered(4), numbered(2)).to("meta")
    assert {x.device.type for part in (data.train, data.validation) for x in part} == {"meta"}


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_reads_torchvision_sets_from_raw_files(tmp_path: Path, name: str, folder: str) -> None:
    images, labels = torch.randint(0, 256, (5, 28, 28)), torch.tensor([3, 1, 4, 1, 5])
    write_mnist(tmp_path / folder / "raw", images, labels)
    data = load(name, tmp_path, download=False)
    assert torch.equal(data.train[0], images.view(5, 1, 28, 28).to(torch.float32) / 255)
    assert torch.equal(data.train[1], labels) and data.train[1].dtype == torch.int64
    assert torch.equal(data.validation[1], labels)


@pytest.mark.parametrize(
    ("name", "shape", "mean"),
    [("synthetic-grey", (1, 28, 28), 0.5195), ("synthetic-colour", (3, 32, 32), 0.4731)],
)
def test_images_from_the_generator(name: str, shape: tuple[int, ...], mean: float) -> None:
    data = load(name)
    assert data.shape == shape and data.classes == 10
    for (images, labels), count in ((data.train, 10_000), (data.validation, 2_000)):
        assert images.shape == (count, *shape) and images.dtype == torch.float32
        assert labels.dtype == torch.int64 and labels.bincount().tolist() == [count // 10] * 10
        assert images.min() == 0 and images.max() == 1
    # results in docs are of these images
    assert float(data.train[0].mean()) == pytest.approx(mean, abs=1e-3)


def test_the_generator_follows_its_seed() -> None:
    first, again, other = (draw(GREY, 40, 20, seed)[0][0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    together = torch.cat([images for images, _ in draw(GREY, 40, 20)]).flatten(1)
    assert len(together.unique(dim=0)) == 60


def linear_accuracy(train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> float:
    """Of ridge regression on the pixels, solved among the images."""
    mean = train[0].mean(0)
    x, x_new = ((images - mean).flatten(1) for images in (train[0], validation[0]))
    targets = one_hot(train[1], 10).float() - 0.1
    dual = torch.linalg.solve(x @ x.T + 300 * torch.eye(len(x)), targets)
    return float(((x_new @ (x.T @ dual)).argmax(1) == validation[1]).float().mean())


@pytest.mark.parametrize(("recipe", "low", "high"), [(GREY, 0.65, 0.85), (COLOUR, 0.35, 0.6)])
def test_generated_classes_are_neither_trivial_nor_linear(
    recipe: Recipe, low: float, high: float
) -> None:
    assert low < linear_accuracy(*draw(recipe, 2500, 1000)) < high


def test_centred_data_is_less_the_mean_training_image() -> None:
    data = load("digits")
    centred = data.centred()
    mean = data.train[0].mean(0)
    assert centred.train[0].mean(0).abs().max() < 1e-5
    for mine, true in ((centred.train, data.train), (centred.validation, data.validation)):
        torch.testing.assert_close(mine[0] + mean, true[0])
        assert mine[1] is true[1]


def test_held_out_images_are_of_the_training_set_and_no_others() -> None:
    data = Dataset(numbered(50), numbered(3))
    parts = data.held_out(20)
    assert parts.train[1].tolist() + parts.validation[1].tolist() != list(range(50))
    assert len(parts.validation[1]) == 20
    both = torch.cat([parts.train[1], parts.validation[1]])
    assert both.sort().values.tolist() == list(range(50))
    assert torch.equal(parts.validation[0].flatten(), parts.validation[1].float())
    assert torch.equal(parts.validation[1], data.held_out(20).validation[1])
    assert not torch.equal(parts.validation[1], data.held_out(20, seed=1).validation[1])
    # a larger part holds the smaller one
    assert torch.equal(data.held_out(30).validation[1][10:], parts.validation[1])


@pytest.mark.parametrize("count", [0, 50, -1])
def test_held_out_leaves_something_on_both_sides(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 49 can be held out"):
        Dataset(numbered(50), numbered(3)).held_out(count)


def test_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set is called 'cifar'; there are digits, mnist"):
        load("cifar")
    with pytest.raises(DataError, match="mnist needs a directory: give --data-root"):
        load("mnist")
    with pytest.raises(DataError, match="nowhere does not exist"):
        load("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"mnist is not in .*MNIST/raw, and may not be fetched"):
        load("mnist", tmp_path, download=False)


def test_a_failed_download_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = import_torchvision().datasets.MNIST

    def refuse(self: object) -> None:
        raise RuntimeError("no route")

    monkeypatch.setattr(kind, "download", refuse)
    with pytest.raises(DataError, match="the download failed: no route"):
        load("mnist", tmp_path)


def test_torchvision_imports_with_its_ops_declared() -> None:
    assert import_torchvision().models.resnet18 is not None
    assert import_torchvision() is import_torchvision()
    assert torch.ops.torchvision.nms is not None


def test_batches_have_one_size_and_visit_everything_once_an_epoch() -> None:
    stream = batches(numbered(10), 4, seed=0)
    labels = torch.cat([y for _, y in itertools.islice(stream, 5)])
    assert labels[:10].sort().values.tolist() == list(range(10))
    assert labels[10:].sort().values.tolist() == list(range(10))
    assert labels[:10].tolist() != labels[10:].tolist()


def test_batches_pair_images_with_labels_and_may_exceed_the_data() -> None:
    x, y = next(batches(numbered(3), 8, seed=1))
    assert torch.equal(x.flatten(), y.to(torch.float32))
    assert y.bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_batches_follow_the_seed_and_continue_from_a_number() -> None:
    def labels(seed: int, start: int, count: int) -> list[list[int]]:
        stream = batches(numbered(10), 3, seed, start)
        return [y.tolist() for _, y in itertools.islice(stream, count)]

    assert labels(0, 0, 9) == labels(0, 0, 9)
    assert labels(0, 0, 9)[5:] == labels(0, 5, 4)
    assert labels(0, 0, 9) != labels(1, 0, 9)
    assert labels(-1, 0, 2) != labels(0, 0, 2)


@pytest.mark.parametrize(("count", "size"), [(0, 4), (4, 0)])
def test_batches_refuse_nothing(count: int, size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        batches(numbered(count), size, seed=0)
