"""What kind of drafter a checkpoint holds, by its config and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

OURS, EAGLE, PUBLISHED_DREAM = "ours", "eagle", "published dream"
OUR_MODEL_TYPES = ("dream_drafter", "eagle_drafter")


def kind_of(source: str, config: Mapping[str, Any], names: Set[str]) -> str:
    """`EAGLE` or `PUBLISHED_DREAM`.

    Args:
        source (`str`): Where the checkpoint comes from, for messages.
        config (`Mapping`): The fields of its config.json.
        names (`Set[str]`): The names of its tensors.

    Raises:
        ValueError: A kind that is not read, or no drafter at all; the message says which.
    """
    if any(".cross_attn." in name for name in names):
        return PUBLISHED_DREAM
    unread = _unread_kind(config, names)
    if unread is not None:
        raise ValueError(f"{source!r} holds {unread}, which is not read yet. Load an EAGLE or a DREAM drafter.")
    plain = {name.removeprefix("model.") for name in names}
    if "fc.weight" in plain and any(name.startswith(("midlayer.", "layers.0.")) for name in plain):
        return EAGLE
    first = ", ".join(sorted(names)[:3]) or "nothing"
    raise ValueError(
        f"{source!r} is no drafter that can be told: its weights are {first}, ... A drafter has `fc.weight` and a layer "
        "(EAGLE), or `cross_attn` blocks (DREAM). Is it a model?"
    )


def _unread_kind(config: Mapping[str, Any], names: Set[str]) -> str | None:
    """What a checkpoint is, of kinds that are known and not read."""
    if any(name.startswith(("imadpt.", "img_adaptor.", "img_fc.")) for name in names):
        return "a ViSpec drafter"
    if "hidden_norm.weight" in names:
        return "a DFlash drafter"
    if "mask_hidden" in names:
        return "a parallel (P-EAGLE) drafter"
    if any(".q_a_proj." in name or ".kv_a_proj_with_mqa." in name for name in names):
        return "a drafter with latent attention (MLA)"
    algorithm = config.get("speculators_model_type")
    if algorithm not in (None, "eagle3"):
        return f"a {algorithm!r} drafter of speculators"
    is_first = not any(name.endswith(".hidden_norm.weight") for name in names)
    has_norm = bool(names & {"norm.weight", "model.norm.weight"})
    has_input_norm = any(name.endswith("layers.0.input_layernorm.weight") for name in names)
    if is_first and "embed_tokens.weight" in names and not has_norm:
        if has_input_norm or "mm_projector_type" in config:
            return "an MSD drafter"
    return None
