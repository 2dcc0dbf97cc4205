"""The language models of zoo.py: those of Hugging Face's transformers, made small."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fwdcompile.data import import_torchvision

import_torchvision()  # see there: some builds do not load without it
import transformers  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

transformers.logging.set_verbosity_error()

HEADS, WIDTH, TOKENS = 4, 32, 12
SMALL: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "emb_dim", "embedding_size",
         "n_embed", "word_embed_proj_dim", "lm_head_dim"), WIDTH,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "encoder_layers",
         "decoder_layers", "num_decoder_layers", "num_experts_per_tok", "n_group"), 2,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts",
         "state_size", "mamba_d_state", "conv_kernel", "sliding_window", "attention_window",
         "rotary_dim"), HEADS,
    ),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim",
         "moe_intermediate_size", "shared_expert_intermediate_size"), 48,
    ),
    **dict.fromkeys(
        ("head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "mamba_n_heads",
         "mamba_d_head"), WIDTH // HEADS,
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "projection_dim"), 16),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length",
         "max_source_positions", "max_target_positions"), 64,
    ),
    "vocab_size": 99, "num_key_value_heads": 2, "num_kv_heads": 2, "topk_group": 1,
    "type_vocab_size": 2, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2,
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
COMPUTED = ("head_dim", "num_key_value_heads")  # where None
LISTED = ("layer_types", "attention_types", "layers_block_type", "mlp_layer_types")

FURTHER: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 2 * WIDTH // 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "xmod": {"default_language": "en_XX"},
}
# No small model comes from these sizes: others are tied to them, or float64 is not taken. That of
# hrm_text calls torch.no_grad, where reverse mode stops and forward mode does not.
LEFT_OUT = (
    "blt", "cohere_compass_text", "dbrx", "dots1", "dots3_note", "dots3_note_text", "falcon_h1",
    "fsmt", "gemma3n", "gemma3n_text", "gemma4", "gemma4_assistant", "gemma4_text",
    "gemma4_unified", "gemma4_unified_assistant", "gemma4_unified_text", "hrm_text",
    "inkling2_loop_text", "inkling2_text", "lfm2_moe", "musicgen", "musicgen_melody",
    "nemo_speechlm", "prophetnet", "qwen4_exp", "qwen4_exp_text", "reformer", "t5gemma",
    "vibevoice_asr", "voxtral_realtime", "xglm", "xlstm", "zamba2",
)  # fmt: skip

TASKS: dict[str, Mapping[str, Any]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "to": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


def names() -> tuple[str, ...]:
    """All of them, as "<architecture> <task>"."""
    return tuple(
        f"{name} {task}" for task, known in TASKS.items() for name in known if name not in LEFT_OUT
    )


class Logits(nn.Module):
    """A language model without caches and hidden states among its results."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, *decoder: Tensor) -> Tensor:
        """The logits; further ids are those of a decoder."""
        named = dict(zip(("decoder_input_ids",), decoder, strict=False))
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask, **named).logits
        return logits


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model with random weights, and its inputs: two sequences, of which one is padded."""
    architecture, task = name.split(" ")
    found = TASKS[task][architecture]
    kind = getattr(transformers, found if isinstance(found, str) else found[0])
    config = _shrunk(kind.config_class())
    for key, size in FURTHER.get(architecture, {}).items():
        setattr(config, key, size)
    config.use_cache, config._experts_implementation = False, "batched_mm"
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():  # many start at zero, where derivatives vanish
        for p in model.parameters():
            p.copy_(0.15 * torch.randn_like(p) + (p if p.ndim < 2 else 0))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # forward mode moves this row, reverse mode does not
    ids = torch.randint(3, 90, (2, TOKENS))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return Logits(model), (ids, mask, *([ids[:, :8]] if task == "to" else []))


def _shrunk(config: Any) -> Any:
    for name, size in SMALL.items():
        with suppress(AttributeError, NotImplementedError):  # it follows from others
            known = getattr(config, name)
            if isinstance(known, int) or (known is None and name in COMPUTED):
                setattr(config, name, size)
    for name in LISTED:
        if isinstance(listed := getattr(config, name, None), list) and len(listed) > 2:
            setattr(config, name, [listed[0], listed[-1]])
    if hasattr(config, "kv_lora_rank"):  # latent attention has no groups of heads
        config.num_key_value_heads = HEADS
    for part in vars(config).values():
        if isinstance(part, transformers.PretrainedConfig):
            _shrunk(part)
    return config
