"""Published DFlash checkpoints in our terms: what a config says, by whoever wrote it.

Spellings and meanings were read off z-lab's dflash and speculators 0.9.0. The weights decide wherever they can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..published_fields import (
    DEFAULT_THETA,
    Fields,
    PublishedWiring,
    Tensors,
    layer_fields,
    num_layers_of,
    other_bases,
    renamed_tensors,
    rope_fields,
    rope_parameters_of,
    rows_of,
    three_layers,
)
from .configuration import DFlashConfig

BLOCK, SPECULATORS_BLOCK = 16, 8  # rows of a block where a config says nothing
WINDOWED, FULL = "sliding_attention", "full_attention"


def renamed(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The same tensors by our names: `model.` goes, `d2t` becomes token ids."""
    return renamed_tensors(tensors, lambda name: name.removeprefix("model."))


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


@dataclass(frozen=True)
class DFlashWiring(PublishedWiring):
    """What a DFlash checkpoint leaves open, see [`PublishedWiring`].

    Args:
        drafts_from_anchor, sliding_window, is_window_anchored: As in [`DFlashConfig`].
        causal_layers (`tuple[int, ...]`): As in [`DFlashConfig`].
        rope_theta (`float`): Base of the rotary embedding.
    """

    drafts_from_anchor: bool = False
    causal_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    is_window_anchored: bool = False
    rope_theta: float = DEFAULT_THETA


def read_wiring(config: Fields, tensors: Tensors, target: Fields) -> DFlashWiring:
    """What a config says, by the meanings of whoever wrote it; `tensors` are by our names.

    z-lab and speculators both look back a window in sliding layers. z-lab's measures it from every row, in the block too;
    speculators' from the start of the block. Sliding layers are causal inside the block; z-lab's `is_causal` says it of all
    layers, speculators' `sliding_window_non_causal` takes it back.
    """
    is_speculators, num_layers = "speculators_model_type" in config, num_layers_of(tensors)
    rows_of(tensors, "fc.weight")
    num_features = max(tensors["fc.weight"].shape[1] // target["hidden_size"], 1)
    sliding, rope = sliding_layers(config, num_layers), rope_of(config)
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    causal = sliding
    if is_speculators:
        causal = () if window is None or config.get("sliding_window_non_causal") else sliding
    elif config.get("is_causal") is not None:
        causal = tuple(range(num_layers)) if config["is_causal"] else ()
    return DFlashWiring(
        feature_layers(config, num_features, target["num_hidden_layers"]),
        drafts_from_anchor=bool(value_of(config, "sample_from_anchor", False)),
        causal_layers=causal,
        sliding_window=window,
        is_window_anchored=is_speculators,
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or DEFAULT_THETA),
    )


def alternatives(wiring: DFlashWiring, config: Fields, num_drafter_layers: int, target: Any) -> list[dict[str, Any]]:
    """Changes of a wiring, one thing at a time, with which the same weights can be read; `target` is the target's config."""
    layers, sliding = wiring.feature_layers, sliding_layers(config, num_drafter_layers)
    text = target.get_text_config(decoder=True)
    shifted = [tuple(layer + shift for layer in layers) for shift in (-1, 1)]
    shifted += [
        (*layers[:at], layers[at] + shift, *layers[at + 1 :]) for at in range(len(layers)) for shift in (-1, 1)
    ]
    num_target_layers = text.num_hidden_layers
    shifted.append(even_layers(len(layers), num_target_layers))
    if len(layers) == 3:
        shifted.append(three_layers(num_target_layers))
    changes: list[dict[str, Any]] = [
        {"feature_layers": each} for each in shifted if 1 <= min(each) <= max(each) <= num_target_layers
    ]
    changes += [{"drafts_from_anchor": each} for each in (False, True)]
    changes += [{"causal_layers": each} for each in dict.fromkeys(((), sliding, tuple(range(num_drafter_layers))))]
    if sliding:
        windows = dict.fromkeys((None, config.get("sliding_window")))
        changes += [{"sliding_window": window} for window in windows]
        changes += [{"is_window_anchored": each} for each in (False, True)]
    return changes + other_bases(rope_of(config), config, text)


def feature_layers(config: Fields, num_features: int, num_target_layers: int) -> tuple[int, ...]:
    """The places in `hidden_states` that are read: speculators' count so, z-lab's count what layers put out."""
    if "speculators_model_type" in config:
        ids = config.get("aux_hidden_state_layer_ids")
        return tuple(ids) if ids else three_layers(num_target_layers)
    ids = value_of(config, "target_layer_ids")
    return even_layers(num_features, num_target_layers) if ids is None else tuple(index + 1 for index in ids)


def even_layers(count: int, num_target_layers: int) -> tuple[int, ...]:
    """Evenly from the second place to the third last but one, as z-lab's program takes them where a config names none."""
    if count == 1:
        return (num_target_layers // 2 + 1,)
    step = (num_target_layers - 4) / (count - 1)
    return tuple(round(1 + index * step) + 1 for index in range(count))


def sliding_layers(config: Fields, num_layers: int) -> tuple[int, ...]:
    """Which layers look back a window, if there is one: those that a config names so, by default the last ones as in Qwen3."""
    kinds = config.get("layer_types")
    if kinds is None:
        is_used = config.get("use_sliding_window") and config.get("sliding_window") is not None
        return tuple(range(config.get("max_window_layers", 28), num_layers)) if is_used else ()
    if len(kinds) != num_layers:
        raise ValueError(f"`layer_types` names {len(kinds)} layers, and its weights are of {num_layers}")
    return tuple(index for index, kind in enumerate(kinds) if kind == WINDOWED)


def rope_of(config: Fields) -> Fields:
    """What a config says of its rotary embedding; of one for each kind of layer speculators takes that of sliding ones."""
    rope = rope_fields(config)
    return rope.get(WINDOWED) or rope


def read_config(config: Fields, tensors: Tensors, wiring: DFlashWiring, target: Fields) -> DFlashConfig:
    """The config of a drafter with these tensors (by our names), for a target as `describe_target` describes it.

    Raises:
        ValueError: Shapes or fields that fit no such drafter.
    """
    mask_token_id = value_of(config, "mask_token_id")
    if mask_token_id is None:
        raise ValueError("its config.json has no `mask_token_id`")
    default = SPECULATORS_BLOCK if "speculators_model_type" in config else BLOCK
    block_size = value_of(config, "block_size", default)
    shape = layer_fields(config, tensors, target)
    return DFlashConfig(
        **shape,
        feature_layers=list(wiring.feature_layers),
        sliding_layers=list(sliding_layers(config, shape["num_hidden_layers"])),
        causal_layers=list(wiring.causal_layers),
        sliding_window=wiring.sliding_window,
        is_window_anchored=wiring.is_window_anchored,
        drafts_from_anchor=wiring.drafts_from_anchor,
        rope_parameters=rope_parameters_of(rope_of(config), wiring.rope_theta),
        block_size=block_size,
        mask_token_id=mask_token_id,
        embedding_scale=value_of(config, "input_embedding_scale", 1.0),
        logit_scale=value_of(config, "output_multiplier", 1.0),
        logit_softcap=value_of(config, "final_logit_softcapping") or None,
        tree_depth=max(block_size - 1 + wiring.drafts_from_anchor, 1),
    )
