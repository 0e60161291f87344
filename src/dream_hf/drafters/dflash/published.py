"""Published DFlash checkpoints in our terms: what a config says, by whoever wrote it.

Spellings and meanings were read off z-lab's dflash and speculators 0.9.0. The weights decide wherever they can.
"""

from __future__ import annotations

from typing import Any

from ..published_fields import DEFAULT_THETA, Fields, Tensors, layer_fields, rope_fields, rope_parameters_of
from .configuration import DFlashConfig

BLOCK, SPECULATORS_BLOCK = 16, 8  # rows of a block where a config says nothing
WINDOWED, FULL = "sliding_attention", "full_attention"


def refuse_unread(config: Fields) -> None:
    """Refuse what a config asks for and this package does not do.

    Raises:
        ValueError: Rotary embeddings of a part of each head, or layers of other kinds.
    """
    if rope_of(config).get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ValueError("it turns a part of each head only (`partial_rotary_factor`), which is not read")
    others = set(config.get("layer_types") or ()) - {WINDOWED, FULL}
    if others:
        raise ValueError(f"it has layers of other kinds than {FULL} and {WINDOWED} (`layer_types`): {sorted(others)}")


def value_of(config: Fields, name: str, default: Any = None) -> Any:
    """A field of `dflash_config`, where newer files have them, or of the config itself."""
    found = (config.get("dflash_config") or {}).get(name)
    found = config.get(name) if found is None else found
    return default if found is None else found


def feature_layers(config: Fields, num_drafter_layers: int, num_target_layers: int) -> tuple[int, ...]:
    """The places in `hidden_states` that are read: speculators' count so, z-lab's count what layers put out."""
    if "speculators_model_type" in config:
        ids = config.get("aux_hidden_state_layer_ids")
        if not ids:
            raise ValueError("its config.json has no `aux_hidden_state_layer_ids`")
        return tuple(ids)
    ids = value_of(config, "target_layer_ids")
    if ids is None and num_drafter_layers == 1:
        ids = [num_target_layers // 2]
    elif ids is None:  # evenly from the second to the third last but one
        step = (num_target_layers - 4) / (num_drafter_layers - 1)
        ids = [round(1 + index * step) for index in range(num_drafter_layers)]
    return tuple(index + 1 for index in ids)


def sight_fields(config: Fields, num_layers: int) -> dict[str, Any]:
    """What rows of a block see, layer by layer: arguments of a [`DFlashConfig`].

    Both look back a window in sliding layers. z-lab's measures it from every row, in the block too; speculators' from the start
    of the block. Sliding layers are causal inside the block; z-lab's `is_causal` says it of all layers,
    `sliding_window_non_causal` takes it back.
    """
    is_speculators = "speculators_model_type" in config
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = config.get("layer_types") or [
        WINDOWED if window is not None and index >= config.get("max_window_layers", 28) else FULL
        for index in range(num_layers)
    ]
    if len(kinds) != num_layers:
        raise ValueError(f"`layer_types` names {len(kinds)} layers, and its weights are of {num_layers}")
    sliding = [index for index, kind in enumerate(kinds) if kind == WINDOWED]
    causal = sliding
    if is_speculators:
        causal = [] if window is None or config.get("sliding_window_non_causal") else sliding
    elif config.get("is_causal") is not None:
        causal = list(range(num_layers)) if config["is_causal"] else []
    return {
        "sliding_layers": sliding,
        "causal_layers": causal,
        "sliding_window": window,
        "is_window_anchored": is_speculators,
    }


def rope_of(config: Fields) -> Fields:
    """What a config says of its rotary embedding; of one for each kind of layer speculators takes that of sliding ones."""
    rope = rope_fields(config)
    return rope.get(WINDOWED) or rope


def read_config(config: Fields, tensors: Tensors, target: Fields) -> DFlashConfig:
    """The config of a drafter with these tensors (by our names), for a target as `describe_target` describes it.

    Raises:
        ValueError: Shapes or fields that fit no such drafter.
    """
    is_speculators = "speculators_model_type" in config
    shape, rope = layer_fields(config, tensors, target), rope_of(config)
    num_layers = shape["num_hidden_layers"]
    mask_token_id = value_of(config, "mask_token_id")
    if mask_token_id is None:
        raise ValueError("its config.json has no `mask_token_id`")
    block_size = value_of(config, "block_size", SPECULATORS_BLOCK if is_speculators else BLOCK)
    drafts_from_anchor = bool(value_of(config, "sample_from_anchor", False))
    return DFlashConfig(
        **shape,
        **sight_fields(config, num_layers),
        feature_layers=list(feature_layers(config, num_layers, target["num_hidden_layers"])),
        rope_parameters=rope_parameters_of(
            rope, float(rope.get("rope_theta") or config.get("rope_theta") or DEFAULT_THETA)
        ),
        block_size=block_size,
        mask_token_id=mask_token_id,
        drafts_from_anchor=drafts_from_anchor,
        embedding_scale=value_of(config, "input_embedding_scale", 1.0),
        logit_scale=value_of(config, "output_multiplier", 1.0),
        logit_softcap=value_of(config, "final_logit_softcapping") or None,
        tree_depth=max(block_size - 1 + drafts_from_anchor, 1),
    )
