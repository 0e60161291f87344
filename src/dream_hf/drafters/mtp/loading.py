"""From the MTP tensors of a checkpoint to an [`MTPDrafter`] for a target: every tensor is used or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig

from ...targets.attending_layer import MTP_FAMILIES, attending_layer
from ...targets.target import Target
from ..attention import SEEN
from ..checkpoint_files import check_shapes
from ..fit import describe_target
from ..published_model import placed, refusing
from .drafter import MTPDrafter, wired
from .published import PREFIX, renamed

REMEDY = "Get the checkpoint again; if it is whole, its head is of a kind that is not read."
SAME = ("model_type", "hidden_size", "vocab_size", "num_hidden_layers")


def load_mtp(
    source: str, config: Mapping[str, Any], tensors: Mapping[str, Any], target: Any, wiring: Mapping[str, Any] | None
) -> MTPDrafter:
    """The MTP head of a target, in its dtype and on its device.

    Args:
        source (`str`): Where it comes from, for messages.
        config (`Mapping`): The fields of the config.json beside it: the target's own, or speculators'.
        tensors (`Mapping`): Its tensors by their published names.
        target (`PreTrainedModel`): The model to draft for.
        wiring (`Mapping`, *optional*): As in [`MTPDrafter`]; of a head that speculators trained, `image_rows` is `"token"` by
            default.

    Raises:
        ValueError: Tensors that are missing, unknown or of another shape, or another target than they were made for.
    """
    view, is_speculators = Target(target), "speculators_model_type" in config
    wiring = wired({**({"image_rows": "token"} if is_speculators else {}), **(wiring or {})})
    with refusing(source, "has no MTP head"):
        _check_target((config.get("transformer_layer_config") if is_speculators else None) or config, view)
        ours = renamed(tensors)
        parts = attending_layer(view, SEEN, is_dense="layers.0.mlp.gate_proj.weight" in ours)
    description = {**describe_target(view.model.config), "name": None, "revision": None}
    with torch.device("meta"):
        drafter = MTPDrafter(parts, description, wiring)
    expected = {f"{PREFIX}{name}": weight.shape for name, weight in drafter.state_dict().items()}
    check_shapes(source, {f"{PREFIX}{name}": tensor.shape for name, tensor in ours.items()}, expected, REMEDY)
    drafter.load_state_dict(placed(ours, target), assign=True)
    drafter.rotary_emb.to(target.device)
    return drafter.requires_grad_(False).eval()


def _check_target(fields: Mapping[str, Any], target: Target) -> None:
    """Refuse the head of another target than this, by the config of the model that it belongs to."""
    config = AutoConfig.for_model(**fields).get_text_config(decoder=True)
    for name in SAME:
        theirs, ours = getattr(config, name, None), getattr(target.text_config, name)
        if theirs != ours:
            raise ValueError(f"it belongs to a model with `{name}` {theirs!r}, and this target's is {ours!r}")
    if config.model_type not in MTP_FAMILIES:
        raise ValueError(f"it is a {config.model_type!r}'s, and those of {', '.join(MTP_FAMILIES)} are read")
    for name in ("mtp_num_hidden_layers", "num_nextn_predict_layers"):
        if getattr(config, name, 1) not in (None, 1):
            raise ValueError(f"it has {getattr(config, name)} layers (`{name}`); heads of one layer are read")
    if getattr(config, "mtp_use_dedicated_embeddings", False):
        raise ValueError("it has an embedding of its own (`mtp_use_dedicated_embeddings`), which is not read")
