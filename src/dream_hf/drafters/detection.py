"""What kind of drafter a checkpoint holds, by its config and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

OURS, EAGLE, MTP, PUBLISHED_DREAM = "ours", "eagle", "mtp", "published dream"
OUR_MODEL_TYPES = ("dream_drafter", "eagle_drafter")
MTP_PREFIXES = ("mtp.", "mtp_layers.")  # of tensors inside a target's checkpoint, and in speculators' container


def wanted_names(source: str, config: Mapping[str, Any], names: Set[str]) -> Set[str]:
    """The names of the tensors that a drafter of a checkpoint consists of; an MTP head may lie inside a whole target.

    Args, raises: As [`kind_of`].
    """
    if kind_of(source, config, names) != MTP:
        return names
    if "speculators_model_type" in config:  # which may copy the target's ends
        return names - {"embed_tokens.weight", "lm_head.weight"}
    return {name for name in names if name.startswith(MTP_PREFIXES)}


def kind_of(source: str, config: Mapping[str, Any], names: Set[str]) -> str:
    """`EAGLE`, `MTP` or `PUBLISHED_DREAM`.

    Args:
        source (`str`): Where the checkpoint comes from, for messages.
        config (`Mapping`): The fields of its config.json.
        names (`Set[str]`): The names of its tensors.

    Raises:
        ValueError: A kind that is not read, or no drafter at all; the message says which.
    """
    if any(".cross_attn." in name for name in names):
        return PUBLISHED_DREAM
    if any(name.startswith(MTP_PREFIXES) for name in names) and config.get("speculators_model_type") in (None, "mtp"):
        return MTP
    unread = _unread_kind(config, names)
    if unread is not None:
        raise ValueError(f"{source!r} holds {unread}, which is not read yet. Load an EAGLE or a DREAM drafter.")
    plain = {name.removeprefix("model.") for name in names}
    if "fc.weight" in plain and any(name.startswith(("midlayer.", "layers.0.")) for name in plain):
        return EAGLE
    first = ", ".join(sorted(names)[:3]) or "nothing"
    raise ValueError(
        f"{source!r} is no drafter that can be told: its weights are {first}, ... A drafter has `fc.weight` and a layer "
        "(EAGLE), or `cross_attn` blocks (DREAM), and a target that brings its own has `mtp.` tensors. Is it a model without?"
    )


def _unread_kind(config: Mapping[str, Any], names: Set[str]) -> str | None:
    """What a checkpoint is, of kinds that are known and not read."""
    algorithm = config.get("speculators_model_type")
    kinds = {
        "a ViSpec drafter of NeMo's": any(name.startswith("img_adaptor.") for name in names),
        "a DFlash drafter": "hidden_norm.weight" in names,
        "a parallel (P-EAGLE) drafter": "mask_hidden" in names,
        "a drafter with latent attention (MLA)": any(".q_a_proj." in name for name in names),
        f"a {algorithm!r} drafter of speculators": algorithm not in (None, "eagle3"),
    }
    return next((kind for kind, is_it in kinds.items() if is_it), None)
