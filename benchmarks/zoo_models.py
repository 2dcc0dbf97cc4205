"""The models of zoo.py: torchvision's, as small as they can be made, and parts of its detectors.

Language models are in zoo_transformers.py, those of other libraries in zoo_libraries.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import zoo_libraries
import zoo_transformers
from torch import Tensor, nn
from zoo_sciences import Calls

from fwdcompile.data import import_torchvision

# By name, how many frames of which size.
VIDEO = {
    "r3d_18": (4, 32),
    "mc3_18": (4, 32),
    "r2plus1d_18": (4, 32),
    "s3d": (14, 224),
    "mvit_v1_b": (16, 224),
    "mvit_v2_s": (16, 224),
    "swin3d_t": (4, 32),
}
SEGMENTATION = (
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "fcn_resnet50",
    "fcn_resnet101",
    "lraspp_mobilenet_v3_large",
)
# Reverse mode stops at torch.no_grad, forward mode does not.
STOPPED = ("complete_box_iou_loss",)
# Images of 64 by 64 are too small for its auxiliary classifier.
SIZES = {"inception_v3": 299}
PLAIN: dict[str, Any] = {"weights": None}


def families() -> dict[str, tuple[str, ...]]:
    """The names by family, as their libraries have them."""
    models = import_torchvision().models
    return {
        "classification": tuple(models.list_models(module=models)),
        "segmentation": SEGMENTATION,
        "video": tuple(VIDEO),
        "detection": tuple(PARTS),
        "language": zoo_transformers.names(),
        **zoo_libraries.families(),
    }


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model with random weights, and its inputs, in float32."""
    if name in PARTS:
        return PARTS[name]()
    if name in zoo_transformers.names():
        return zoo_transformers.build(name)
    if any(name in names for names in zoo_libraries.families().values()):
        return zoo_libraries.build(name)
    models = import_torchvision().models
    torch.manual_seed(0)
    if name in VIDEO:
        frames, size = VIDEO[name]
        return models.get_model(name, **PLAIN), (torch.rand(1, 3, frames, size, size),)
    if name in SEGMENTATION:
        settings = PLAIN | {"weights_backbone": None, "num_classes": 4}
        return models.get_model(name, **settings), (torch.rand(2, 3, 64, 64),)
    settings, size = PLAIN | {"num_classes": 10}, SIZES.get(name, 64)
    if name.startswith("vit"):
        size = 2 * int(name.rsplit("_", 1)[1])
        settings["image_size"] = size
    elif name.startswith("maxvit"):
        size, settings["input_size"] = 224, (224, 224)
    elif name in ("googlenet", "inception_v3"):
        settings |= {"init_weights": False, "aux_logits": name != "googlenet"}
    return models.get_model(name, **settings), (torch.rand(2, 3, size, size),)


def _detector(part: Callable[[Any, Any], tuple[nn.Module, tuple[Any, ...]]]) -> Any:
    def made() -> tuple[nn.Module, tuple[Any, ...]]:
        torch.manual_seed(0)
        vision = import_torchvision()
        return part(vision.models.detection, vision)

    return made


def _boxes(count: int) -> Tensor:
    corner = torch.rand(count, 2)
    return torch.cat([corner, corner + 0.1 + torch.rand(count, 2)], 1)


def _maps(channels: int = 16) -> tuple[Tensor, Tensor]:
    return torch.rand(2, channels, 8, 8), torch.rand(2, channels, 4, 4)


def _listed(module: nn.Module) -> nn.Module:
    return Calls(lambda *xs: module(list(xs)), module)


PARTS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "resnet50_fpn backbone": _detector(
        lambda d, v: (
            d.backbone_utils.resnet_fpn_backbone(
                backbone_name="resnet50", weights=None, trainable_layers=5
            ),
            (torch.rand(1, 3, 64, 64),),
        )
    ),
    "mobilenet_v3_large_fpn backbone": _detector(
        lambda d, v: (
            d.backbone_utils.mobilenet_backbone(
                backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=6
            ),
            (torch.rand(1, 3, 64, 64),),
        )
    ),
    "vgg16 backbone of ssd300": _detector(
        lambda d, v: (
            d.ssd300_vgg16(weights=None, weights_backbone=None).backbone,
            (torch.rand(1, 3, 300, 300),),
        )
    ),
    "rpn head": _detector(lambda d, v: (_listed(d.rpn.RPNHead(16, 3)), _maps())),
    "retinanet head": _detector(
        lambda d, v: (_listed(d.retinanet.RetinaNetHead(16, 3, 4)), _maps())
    ),
    "fcos head": _detector(lambda d, v: (_listed(d.fcos.FCOSHead(32, 1, 4)), _maps(32))),
    "ssd head": _detector(lambda d, v: (_listed(d.ssd.SSDHead([16, 16], [4, 4], 5)), _maps())),
    "box head": _detector(
        lambda d, v: (
            nn.Sequential(
                d.faster_rcnn.TwoMLPHead(16 * 49, 32), d.faster_rcnn.FastRCNNPredictor(32, 5)
            ),
            (torch.rand(3, 16, 7, 7),),
        )
    ),
    "mask head": _detector(
        lambda d, v: (
            nn.Sequential(
                d.mask_rcnn.MaskRCNNHeads(16, [16, 16], 1), d.mask_rcnn.MaskRCNNPredictor(16, 16, 4)
            ),
            (torch.rand(3, 16, 7, 7),),
        )
    ),
    "keypoint head": _detector(
        lambda d, v: (
            nn.Sequential(
                d.keypoint_rcnn.KeypointRCNNHeads(16, [16, 16]),
                d.keypoint_rcnn.KeypointRCNNPredictor(16, 5),
            ),
            (torch.rand(3, 16, 7, 7),),
        )
    ),
    "sigmoid_focal_loss": _detector(
        lambda d, v: (
            Calls(lambda x, y: v.ops.sigmoid_focal_loss(x, y, reduction="mean")),
            (torch.randn(6, 4), torch.rand(6, 4)),
        )
    ),
    **{
        f"{kind}_box_iou_loss": _detector(
            lambda d, v, kind=kind: (
                Calls(lambda x, y: getattr(v.ops, f"{kind}_box_iou_loss")(x, y, reduction="mean")),
                (_boxes(6), _boxes(6)),
            )
        )
        for kind in ("generalized", "complete", "distance")
    },
}
