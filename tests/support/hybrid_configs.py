# ruff: noqa: C408 (keywords read like the configurations they fill)
"""Tiny configurations of families whose layers keep a state: delta rules, Mamba, short convolutions.

Heads come in groups, kernels are longer than the shortest prompts, chunks shorter than the longest, and the last layer of some
does not attend.
"""

from __future__ import annotations

from typing import Any

import transformers as hf
from family_configs import IMAGE, MROPE, QWEN_IDS, QWEN_VISION, TEXT, WINDOW
from transformers import PreTrainedConfig

MIXED = TEXT | dict(num_hidden_layers=4)
DELTA: dict[str, Any] = dict(
    layer_types=["linear_attention", "full_attention", "full_attention", "linear_attention"], linear_key_head_dim=8,
    linear_value_head_dim=12, linear_num_key_heads=2, linear_num_value_heads=4,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
)
MAMBA: dict[str, Any] = dict(
    mamba_n_heads=4, mamba_n_groups=2, mamba_d_state=8, mamba_d_head=16, mamba_expand=2, mamba_chunk_size=16
)
QWEN3_5_ROPE = MROPE | dict(mrope_interleaved=True, partial_rotary_factor=1.0)
QWEN3_5_VISION = QWEN_VISION | dict(
    hidden_size=16, intermediate_size=32, out_hidden_size=32, num_position_embeddings=64
)
CONVOLVED = MIXED | dict(layer_types=["conv", "full_attention", "full_attention", "conv"])
LFM2_VISION: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_patches=64, patch_size=4,
    vision_use_head=False,
)  # fmt: skip


def qwen3_5() -> PreTrainedConfig:
    text = hf.Qwen3_5TextConfig(**MIXED | DELTA, rope_parameters=QWEN3_5_ROPE)
    return hf.Qwen3_5Config(text_config=text, vision_config=QWEN3_5_VISION, **QWEN_IDS)


def qwen3_5_moe() -> PreTrainedConfig:
    text = hf.Qwen3_5MoeTextConfig(**MIXED | DELTA | EXPERTS, rope_parameters=QWEN3_5_ROPE)
    return hf.Qwen3_5MoeConfig(text_config=text, vision_config=QWEN3_5_VISION, **QWEN_IDS)


def qwen3_next() -> PreTrainedConfig:
    return hf.Qwen3NextConfig(**MIXED | DELTA | EXPERTS, mlp_only_layers=[0])


def olmo_hybrid() -> PreTrainedConfig:
    """Betas up to 2, so that a state may turn round."""
    return hf.OlmoHybridConfig(**MIXED | DELTA | dict(linear_num_key_heads=4))


def kimi_linear() -> PreTrainedConfig:
    """Each channel of a key decays by itself."""
    return hf.KimiLinearConfig(
        **MIXED | dict(num_key_value_heads=4), kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, linear_head_dim=8, linear_num_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "dense", "sparse"],
    )  # fmt: skip


def lfm2_vl() -> PreTrainedConfig:
    return hf.Lfm2VlConfig(
        text_config=hf.Lfm2Config(**CONVOLVED), vision_config=hf.Siglip2VisionConfig(**LFM2_VISION),
        image_token_id=IMAGE, projector_hidden_size=32, tie_word_embeddings=False,
    )  # fmt: skip


def lfm2() -> PreTrainedConfig:
    """A kernel of seven, so that a node sees more of the text than a short prompt has."""
    return hf.Lfm2Config(**CONVOLVED, conv_L_cache=7, tie_word_embeddings=False)


def lfm2_moe() -> PreTrainedConfig:
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_dense_layers=1)
    return hf.Lfm2MoeConfig(**CONVOLVED | experts, tie_word_embeddings=False)


def lfm3() -> PreTrainedConfig:
    """A window, norms around both parts of a layer; since transformers 5.23."""
    return hf.Lfm3Config(
        **CONVOLVED | dict(layer_types=["conv", "sliding_attention", "full_attention", "conv"]),
        sliding_window=WINDOW,
        tie_word_embeddings=False,
        conv_L_cache=7,
    )


def bamba() -> PreTrainedConfig:
    return hf.BambaConfig(**MIXED | MAMBA, attn_layer_indices=[1, 2])


def falcon_h1() -> PreTrainedConfig:
    """Every layer attends and keeps a state."""
    return hf.FalconH1Config(**MIXED | MAMBA, mamba_d_ssm=64)


def granite_hybrid() -> PreTrainedConfig:
    return hf.GraniteMoeHybridConfig(
        **MIXED | MAMBA, layer_types=["linear_attention", "full_attention"] * 2, num_local_experts=4,
        num_experts_per_tok=2, shared_intermediate_size=16,
    )  # fmt: skip


def nemotron_h() -> PreTrainedConfig:
    """A layer is either attention, or Mamba, or an MLP; steps in time have a lower limit in the prompt only."""
    return hf.NemotronHConfig(
        **TEXT, layers_block_type=["mamba", "attention", "mamba", "mlp", "attention", "moe", "mamba"], mamba_num_heads=4,
        mamba_head_dim=16, n_groups=2, ssm_state_size=8, chunk_size=16, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, time_step_limit=(0.001, float("inf")),
    )  # fmt: skip


def zamba2() -> PreTrainedConfig:
    """Attention shared by two layers, each of which keeps a state, too."""
    text = {name: value for name, value in MIXED.items() if name != "head_dim"}
    return hf.Zamba2Config(
        **text | dict(num_key_value_heads=4), layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], mamba_d_state=8,
        mamba_ngroups=2, n_mamba_heads=4, mamba_headdim=16, chunk_size=16, adapter_rank=8, tie_word_embeddings=False,
        use_mem_rope=True,
    )  # fmt: skip


def jamba() -> PreTrainedConfig:
    """Mamba's first form."""
    text = {name: value for name, value in MIXED.items() if name != "head_dim"}
    return hf.JambaConfig(
        **text, num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8,
        mamba_dt_rank=4,
    )  # fmt: skip


def zamba() -> PreTrainedConfig:
    """The same, in heads that are computed one by one."""
    text = {name: value for name, value in MIXED.items() if name != "head_dim"}
    return hf.ZambaConfig(
        **text | dict(num_key_value_heads=4, num_hidden_layers=5), attn_layer_period=2, attn_layer_offset=1,
        mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2, tie_word_embeddings=False,
    )  # fmt: skip


def mamba2() -> PreTrainedConfig:
    """No layer attends."""
    return hf.Mamba2Config(
        vocab_size=TEXT["vocab_size"], hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=8
    )
