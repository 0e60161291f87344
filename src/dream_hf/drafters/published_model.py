"""Drafters that others have published, as models of transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .pretrained import StrictPreTrainedModel


class PublishedModel(StrictPreTrainedModel):
    """Loading, saving and initialisation of drafters that have layers of Llama's and a `rotary_emb`."""

    base_model_prefix = ""
    input_modalities = ["text"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_attention_backend = True

    # Transformers' own: the cards and the code that are saved beside other drafters are DREAM's.
    save_pretrained = PreTrainedModel.save_pretrained  # type: ignore[assignment]
    push_to_hub = PreTrainedModel.push_to_hub  # type: ignore[assignment]


def assembled(drafter_class: Any, config: Any, tensors: Mapping[str, torch.Tensor], target: Any) -> Any:
    """A [`PublishedModel`] of these tensors on the target's device, made without weights that would be thrown away."""
    with torch.device("meta"):
        drafter: Any = drafter_class(config)
    drafter.load_state_dict(placed(tensors, target), assign=True)
    drafter.rotary_emb = LlamaRotaryEmbedding(config).to(target.device)
    return drafter.requires_grad_(False).eval()


def placed(tensors: Mapping[str, torch.Tensor], target: Any) -> dict[str, torch.Tensor]:
    """The same tensors on the target's device, those of floating point in its dtype."""
    return {
        name: tensor.to(target.device, target.dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }
