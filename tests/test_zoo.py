"""Models of libraries in training mode: the generated program against reverse mode, in float64."""

from __future__ import annotations

import pytest
import torch
import zoo
import zoo_models
from nets import directions, reverse_jvp
from oracle import Case, compare
from torch import nn
from torch.nn import functional as F

import fwdcompile
from fwdcompile.data import import_torchvision
from fwdcompile.objective import Objective

SETTINGS = {"vit_b_16": {"image_size": 64}}
MODELS = [
    "resnet18",
    "mobilenet_v3_small",
    "swin_t",
    "convnext_tiny",
    "efficientnet_b0",
    "vit_b_16",
]


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    model: nn.Module = getattr(import_torchvision().models, name)(
        num_classes=10, **SETTINGS.get(name, {})
    ).double()
    x, y = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 2])
    dots = directions(dict(model.named_parameters()))
    before = {n: b.clone() for n, b in model.named_buffers()}

    torch.manual_seed(5)
    fwd = fwdcompile.transform(Objective(model, F.cross_entropy))
    loss, slope = fwd(x, y, tangents=dots)
    after = {n: b.clone() for n, b in model.named_buffers()}
    for n, b in model.named_buffers():
        b.copy_(before[n])

    torch.manual_seed(5)
    expected = F.cross_entropy(model(x), y)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    for n, b in model.named_buffers():
        torch.testing.assert_close(b, after[n], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(slope, reverse_jvp(model, expected, dots), rtol=1e-8, atol=1e-9)


PARTS = [name for name in zoo_models.PARTS if "backbone" not in name]
ALL = [name for names in zoo_models.families().values() for name in names]


@pytest.mark.parametrize("name", [*PARTS, "r3d_18", "lraspp_mobilenet_v3_large"])
def test_detection_video_and_segmentation(name: str) -> None:
    assert zoo.measure(name, training=True)["right"]


LANGUAGE = [f"{name} causal" for name in ("gpt2", "mixtral", "mamba", "deepseek_v3")]
LANGUAGE += ["xmod causal", "t5 to"]  # the first has sizes that turn out to be known


@pytest.mark.parametrize("name", LANGUAGE)
def test_language(name: str) -> None:
    assert zoo.measure(name, training=True)["right"]


def test_experts_by_the_op_of_a_library() -> None:
    model, inputs = zoo_models.build("mixtral causal")
    model.model.set_experts_implementation("grouped_mm")  # type: ignore[union-attr,operator]
    compared = compare(Case.of(model, inputs))
    assert compared.is_right(torch.float32)
    ops = {str(node.target) for node in compared.lowered.stages["capture"].nodes}
    assert "transformers.grouped_mm_fallback.default" in ops


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_all_models(name: str, training: bool) -> None:
    try:
        zoo_models.build(name)
    except ImportError as error:
        pytest.skip(f"pip install -e '.[libraries]': {error}")
    assert zoo.measure(name, training)["right"]


def test_vision_transformer_on_small_images() -> None:
    models = import_torchvision().models
    model = models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10).double()
    nn.init.normal_(model.heads[0].weight)
    x, y = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 2])
    dots = directions(dict(model.named_parameters()))
    loss, slope = fwdcompile.transform(Objective(model, F.cross_entropy))(x, y, tangents=dots)
    expected = F.cross_entropy(model(x), y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slope, reverse_jvp(model, expected, dots), rtol=1e-8, atol=1e-9)
