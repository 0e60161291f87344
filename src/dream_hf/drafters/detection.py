"""What kind of drafter a checkpoint holds, by its config and the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

EAGLE, DFLASH, MTP, PUBLISHED_DREAM = "eagle", "dflash", "mtp", "published dream"
OUR_MODEL_TYPES = ("dream_drafter", "eagle_drafter", "dflash_drafter")
# Kinds that are known and not read: what they have more than what is read, what names of their tensors have in them, and what
# begins their class in `architectures`, or is their `speculators_model_type`.
UNREAD = (
    ("a ViSpec drafter of NeMo's", "img_adaptor.", None),
    ("a DFlash 2 drafter (a selector of candidates)", "candidate_selector.", "dflash2"),
    ("a DFlash 2 drafter (convolutions around sublayers)", "_conv.kernel_projection", "dflash2"),
    ("a DSpark drafter (a Markov head)", "markov_head.", "dspark"),
    ("a DSpark drafter (a confidence head)", "confidence_head.", "dspark"),
    ("an XPress drafter (a head that refines blocks)", "mix_l", "xpress"),
    ("a DFlare drafter (a fusion of features for every layer)", "layer_fusion_weights", "dflare"),
    ("a parallel (P-EAGLE) drafter", "mask_hidden", "peagle"),
    ("a drafter with latent attention (MLA)", ".q_a_proj.", None),
)
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
    """`EAGLE`, `DFLASH`, `MTP` or `PUBLISHED_DREAM`.

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
        raise ValueError(f"{source!r} holds {unread}, which is not read yet. Load an EAGLE, DFlash or DREAM drafter.")
    plain = {name.removeprefix("model.") for name in names}
    if {"fc.weight", "hidden_norm.weight"} <= plain:
        return DFLASH
    if "fc.weight" in plain and any(name.startswith(("midlayer.", "layers.0.")) for name in plain):
        return EAGLE
    first = ", ".join(sorted(names)[:3]) or "nothing"
    raise ValueError(
        f"{source!r} is no drafter that can be told: its weights are {first}, ... A drafter has `fc.weight` and a layer "
        "(EAGLE) or a `hidden_norm.weight` (DFlash), or `cross_attn` blocks (DREAM), and a target that brings its own has "
        "`mtp.` tensors. Is it a model without?"
    )


def _unread_kind(config: Mapping[str, Any], names: Set[str]) -> str | None:
    """What a checkpoint is, of kinds that are known and not read."""
    for kind, part, _ in UNREAD:
        if any(part in name for name in names):
            return kind
    algorithm = config.get("speculators_model_type")
    classes = [str(name).lower() for name in (*(config.get("architectures") or ()), algorithm)]
    for kind, _, start in UNREAD:
        if start is not None and any(name.startswith(start) for name in classes):
            return kind
    return None if algorithm in (None, "eagle3", "dflash") else f"a {algorithm!r} drafter of speculators"
