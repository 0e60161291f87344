"""From a published DFlash checkpoint to a [`DFlashDrafter`] for a target: every tensor is used or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..checkpoint_files import check_shapes
from ..fit import describe_target
from ..published_fields import check_features, check_vocabulary, read_fields, renamed_tensors
from ..published_model import assembled
from .drafter import DFlashDrafter
from .published import read_config, refuse_unread

REMEDY = "Get the checkpoint again; if it is whole, it is of a kind that is not read."


def load_dflash(source: str, config: Mapping[str, Any], tensors: Mapping[str, Any], target: Any) -> DFlashDrafter:
    """A drafter of published weights, in the target's dtype and on its device.

    Args:
        source (`str`): Where they come from, for messages.
        config (`Mapping`): The fields of config.json.
        tensors (`Mapping`): The tensors by their published names.
        target (`PreTrainedModel`): The model to draft for.

    Raises:
        ValueError: Tensors that are missing, unknown or of another shape, or another target than they were made for.
    """
    description = describe_target(target.config)
    try:
        fields = read_fields(config)
        refuse_unread(fields)
        ours = renamed_tensors(tensors, lambda name: name.removeprefix("model."))
        check_vocabulary(fields, ours, description)
        num_layers = description["num_hidden_layers"]
        if fields.get("num_target_layers") not in (None, num_layers):
            raise ValueError(
                f"it was made for a target of {fields['num_target_layers']} layers, and this one has {num_layers}"
            )
        drafter_config = read_config(fields, ours, {**description, "name": None, "revision": None})
        check_features(ours, tuple(drafter_config.feature_layers), description)
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{source!r} is no DFlash drafter for this target: {error}.".replace("..", ".")) from error
    drafter_config._name_or_path = source
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    check_shapes(source, shapes, DFlashDrafter.expected_shapes(drafter_config), REMEDY)
    return assembled(DFlashDrafter, drafter_config, ours, target)
