# ruff: noqa: C408 (keywords read like the configurations they fill)
"""Tiny configurations of the target families, three or four text layers 32 wide.

Whatever makes a family hard for tree decoding is kept, and made small enough to bite within a short prompt: sliding
windows, attention chunks, M-RoPE, shared keys and values, soft-capping, logit scales, experts.
"""

from __future__ import annotations

from typing import Any

import transformers as hf
from packaging.version import Version
from transformers import PreTrainedConfig

VOCAB_SIZE = 104
PAD, BOS, EOS = 0, 1, 2
TEXT_IDS = (3, 90)  # ordinary tokens, half open
IMAGE, VIDEO, AUDIO, START, END, BREAK, VIDEO_START, VIDEO_END = range(96, 104)
PLACEHOLDERS = (PAD, IMAGE, VIDEO, AUDIO)
WINDOW = 8  # sliding windows and attention chunks

TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
)  # fmt: skip
ALTERNATING = TEXT | dict(
    num_hidden_layers=4, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2
)
VISION: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_channels=3, image_size=16, patch_size=4
)  # fmt: skip
LARGE_VISION = VISION | dict(image_size=32)  # where 2x2 patches share a token

QWEN_VISION: dict[str, Any] = dict(
    depth=2, num_heads=2, in_channels=3, patch_size=4, spatial_merge_size=2, temporal_patch_size=2
)
QWEN_IDS: dict[str, Any] = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
)
MROPE: dict[str, Any] = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1])
ANYRES = [[16, 32], [32, 16]]


def llava_clip_llama() -> PreTrainedConfig:
    return hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=hf.CLIPVisionConfig(**VISION), image_token_index=IMAGE
    )


def llava_pixtral_mistral() -> PreTrainedConfig:
    """Every layer slides, as in Mistral 7B v0.1."""
    return hf.LlavaConfig(
        text_config=hf.MistralConfig(**TEXT, sliding_window=WINDOW),
        vision_config=hf.PixtralVisionConfig(**LARGE_VISION),
        image_token_index=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip


def llava_next() -> PreTrainedConfig:
    return hf.LlavaNextConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=hf.CLIPVisionConfig(**VISION | dict(patch_size=8)),
        image_token_index=IMAGE, image_grid_pinpoints=ANYRES,
    )  # fmt: skip


def llava_onevision() -> PreTrainedConfig:
    return hf.LlavaOnevisionConfig(
        text_config=hf.Qwen2Config(**TEXT),
        vision_config=hf.SiglipVisionConfig(**VISION | dict(patch_size=8), vision_use_head=False),
        image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=ANYRES,
    )  # fmt: skip


def mistral3() -> PreTrainedConfig:
    return hf.Mistral3Config(
        text_config=hf.MistralConfig(**TEXT, sliding_window=None),
        vision_config=hf.PixtralVisionConfig(**LARGE_VISION),
        image_token_index=IMAGE, spatial_merge_size=2, tie_word_embeddings=False,
    )  # fmt: skip


def idefics3() -> PreTrainedConfig:
    return hf.Idefics3Config(text_config=hf.LlamaConfig(**TEXT), vision_config=LARGE_VISION, image_token_id=IMAGE)


def smolvlm() -> PreTrainedConfig:
    return hf.SmolVLMConfig(text_config=hf.LlamaConfig(**TEXT), vision_config=LARGE_VISION, image_token_id=IMAGE)


def gemma3() -> PreTrainedConfig:
    """Pictures attend both ways and windows slide on every other layer."""
    return hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**ALTERNATING, query_pre_attn_scalar=1),
        vision_config=hf.SiglipVisionConfig(**LARGE_VISION, vision_use_head=False),
        mm_tokens_per_image=16, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip


def gemma4(**text: Any) -> PreTrainedConfig:
    """Full layers have wider heads; pictures attend both ways; soft-capped logits."""
    dense = dict(
        global_head_dim=16, hidden_size_per_layer_input=0, final_logit_softcapping=5.0, use_bidirectional_attention="vision"
    )  # fmt: skip
    return hf.Gemma4Config(
        text_config=hf.Gemma4TextConfig(**ALTERNATING | dense | text),
        vision_config=VISION | dict(num_key_value_heads=2, head_dim=8, pooling_kernel_size=2, position_embedding_size=16),
        audio_config=None, image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO, boi_token_id=START,
        eoi_token_id=END, boa_token_id=VIDEO_START, eoa_token_index=VIDEO_END,
    )  # fmt: skip


def gemma4_shared() -> PreTrainedConfig:
    """The small models' form: per-layer embeddings, and the last two layers reuse earlier keys and values."""
    return gemma4(
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB_SIZE, num_kv_shared_layers=2,
        use_bidirectional_attention=None,
    )  # fmt: skip


def paligemma() -> PreTrainedConfig:
    return _paligemma(hf.GemmaConfig(**TEXT))


def paligemma2() -> PreTrainedConfig:
    return _paligemma(gemma2())


def _paligemma(text_config: PreTrainedConfig) -> PreTrainedConfig:
    return hf.PaliGemmaConfig(
        text_config=text_config, vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        image_token_index=IMAGE, projection_dim=32, hidden_size=32, vocab_size=VOCAB_SIZE,
    )  # fmt: skip


def qwen2_vl(**text: Any) -> PreTrainedConfig:
    return hf.Qwen2VLConfig(
        text_config=hf.Qwen2VLTextConfig(**TEXT | text, rope_parameters=MROPE),
        vision_config=QWEN_VISION | dict(embed_dim=16, hidden_size=32, mlp_ratio=2), **QWEN_IDS,
    )  # fmt: skip


def qwen2_vl_sliding() -> PreTrainedConfig:
    return qwen2_vl(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2, num_hidden_layers=4)


def qwen2_5_vl() -> PreTrainedConfig:
    vision = dict(hidden_size=16, intermediate_size=32, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1])
    return hf.Qwen2_5_VLConfig(
        text_config=hf.Qwen2_5_VLTextConfig(**TEXT, rope_parameters=MROPE), vision_config=QWEN_VISION | vision, **QWEN_IDS
    )  # fmt: skip


def qwen3_vl() -> PreTrainedConfig:
    """Features of both vision layers enter the first two text layers."""
    vision = dict(
        hidden_size=16, intermediate_size=32, out_hidden_size=32, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]
    )  # fmt: skip
    return hf.Qwen3VLConfig(
        text_config=hf.Qwen3VLTextConfig(**TEXT, rope_parameters=MROPE | dict(mrope_interleaved=True)),
        vision_config=QWEN_VISION | vision, **QWEN_IDS,
    )  # fmt: skip


def glm4v() -> PreTrainedConfig:
    """Half of each head is rotated."""
    return hf.Glm4vConfig(
        text_config=hf.Glm4vTextConfig(
            **TEXT | dict(head_dim=16), rope_parameters=MROPE | dict(partial_rotary_factor=0.5)
        ),
        vision_config=QWEN_VISION | dict(hidden_size=16, intermediate_size=32, out_hidden_size=32, image_size=32),
        image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=START, image_end_token_id=END,
        video_start_token_id=VIDEO_START, video_end_token_id=VIDEO_END,
    )  # fmt: skip


def internvl() -> PreTrainedConfig:
    return hf.InternVLConfig(
        text_config=hf.Qwen2Config(**TEXT),
        vision_config=hf.InternVLVisionConfig(**LARGE_VISION | dict(image_size=[32, 32], patch_size=[4, 4])),
        image_token_id=IMAGE, image_seq_length=16,
    )  # fmt: skip


def aya_vision() -> PreTrainedConfig:
    """Windows slide on every other layer, which alone has positions; scaled logits."""
    return hf.AyaVisionConfig(
        text_config=hf.Cohere2Config(**ALTERNATING, logit_scale=0.75),
        vision_config=hf.SiglipVisionConfig(**LARGE_VISION, vision_use_head=False), image_token_index=IMAGE,
    )  # fmt: skip


# In transformers 5.24 every forward of `Llama4ForConditionalGeneration` raises, plain ones as well ('image_outputs').
LLAMA4_TAKES_PICTURES = Version(hf.__version__) < Version("5.24")


def llama4(**scaling: Any) -> PreTrainedConfig:
    """Chunked layers alternate with full ones without positions; experts."""
    text = TEXT | dict(
        num_hidden_layers=4, layer_types=["chunked_attention", "full_attention"] * 2, no_rope_layers=[1, 0, 1, 0],
        attention_chunk_size=WINDOW, num_local_experts=2, intermediate_size_mlp=64, moe_layers=[1, 3], **scaling,
    )  # fmt: skip
    if not LLAMA4_TAKES_PICTURES:
        return hf.Llama4TextConfig(**text)
    vision = LARGE_VISION | dict(
        intermediate_size=64, projector_input_dim=32, projector_output_dim=32, vision_output_dim=32
    )
    return hf.Llama4Config(
        text_config=hf.Llama4TextConfig(**text), vision_config=hf.Llama4VisionConfig(**vision),
        image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip


def llama4_scaled() -> PreTrainedConfig:
    """Queries of the layers without positions grow with the position within a short prompt already."""
    return llama4(floor_scale=16, attn_scale=0.5) if LLAMA4_TAKES_PICTURES else llama4(floor_scale=5, attn_scale=0.7)


def llama() -> PreTrainedConfig:
    return hf.LlamaConfig(**TEXT)


def gemma2() -> PreTrainedConfig:
    """Soft-capped logits; the cap on attention scores acts in eager attention only (transformers' sdpa ignores it)."""
    return hf.Gemma2Config(
        **ALTERNATING, query_pre_attn_scalar=8, final_logit_softcapping=5.0, attn_logit_softcapping=20.0
    )


def cohere() -> PreTrainedConfig:
    """Scaled logits."""
    return hf.CohereConfig(**TEXT, logit_scale=0.75)
