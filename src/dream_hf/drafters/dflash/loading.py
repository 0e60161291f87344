"""From a published DFlash checkpoint to a [`DFlashDrafter`] for a target: every tensor is used or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..fit import describe_target
from ..published_fields import check_features, check_vocabulary, read_fields
from ..published_model import assembled, refusing
from .drafter import DFlashDrafter
from .published import read_config, read_wiring, refuse_unread, renamed

VERDICT = "is no DFlash drafter"


def load_dflash(
    source: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    target: Any,
    wiring: Mapping[str, Any] | None = None,
) -> DFlashDrafter:
    """A drafter of published weights, in the target's dtype and on its device.

    Args:
        source (`str`): Where they come from, for messages.
        config (`Mapping`): The fields of config.json.
        tensors (`Mapping`): The tensors by their published names.
        target (`PreTrainedModel`): The model to draft for.
        wiring (`Mapping`, *optional*): Fields of [`DFlashWiring`] that are known better than the config says.

    Raises:
        ValueError: Tensors that are missing, unknown or of another shape, or another target than they were made for.
    """
    description = describe_target(target.config)
    with refusing(source, VERDICT):
        fields = read_fields(config)
        refuse_unread(fields)
        ours = renamed(tensors)
        check_vocabulary(fields, ours, description)
        num_layers = description["num_hidden_layers"]
        if fields.get("num_target_layers") not in (None, num_layers):
            raise ValueError(
                f"it was made for a target of {fields['num_target_layers']} layers, and this one has {num_layers}"
            )
        found = read_wiring(fields, ours, description).changed(wiring or {})
        check_features(ours, found.feature_layers, description)
        drafter_config = read_config(fields, ours, found, {**description, "name": None, "revision": None})
    return assembled(source, DFlashDrafter, drafter_config, ours, target)
