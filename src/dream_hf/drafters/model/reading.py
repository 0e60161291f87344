"""How a model that drafts reads the target's prompt: through its own `generate()`, up to the point where that would write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationConfig

from ...compat import CACHE, cache_of
from ...decoding.drafter import Prefill
from ...targets.target import Target

# What belongs to the target's own forwards, by the names of their arguments.
NOT_SHARED = {CACHE, "attention_mask", "position_ids", "inputs_embeds", "use_cache", "logits_to_keep", "labels"}
NOT_SHARED |= {"return_dict", "output_attentions", "output_hidden_states"}


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that a model has read.

    Args:
        cache (`Cache`): Its keys and values.
        model_kwargs (`dict`): What further forwards take.
        logits (`torch.Tensor` of shape `(B, 1, V)`): After the last token.
    """

    cache: Any
    model_kwargs: dict[str, Any]
    logits: torch.Tensor


def read_pictures(target: Target, prefill: Prefill) -> ReadPrompt:
    """Read a prompt as the target did, pictures included.

    Raises:
        ValueError: The model takes other numbers of tokens for a picture.
    """
    inputs = {name: value for name, value in prefill.inputs.items() if name not in NOT_SHARED and value is not None}
    mask = prefill.real[:, : prefill.token_ids.shape[1]].long()
    try:
        return _read(target, prefill.token_ids, mask, inputs)
    except (ValueError, RuntimeError) as error:
        if "token" not in str(error):
            raise
        raise ValueError(
            f"`model` (`{type(target.model).__name__}`) cannot read the pictures of this prompt as the target does: {error}. "
            "Pass `use_pictures=False`, so that it drafts from the text alone."
        ) from error


def read_text(target: Target, prefill: Prefill) -> ReadPrompt:
    """Read the text of a prompt without its pictures, and the first new token behind it."""
    num_tokens = target.text_config.vocab_size
    rows = zip(prefill.token_ids.tolist(), prefill.is_text.tolist(), prefill.first_tokens[:, 0].tolist(), strict=True)
    known = [
        [*(token for token, is_text in zip(*prompt, strict=True) if is_text and token < num_tokens), first]
        for *prompt, first in rows
    ]
    return read_rows(target, [[*row[:-1], min(row[-1], num_tokens - 1)] for row in known])


def read_rows(target: Target, rows: Sequence[Sequence[int]]) -> ReadPrompt:
    """Read texts of one token or more, padded on the left."""
    width, device = max(map(len, rows)), target.model.device
    tokens = torch.tensor([[0] * (width - len(row)) + [*row] for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return _read(target, tokens, mask, {})


def _read(target: Target, token_ids: torch.Tensor, mask: torch.Tensor, inputs: Mapping[str, Any]) -> ReadPrompt:
    """Let a model prepare (B, T) tokens and whatever goes with them in its own way, and run over them."""
    device = target.model.device

    def read(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        for name in ("synced_gpus", "streamer"):
            model_kwargs.pop(name, None)
        # Notes what attention takes, and hides it from the caller's record.
        with target.recording(layers=(), embeds=False):
            outputs = model._prefill(input_ids, generation_config, model_kwargs)
        return ReadPrompt(cache_of(outputs), model_kwargs, outputs.logits[:, -1:])

    config = GenerationConfig(
        max_new_tokens=1, do_sample=False, num_beams=1, use_cache=True, cache_implementation="dynamic", pad_token_id=0
    )
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    found: Any = target.model.generate(
        input_ids=token_ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        custom_generate=read,
        **moved,
    )
    return found
