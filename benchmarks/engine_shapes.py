"""Full-size targets with random weights, made on the device.

The vision tower is cut down to one narrow layer: it runs once per prompt, and prompts are text tokens here. The text
decoder and its head, which every step runs, have their full size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from dream_hf import DreamConfig, DreamDrafter
from dream_hf.targets.target import VISUAL_TOKEN_IDS, Target

VISION: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
GAIN = 0.5  # of a linear layer
EMBEDDING_SIZE = 50.0  # of an embedding's entries as they enter the first layer; large beside what all layers add
WINNING_LOGIT = 20.0  # of the token that follows, roughly; the others' are within a few units of 0
FIRST_TEXT_ID = 100  # prompts avoid the special tokens at the start of a vocabulary


@dataclass(frozen=True)
class Shape:
    """A target: its name on the command line, its model class and its configuration."""

    name: str
    model_class: Any
    make_config: Callable[[], PreTrainedConfig]


def llava_next(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, vocab_size: int = 32064
) -> Any:
    """LLaVA-1.6 on Vicuna."""
    text = hf.LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    vision = hf.CLIPVisionConfig(**VISION, image_size=336, patch_size=14)
    return hf.LlavaNextConfig(text_config=text, vision_config=vision, image_token_index=vocab_size - 64)


def smolvlm_2b() -> PreTrainedConfig:
    text = hf.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=49155,
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 273768.0},
    )
    vision = {**VISION, "image_size": 384, "patch_size": 14}
    return hf.SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=49153, scale_factor=3)


def gemma3_12b() -> PreTrainedConfig:
    """Five of six layers look back 1,024 tokens; the head is the embedding, 262,208 rows."""
    text = hf.Gemma3TextConfig(
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        vocab_size=262208,
        sliding_window=1024,
        query_pre_attn_scalar=256,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )
    vision = hf.SiglipVisionConfig(**VISION, image_size=896, patch_size=14, vision_use_head=False)
    return hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=256, image_token_index=262144)


def qwen2_5_vl_7b() -> PreTrainedConfig:
    text = hf.Qwen2_5_VLTextConfig(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=128000,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
    )
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 1, "out_hidden_size": 3584}
    ids = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
    return hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids, vision_end_token_id=151653)


def qwen3_5(width: int, num_layers: int, vocab_size: int, every: int = 4, **text: Any) -> PreTrainedConfig:
    """Gated delta rules, and attention in each `every`-th layer (1: in all); heads as in transformers' default, 9B."""
    kinds = ["linear_attention"] * (every - 1) + ["full_attention"]
    heads = {
        "num_attention_heads": width // 256,
        "num_key_value_heads": width // 1024 or 1,
        "head_dim": min(width, 256),
    }
    linear = {"linear_num_key_heads": width // 256 or 1, "linear_num_value_heads": width // 128 or 1}
    config = hf.Qwen3_5TextConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=num_layers,
        layer_types=kinds * (num_layers // every),
        vocab_size=vocab_size,
        **heads | linear | text,
    )
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 1, "out_hidden_size": width}
    ids = {"image_token_id": vocab_size - 1, "video_token_id": vocab_size - 2, "vision_start_token_id": vocab_size - 3}
    return hf.Qwen3_5Config(text_config=config, vision_config=vision, **ids, vision_end_token_id=vocab_size - 4)


TINY_HEADS = {"num_attention_heads": 2, "head_dim": 32, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
TINY = Shape("tiny", hf.LlavaNextForConditionalGeneration, lambda: llava_next(64, 128, 3, 2, vocab_size=512))
NARROW = Shape(  # as deep as a 7B target, for what does not depend on widths
    "llava-1.6-7b, narrow",
    hf.LlavaNextForConditionalGeneration,
    lambda: llava_next(256, 512, 32, 32, vocab_size=512),
)
TINY_RECURRENT = Shape(
    "tiny, recurrent", hf.Qwen3_5ForConditionalGeneration, lambda: qwen3_5(64, 4, 512, 2, **TINY_HEADS)
)
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llava-1.6-7b", hf.LlavaNextForConditionalGeneration, lambda: llava_next(4096, 11008, 32, 32)),
        Shape("llava-1.6-13b", hf.LlavaNextForConditionalGeneration, lambda: llava_next(5120, 13824, 40, 40)),
        Shape("smolvlm-2b", hf.SmolVLMForConditionalGeneration, smolvlm_2b),
        Shape("gemma3-12b", hf.Gemma3ForConditionalGeneration, gemma3_12b),
        Shape("qwen2.5-vl-7b", hf.Qwen2_5_VLForConditionalGeneration, qwen2_5_vl_7b),
        Shape("qwen3.5-9b", hf.Qwen3_5ForConditionalGeneration, lambda: qwen3_5(4096, 32, 248320)),
        Shape("qwen3.5-9b, attention only", hf.Qwen3_5ForConditionalGeneration, lambda: qwen3_5(4096, 32, 248320, 1)),
    )
}


def make_target(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """The target with random weights, none of which ever was on another device."""
    with torch.device(device):
        target = shape.model_class._from_config(shape.make_config(), dtype=dtype)
    target.eval().requires_grad_(False)
    clear_continuation(target)
    target.generation_config = GenerationConfig(pad_token_id=0)  # no end of sequence
    return target


def make_drafter(target: Any, depth: int, top_k: int, size: int, **config: int) -> DreamDrafter:
    """An untrained drafter with the target's width, on its device; every tree is grown to its full depth."""
    drafting = {"tree_depth": depth, "tree_top_k": top_k, "tree_size": size}
    never_less = {"tree_min_level_probability": 0.0, "tree_min_node_probability": 0.0, "pause_below": 0.0}
    drafter_config = DreamConfig.from_target(target.config, **drafting, **never_less, **config)
    with torch.device(target.device):
        drafter = DreamDrafter._from_config(drafter_config, dtype=target.dtype)
    drafter.eval().requires_grad_(False)
    if drafter.draft_token_ids is not None:  # which ones is all the same for random weights
        drafter.draft_token_ids.copy_(torch.arange(len(drafter.draft_token_ids)))
    redraw_linear_layers(drafter)
    return drafter


def clear_continuation(target: Any) -> None:
    """Redraw the weights such that greedy decoding has clear winners.

    With plain random weights the best two tokens are often equal in 16 bit, and a step of several tokens, which adds up in
    another order, then decides otherwise than a step of one. Here the embedding outweighs what the layers add, and the
    head's row t + 1 is the embedding of token t (with a shared head, its row t): the text counts up, or repeats itself. The
    work is the same.
    """
    view = Target(target)
    redraw_linear_layers(view.decoder)
    embedding = view.embedding.weight
    embedding.normal_()
    sample = torch.arange(FIRST_TEXT_ID, device=embedding.device)
    embedding.mul_(EMBEDDING_SIZE / view.embed(sample).float().std())  # some families multiply what they look up
    head = view.lm_head.weight
    if head.data_ptr() != embedding.data_ptr():
        head[1:].copy_(embedding[:-1])
        head[0].copy_(embedding[-1])
        head.mul_(WINNING_LOGIT / head.shape[1] / head[:FIRST_TEXT_ID].std())


def redraw_linear_layers(model: nn.Module) -> None:
    """Give every linear layer of a model normal weights that shrink what they map by about a half."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=GAIN * module.in_features**-0.5)


def make_prompt(target: Any, num_tokens: int, batch: int, seed: int = 0) -> Tensor:
    """Random text tokens, none of which stands for a picture: (batch, num_tokens)."""
    known = (getattr(target.config, name, None) for name in VISUAL_TOKEN_IDS)
    visual = [token_id for token_id in known if isinstance(token_id, int)]
    end = min([target.config.get_text_config(decoder=True).vocab_size, *visual])
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TEXT_ID, end, (batch, num_tokens), generator=generator).to(target.device)
