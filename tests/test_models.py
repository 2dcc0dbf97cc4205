from __future__ import annotations

import pytest
import torch
from torch import nn

from fwdcompile.models import MODELS, cnn, deep_mlp, logistic_regression, mlp


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 14)])
def test_logits_for_any_image_size(name: str, shape: tuple[int, ...]) -> None:
    out = MODELS[name](shape, 7).eval()(torch.rand(2, *shape))
    assert out.shape == (2, 7) and out.dtype == torch.float32


def test_parameter_counts_on_mnist_images() -> None:
    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    assert count(logistic_regression((1, 28, 28), 10)) == 784 * 10 + 10
    assert count(mlp((1, 28, 28), 10)) == 785 * 1024 + 1025 * 1024 + 1025 * 10
    convolutions = 64 * 10 + 3 * 64 * (64 * 9 + 1)
    assert count(cnn((1, 28, 28), 10)) == convolutions + 1024 * (64 * 49 + 1) + 1025 * 10


def test_cnn_pools_after_the_second_and_fourth_convolution() -> None:
    kinds = [type(m).__name__ for m in cnn((1, 8, 8), 10)]  # type: ignore[arg-type]
    block = ["Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d"]
    assert kinds == [*block, *block, "Flatten", "Linear", "ReLU", "Linear"]


def test_the_deep_mlp_has_as_many_layers_of_1024_as_asked_for_and_no_bias() -> None:
    shapes = [tuple(p.shape) for p in deep_mlp(3, (3, 5, 4), 7).parameters()]
    assert shapes == [(1024, 60), (1024, 1024), (1024, 1024), (7, 1024)]


def test_the_deep_mlp_keeps_the_size_of_its_signal() -> None:
    model = deep_mlp(30, (1, 8, 8), 10)
    x = torch.randn(16, 1, 8, 8)
    hidden = model[:-1](x).detach()  # type: ignore[index]
    assert 0.3 < float(hidden.square().mean() / x.square().mean()) < 3


def test_the_deep_mlp_refuses_no_layer_and_impossible_sizes() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        deep_mlp(0, (1, 8, 8), 10)
    with pytest.raises(ValueError, match="positive"):
        deep_mlp(1, (1, 0, 8), 10)


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [((8, 8), 10, "channels, height and width"), ((1, 0, 8), 10, "positive"), ((1, 8, 8), 0, "at")],
)
@pytest.mark.parametrize("name", MODELS)
def test_refuses_impossible_sizes(
    name: str, shape: tuple[int, ...], classes: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MODELS[name](shape, classes)


def test_cnn_refuses_images_too_small_to_pool() -> None:
    with pytest.raises(ValueError, match="at least 4 by 4, not 3 by 8"):
        cnn((1, 3, 8), 10)
