"""The diffusion models of zoo.py: those of Hugging Face's diffusers, made small."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from zoo_sciences import Built

WIDTHS = (8, 16)
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": WIDTHS,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CROSS = {
    **UNET,
    "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}
IMAGE: dict[str, Any] = {**HEADS, "in_channels": 4, "num_layers": 2, "sample_size": 8}
JOINT = {"joint_attention_dim": 16, "caption_projection_dim": 16, "out_channels": 4}

X, TEXT, TIME = (1, 4, 8, 8), (1, 5, 16), torch.tensor([3])
# The class, its settings, and the inputs: a shape stands for a tensor.
DIFFUSION: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "UNet2DModel": (
        {
            **UNET,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,
        },
        ((1, 3, 16, 16), TIME),
    ),
    "UNet2DConditionModel": (CROSS | {"attention_head_dim": 4}, (X, TIME, TEXT)),
    "ControlNetModel": (
        {k: v for k, v in CROSS.items() if k not in ("sample_size", "up_block_types")}
        | {"attention_head_dim": 4, "conditioning_embedding_out_channels": (4, 8)},
        (X, TIME, TEXT, (1, 3, 16, 16)),
    ),
    "AutoencoderKL": (
        {
            "block_out_channels": WIDTHS,
            "norm_num_groups": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        ((1, 3, 16, 16),),
    ),
    "VQModel": (
        {"block_out_channels": (8,), "norm_num_groups": 4, "num_vq_embeddings": 16},
        ((1, 3, 16, 16),),
    ),
    "AutoencoderOobleck": (
        {
            "encoder_hidden_size": 8,
            "downsampling_ratios": [2, 2],
            "channel_multiples": [1, 2],
            "decoder_channels": 8,
            "decoder_input_channels": 4,
            "audio_channels": 1,
        },
        ((1, 1, 64),),
    ),
    "AutoencoderDC": (
        {
            "latent_channels": 4,
            "attention_head_dim": 4,
            **{
                f"{part}_{name}": thing
                for part in ("encoder", "decoder")
                for name, thing in (
                    ("block_types", ("ResBlock", "EfficientViTBlock")),
                    ("block_out_channels", (8, 8)),
                    ("layers_per_block", (1, 1)),
                    ("qkv_multiscales", ((), (5,))),
                )
            },
        },
        ((1, 3, 8, 8),),
    ),
    "DiTTransformer2DModel": (
        IMAGE | {"out_channels": 4, "num_embeds_ada_norm": 10, "norm_num_groups": 4},
        (X, TIME, torch.tensor([1])),
    ),
    "PixArtTransformer2DModel": (
        IMAGE | {"cross_attention_dim": 16, "caption_channels": 16, "norm_num_groups": 4},
        (X, TEXT, TIME),
    ),
    "SD3Transformer2DModel": (
        IMAGE | JOINT | {"patch_size": 2, "pooled_projection_dim": 16, "pos_embed_max_size": 8},
        (X, TEXT, (1, 16), TIME),
    ),
    "FluxTransformer2DModel": (
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
        ((1, 16, 4), TEXT, (1, 16), torch.tensor([0.3]), (16, 3), torch.zeros(5, 3)),
    ),
    "SanaTransformer2DModel": (
        IMAGE
        | {
            "out_channels": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "patch_size": 1,
        },
        (X, TEXT, TIME),
    ),
    "AuraFlowTransformer2DModel": (
        {
            **HEADS,
            **JOINT,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "pos_embed_max_size": 16,
        },
        (X, TEXT, TIME),
    ),
    "CogVideoXTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": 1,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 5,
        },
        ((1, 2, 4, 8, 8), TEXT, TIME),
    ),
    "LTXVideoTransformer3DModel": (
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "num_layers": 1,
            "caption_channels": 16,
        },
        ((1, 16, 4), TEXT, TIME, torch.ones(1, 5), 1, 4, 4),
    ),
    "PriorTransformer": (
        HEADS
        | {"num_layers": 2, "embedding_dim": 16, "num_embeddings": 5, "additional_embeddings": 4},
        ((1, 16), TIME, (1, 16), TEXT),
    ),
}


class First(nn.Module):
    """A model that gives its result in a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        """The result, or the results."""
        return self.model(*args, return_dict=False)


def build(name: str) -> Built:
    """A model with random weights, and its inputs."""
    import diffusers

    settings, inputs = DIFFUSION[name]
    model = getattr(diffusers, name)(**settings)
    return First(model), tuple(torch.randn(x) if isinstance(x, tuple) else x for x in inputs)
