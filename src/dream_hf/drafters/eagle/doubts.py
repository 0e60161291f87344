"""What the config of a published EAGLE checkpoint leaves open, and in which other ways its weights can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..published_fields import DEFAULT_THETA, Fields, other_bases, rope_fields, three_layers
from .published import Wiring, declared_ids, is_first_generation, is_from_angelslim

SHIFTS = (-1, 1)  # of places in `hidden_states`: the commonest fault


def doubts(config: Fields, names: set[str], num_target_layers: int) -> list[str]:
    """What nobody can tell from a config, a line each; `names` are those of the tensors as published."""
    found: list[str] = []
    if is_first_generation(names):
        return found
    ids, is_settled = declared_ids(config, num_target_layers)
    if ids and not is_settled:
        found.append(
            f"whether the layers {tuple(ids)} are counted from the embeddings or from the first layer's output"
        )
    if "speculators_model_type" in config and "norm_before_residual" not in config:
        found.append("`norm_before_residual`, which programs take for false or for true where it is missing")
    theta = rope_fields(config).get("rope_theta") or config.get("rope_theta") or DEFAULT_THETA
    if is_from_angelslim(config) and not rope_fields(config).get("mrope_section") and theta != DEFAULT_THETA:
        found.append(f"`rope_theta`: its trainer takes {DEFAULT_THETA:.0f} for the {theta:.0f} that is written")
    return found


def alternatives(
    wiring: Wiring, config: Fields, names: set[str], target_config: Any, has_pictures: bool
) -> list[dict[str, Any]]:
    """Changes of a wiring, one thing at a time, with which the same weights can be read.

    Args:
        wiring (`Wiring`): As it is.
        config (`Mapping`): The fields of config.json, see [`read_fields`].
        names (`set[str]`): Of the tensors as published.
        target_config (`PreTrainedConfig`): The target's.
        has_pictures (`bool`): Whether there are pictures to tell by what is read of them, and how positions are turned.
    """
    text = target_config.get_text_config(decoder=True)
    target_rope: Mapping[str, Any] = getattr(text, "rope_parameters", None) or {}
    changes = other_bases(rope_fields(config), config, text)
    section = wiring.mrope_section or rope_fields(config).get("mrope_section") or target_rope.get("mrope_section")
    if section is not None and has_pictures:
        changes += [
            {"mrope_section": tuple(section), "is_mrope_interleaved": False},
            {"mrope_section": tuple(section), "is_mrope_interleaved": True},
            {"mrope_section": None, "is_mrope_interleaved": False},
        ]
    if not is_first_generation(names):
        num_layers = text.num_hidden_layers
        places = [tuple(layer + shift for layer in wiring.feature_layers) for shift in SHIFTS]
        if len(wiring.feature_layers) == 3:
            places.append(three_layers(num_layers))
        changes += [{"feature_layers": each} for each in places if min(each) >= 1 and max(each) <= num_layers]
        changes += [{"norm_before_residual": each} for each in (False, True)]
        changes += [{"has_final_norm": True, "is_feedback_normed": each} for each in (False, True)]
        changes += [{"has_final_norm": False, "is_feedback_normed": False}]
        if has_pictures and wiring.image_rows in ("token", "merged"):
            changes += [{"image_rows": each} for each in ("token", "merged")]
    return changes
