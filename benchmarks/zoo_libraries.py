"""The models of zoo.py that other libraries have: images, diffusion, graphs, atoms, flows.

pip install -e '.[libraries]'
"""

from __future__ import annotations

import torch
import zoo_diffusion
import zoo_sciences
from zoo_sciences import Built

from fwdcompile.data import import_torchvision

# One of each of timm's families that torchvision has not, the smallest; those above 90 million
# parameters or 400 by 400 pixels are left out.
TIMM = (
    "beit_base_patch16_224", "haloregnetz_b", "test_byobnet", "cait_xxs24_224", "coat_tiny",
    "convit_tiny", "convmixer_768_32", "convnext_atto_rms", "cpubone_nano", "crossvit_tiny_240",
    "cs3darknet_focus_s", "cspnext_tiny", "davit_tiny", "deit_tiny_patch16_224", "dla46x_c",
    "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0",
    "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "eva02_tiny_patch14_224",
    "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050",
    "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224", "hieradet_small", "hrnet_w18_small",
    "iformer_t", "inception_next_atto", "ens_adv_inception_resnet_v2", "inception_v4",
    "lcnetv2_small", "levit_128s", "lowformer_b0", "test_mambaout", "coatnet_pico_rw_224",
    "poolformerv2_s12", "gmlp_ti16_224", "lcnet_035", "mobilenetv5_base", "mobilevit_xxs",
    "mvitv2_tiny", "jx_nest_tiny", "nextvit_small", "test_nfnet", "pit_ti_224", "pvt_v2_b0",
    "rdnet_tiny", "repghostnet_050", "repvit_m0_9", "res2next50", "resnest14d", "resnetv2_18",
    "rexnet_100", "selecsls42", "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18",
    "starnet_s050", "swiftformer_xs", "swinv2_cr_tiny_224", "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "visformer_tiny", "test_vit",
    "vit_small_r26_s32_224", "test_vit_relpos", "samvit_base_patch16_224", "vitamin_small_224",
    "volo_d1_224", "ese_vovnet19b_slim_dw", "legacy_xception", "xception41p",
    "xcit_nano_12_p8_224",
)  # fmt: skip


def families() -> dict[str, tuple[str, ...]]:
    """The names by family."""
    return {
        "timm": tuple(f"timm {name}" for name in TIMM),
        "diffusion": tuple(f"diffusers {name}" for name in zoo_diffusion.DIFFUSION),
        **{family: tuple(models) for family, models in zoo_sciences.FAMILIES.items()},
    }


def build(name: str) -> Built:
    """A model with random weights, and its inputs.

    Raises:
        ImportError: the library is not installed.
    """
    import_torchvision()  # see there: most of them do not load without it
    library, _, rest = name.partition(" ")
    torch.manual_seed(0)
    if library == "timm":
        return _image_model(rest)
    if library == "diffusers":
        return zoo_diffusion.build(rest)
    return next(m[name] for m in zoo_sciences.FAMILIES.values() if name in m)()


def _image_model(name: str) -> Built:
    import timm

    model = timm.create_model(name, num_classes=10)
    images = torch.rand(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        model.eval()(images)  # some make a buffer in their first call
    return model, (images,)
