"""Which models cannot be targets, and why: known before they have run."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import PreTrainedModel

from ..runtime.kv_cache import unsupported_layer
from .recurrence import keeps_state, unsuitable_states
from .rotary import is_length_dependent
from .target import Target, text_decoder, unwrap
from .tree_masks import takes_tree_masks

# Families that place tokens by cache slot, on their own: gpt_neo cuts a window by slot; moshi's window is cut by its cache
# and not by its mask; kosmos-2.5 and GLM-Image drop the positions they are given and count anew.
SLOT_BOUND = ("gpt_neo", "moshi", "moshi_depth", "kosmos_2_5_text_model", "glm_image_text")
# Families whose pictures are no tokens of the prompt: GIT puts them in front of it.
WITHOUT_PLACEHOLDERS = ("git",)
# Families that read their whole text anew when it becomes longer than `original_max_position_embeddings`.
REREADING = ("phi3", "phimoe", "phi4_multimodal")
# Families that build their masks from a 2D one only, and cannot take those prepared for a cache of fixed size where the
# text model has several kinds of layers (PaliGemma 2).
MASK_BOUND = ("paligemma",)
REMEDY = "Use another target, or generate without `assistant_model`."


def unsuitable(model: PreTrainedModel) -> str | None:
    """Why trees cannot be verified on a model, and what to do about it, or None."""
    checks = (_other_kind, _states, _placed_by_slot, _adapter, _without_cache, _compiled, _odd_width)
    return next((reason for check in checks if (reason := check(model)) is not None), None)


def rereads(model: PreTrainedModel, prompt_length: int, max_length: int | None) -> str | None:
    """Why a text from `prompt_length` up to `max_length` tokens cannot be written by trees, or None.

    Phi-3 with `rope_type="longrope"` has other angles for long texts, and plain decoding reads all of a text anew when it
    becomes one.
    """
    config: Any = unwrap(model).config.get_text_config(decoder=True)
    switch = getattr(config, "original_max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type not in REREADING or rope.get("rope_type") != "longrope" or switch is None:
        return None
    if prompt_length > switch or (max_length is not None and max_length <= switch + 1):
        return None
    return (
        f"`{type(unwrap(model)).__name__}` reads its text anew when it grows beyond {switch} tokens "
        f'(`rope_type="longrope"`), and this one may grow from {prompt_length} to {max_length or "any number"}. Set '
        f"`max_length` to {switch + 1} at most, or generate without `assistant_model`."
    )


def not_in_graphs(target: Target) -> str | None:
    """Why a target's forwards over trees cannot be compiled, whatever the compiler, or None."""
    name, implementation = type(target.model).__name__, target.text_config._attn_implementation
    if target.rescaled_attentions:
        return f"`{name}` scales queries by cache slot, which needs hooks in a tree"
    hooked = "rotary angles that depend on the text's length" if target.length_dependent_rotaries else None
    hooked = "layers with state" if keeps_state(target.text_config) else hooked
    if hooked is not None:
        return f"`{name}` has {hooked}, which needs hooks"
    if target.model.config.model_type in MASK_BOUND and hasattr(target.text_config, "layer_types"):
        return f"`{name}` cannot take masks that are made beforehand for several kinds of layers"
    if implementation == "flex_attention":
        return '`attn_implementation="flex_attention"` compiles by itself'
    if not takes_tree_masks(implementation):
        return (
            f"`attn_implementation={implementation!r}` takes no tree masks, and what stands in for it is not compiled; load "
            'the target with `attn_implementation="sdpa"`'
        )
    return None


def _other_kind(model: PreTrainedModel) -> str | None:
    """Models that are no decoders whose layers are attention to the text."""
    name, text_config = type(model).__name__, model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return f"`{name}` is an encoder-decoder model; drafters need a decoder-only target."
    layer = unsupported_layer(DynamicCache(config=text_config))
    if layer is not None:
        return f"`{name}` keeps a cache layer of a kind that trees cannot be taken back from ({layer}). {REMEDY}"
    if getattr(text_config, "is_decoder", None) is False and not all(
        getattr(module, "is_causal", True) for module in unwrap(model).modules()
    ):
        return f"`{name}` reads its text both ways (`config.is_decoder=False`). Set `is_decoder=True`, or use another target."
    if getattr(text_config, "cross_attention_layers", None):
        return (
            f"`{name}` has layers that attend to pictures and not to the text (`cross_attention_layers`), whose keys are "
            f"no tokens. {REMEDY}"
        )
    if text_config.model_type in WITHOUT_PLACEHOLDERS:
        return f"`{name}` puts its pictures in front of the prompt, where `input_ids` has no token for them. {REMEDY}"
    return None


def _states(model: PreTrainedModel) -> str | None:
    """Recurrences and convolutions that nodes cannot take from their parents."""
    text_config = model.config.get_text_config(decoder=True)
    reason = unsuitable_states(text_decoder(unwrap(model)), text_config)
    if reason is None and model._is_stateful and not keeps_state(text_config):
        reason = "it is not in the cache"
    if reason is None:
        return None
    return (
        f"`{type(model).__name__}` keeps recurrent or convolutional state, which cannot follow the paths of a tree: {reason}. "
        f"{REMEDY}"
    )


def _placed_by_slot(model: PreTrainedModel) -> str | None:
    text_config = model.config.get_text_config(decoder=True)
    takes_positions = "position_ids" in signature(unwrap(model).forward).parameters
    if takes_positions and not getattr(text_config, "alibi", False) and text_config.model_type not in SLOT_BOUND:
        return None
    return (
        f"`{type(model).__name__}` places tokens by their slot in the cache (ALiBi, own local attention, or no "
        "`position_ids`), which is not where the tokens of a draft tree belong. Use another target, or generate without "
        "`assistant_model`."
    )


def _adapter(model: Any) -> str | None:
    """Adapters (peft) that are more than other weights. A `PeftModel` with prompts lends its model a way to prepare inputs."""
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    runner = model if hasattr(model, "get_base_model") else getattr(prepare, "__self__", None)
    adapter = getattr(runner, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        return (
            f"The target's adapter ({type(adapter).__name__}) puts virtual tokens in front of the text, which are no tokens of "
            "the prompt. Use an adapter that changes weights (LoRA), or generate without `assistant_model`."
        )
    adapters = getattr(model, "peft_config", None)
    if isinstance(adapters, dict) and any(getattr(one, "alora_invocation_tokens", None) for one in adapters.values()):
        return (
            "The target's adapter is an activated LoRA (`alora_invocation_tokens`), which counts tokens from the end of a "
            "forward, where drafted ones stand. Use a plain LoRA, or generate without `assistant_model`."
        )
    return None


def _without_cache(model: PreTrainedModel) -> str | None:
    name, target = type(model).__name__, unwrap(model)
    if not {"past_key_values", "cache"} & set(signature(target.forward).parameters):
        return f"`{name}` has no key/value cache that accepted paths could be kept in. {REMEDY}"
    if any(module.training and getattr(module, "gradient_checkpointing", False) for module in target.modules()):
        return (
            f"`{name}` is in training mode with gradient checkpointing, which switches its cache off. Call `.eval()` on it, "
            "or `.gradient_checkpointing_disable()`."
        )
    return None


def _compiled(model: PreTrainedModel) -> str | None:
    """Compiled code does not see hooks, which tell what passes through the decoder and give nodes their places."""
    target: Any = unwrap(model)
    decoder = text_decoder(target)
    for path, module in target.named_modules():
        is_hooked = module is decoder or vars(module).get("attn_temperature_tuning") or is_length_dependent(module)
        if not is_hooked:
            continue
        names = path.split(".") if path else []
        outer = [".".join(names[:depth]) for depth in range(len(names) + 1)]
        compiled = next((name for name in outer if _is_compiled(target.get_submodule(name))), None)
        if compiled is not None:
            return (
                f"The target's `{compiled + '.' if compiled else ''}forward` is compiled, and compiled code takes no hooks. "
                "Leave it as it was loaded, and let drafted decoding compile it: `drafter.config.compile = True`."
            )
    return None


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")


def _odd_width(model: PreTrainedModel) -> str | None:
    """The drafter's features go to the head as they are, and its tokens come from the embedding."""
    width = model.config.get_text_config(decoder=True).hidden_size
    target = unwrap(model)
    embedding, head = target.get_input_embeddings(), target.get_output_embeddings()
    sizes = (getattr(embedding, "embedding_dim", width), getattr(head, "in_features", width))
    if set(sizes) == {width}:
        return None
    return (
        f"`{type(model).__name__}` has an embedding of width {sizes[0]} and a head of width {sizes[1]}, where its "
        f"`hidden_size` is {width}: a drafter of that width cannot share them. {REMEDY}"
    )
