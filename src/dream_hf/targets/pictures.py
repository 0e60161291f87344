"""Whether two models make the same tokens of a picture."""

from __future__ import annotations

from typing import Any

from .target import VISUAL_TOKEN_IDS

# What decides how many tokens a picture has, by the names that configurations of models and of their vision towers use.
NUMBERS = (
    "image_size",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "mm_tokens_per_image",
    "image_seq_length",
    "downsample_ratio",
    "downsample_factor",
    "scale_factor",
    "pixel_shuffle_ratio",
    "pooling_kernel_size",
    "vision_feature_select_strategy",
    "image_grid_pinpoints",
)


def other_pictures(config: Any, target_config: Any) -> str | None:
    """Why a model cannot read what a target's processor made of pictures, or None: what the two configurations show."""
    if config.model_type != target_config.model_type:
        return f"it is a {config.model_type!r} and the target a {target_config.model_type!r}"
    for name in VISUAL_TOKEN_IDS:
        ours, theirs = getattr(config, name, None), getattr(target_config, name, None)
        if ours != theirs:
            return f"its `{name}` is {ours} and the target's {theirs}"
    towers = [getattr(each, "vision_config", None) for each in (config, target_config)]
    for part, target_part, prefix in ((config, target_config, ""), (*towers, "vision_config.")):
        for name in NUMBERS:
            ours, theirs = getattr(part, name, None), getattr(target_part, name, None)
            if ours != theirs:
                return (
                    f"its `{prefix}{name}` is {ours} and the target's {theirs}: a picture has other numbers of tokens"
                )
    return None
