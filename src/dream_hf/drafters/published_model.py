"""Drafters that others have published, as models of transformers'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .checkpoint_files import check_shapes
from .pretrained import StrictPreTrainedModel

REMEDY = "Get the checkpoint again; if it is whole, it is of a kind that is not read."


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


@contextmanager
def refusing(source: str, verdict: str) -> Iterator[None]:
    """Make one line, which names the checkpoint, of whatever is wrong with its config or tensors while in the block.

    Args:
        source (`str`): Where it comes from.
        verdict (`str`): What it then turns out to be, `"is no EAGLE drafter"` for instance.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{source!r} {verdict} for this target: {error}.".replace("..", ".")) from error


def assembled(source: str, drafter_class: Any, config: Any, tensors: Mapping[str, torch.Tensor], target: Any) -> Any:
    """A [`PublishedModel`] of these tensors on the target's device, made without weights that would be thrown away.

    Raises:
        ValueError: Tensors that are missing, unknown or of another shape than the config says.
    """
    config._name_or_path = source
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_shapes(source, shapes, drafter_class.expected_shapes(config), REMEDY)
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
