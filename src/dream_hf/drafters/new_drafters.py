"""What a new drafter of any kind takes from its target, and the settings that it starts with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from .fit import describe_target

# A step with a tree of the default shape costs 1.3 to 2 plain steps, and an untrained drafter gains 1.0 to 1.5 tokens in one.
NEW_DRAFTERS = {"pause_below": 2.0, "tree_min_level_probability": 0.2, "tree_min_node_probability": 0.02}


def derived_from(target_config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of a drafter's config: the target's width, heads, vocabulary and rotary base, and `NEW_DRAFTERS`."""
    text = target_config.get_text_config(decoder=True)
    layer = getattr(text, "per_layer_config", [text])[-1]  # some families vary the shape from layer to layer
    num_heads = layer.num_attention_heads
    intermediate_size = getattr(layer, "intermediate_size", None)
    derived = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": intermediate_size if isinstance(intermediate_size, int) else 4 * text.hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": getattr(layer, "num_key_value_heads", None) or num_heads,
        "head_dim": getattr(layer, "head_dim", None) or text.hidden_size // num_heads,
        "rope_parameters": _plain_rope_parameters(text),
        "target": describe_target(target_config),
        **NEW_DRAFTERS,
    }
    if getattr(text, "max_position_embeddings", None):
        derived["max_position_embeddings"] = text.max_position_embeddings
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        derived[name] = getattr(target_config, name, None)
        if derived[name] is None:
            derived[name] = getattr(text, name, None)
    return derived


def check_config_names(config_class: Any, names: Iterable[str]) -> None:
    """Refuse `names` that are no arguments of a config; a file's may be those of a later version, a user's are slips."""
    known = {each.name for each in fields(config_class)} | {"dtype", "attn_implementation"}
    for name in names:
        if name not in known:
            near, title = get_close_matches(name, known, 1, cutoff=0.0)[0], config_class.__name__
            raise ValueError(f"`{name}` is no argument of `{title}`; is `{near}` meant? See `help({title})`.")


def _plain_rope_parameters(text_config: PreTrainedConfig) -> dict[str, Any]:
    """The target's rotary base as one-dimensional parameters: a drafter counts tokens, whatever the target's layout."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    return {"rope_type": "default", "rope_theta": float(theta or PreTrainedConfig.default_theta)}
