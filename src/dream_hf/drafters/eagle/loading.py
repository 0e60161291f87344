"""From a published EAGLE checkpoint to an [`EagleDrafter`] for a target: every tensor is used or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.utils import logging

from ..fit import describe_target
from ..published_fields import check_features, check_vocabulary, read_fields
from ..published_model import assembled, refusing
from .doubts import doubts
from .drafter import EagleDrafter
from .published import (
    is_first_generation,
    is_msd,
    read_config,
    read_wiring,
    refuse_unread,
    renamed,
)

logger = logging.get_logger(__name__)

PADDING = 64  # tokens, of 32064


def load_eagle(
    source: str, config: Mapping[str, Any], tensors: Mapping[str, Any], target: Any, wiring: Mapping[str, Any] | None
) -> EagleDrafter:
    """A drafter of published weights, in the target's dtype and on its device.

    Args:
        source (`str`): Where they come from, for messages.
        config (`Mapping`): The fields of config.json.
        tensors (`Mapping`): The tensors by their published names.
        target (`PreTrainedModel`): The model to draft for.
        wiring (`Mapping`, *optional*): Fields of [`Wiring`] that are known better than the config says.

    Raises:
        ValueError: Tensors that are missing, unknown or of another shape, or another target than they were made for.
    """
    description = describe_target(target.config)
    with refusing(source, "is no EAGLE drafter"):
        fields = read_fields(config)
        refuse_unread(fields)
        found = read_wiring(fields, set(tensors), description["num_hidden_layers"]).changed(wiring or {})
        open_questions = [] if wiring else doubts(fields, set(tensors), description["num_hidden_layers"])
        ours = renamed(tensors)
        if is_msd(fields, set(tensors)):
            fields, ours = _with_padding(fields, ours, description["vocab_size"])
        elif is_first_generation(set(ours)):
            ours.pop("embed_tokens.weight", None)  # a copy of the target's, which published loaders put in its place
        if not found.has_final_norm:
            ours.pop("norm.weight", None)  # SpecForge writes it and does not use it
        check_vocabulary(fields, ours, description)
        wanted = 2 * description["hidden_size"] if is_first_generation(set(ours)) else None
        check_features(ours, found.feature_layers, description, wanted)
        drafter_config = read_config(fields, ours, found, {**description, "name": None, "revision": None})
    drafter = assembled(source, EagleDrafter, drafter_config, ours, target)
    if open_questions:
        logger.warning(
            f"The config of {source!r} leaves open {'; '.join(open_questions)}. Say it (`wiring={{...}}`), or let the target "
            'tell: `wiring="probe"`.'
        )
    return drafter


def _with_padding(
    fields: dict[str, Any], tensors: dict[str, torch.Tensor], vocab_size: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """MSD's own embedding with rows for the tokens that Hugging Face's LLaVA has beyond the original one's, never written."""
    table = tensors["embed_tokens.weight"]
    num_missing = vocab_size - table.shape[0]
    is_original = "mm_projector_type" in fields and fields.get("vocab_size") == table.shape[0]
    if not (is_original and 0 < num_missing <= PADDING):
        return fields, tensors
    padded = torch.nn.functional.pad(table, (0, 0, 0, num_missing))
    return {**fields, "vocab_size": vocab_size}, {**tensors, "embed_tokens.weight": padded}
