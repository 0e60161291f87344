"""What a drafter sees of a prefill: measured while the target reads the prompt, laid out when it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..compat import CACHE
from ..targets.attention_statistics import attention_received, observe_attention
from ..targets.target import DecoderRecord, Target
from .drafter import Drafter, Prefill
from .turns import recall


class EncodedInputs(dict):
    """What a target's towers made of pictures before its forward, and what they were given."""

    given: Mapping[str, Any] = {}


def inputs_of(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a prompt consists of beside its tokens, as `generate()` was given it; nothing where that is not known."""
    encoded = model_kwargs.get("mm_encoder_outputs") or EncodedInputs()
    if not isinstance(encoded, EncodedInputs):
        return {}
    kept = {name: value for name, value in model_kwargs.items() if name not in (CACHE, "mm_encoder_outputs")}
    return {**kept, **encoded.given}


@dataclass
class AttentionMeter:
    """What each key of a layer receives, forward after forward.

    Args:
        end (`int`): Slots that were filled before.
        parts (`list`): For each forward the slot behind its last key, and what its keys received, (B, K).
    """

    end: int
    parts: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def observe(self, module: Any, chunks: Iterator[torch.Tensor]) -> None:
        """Take in the probabilities (B, heads, queries, K) of one forward, chunk by chunk; none is kept."""
        sizes: list[int] = []
        part = attention_received(_counted(chunks, sizes))
        self.end += sum(sizes)
        self.parts.append((self.end, part))

    def received(self, num_slots: int) -> torch.Tensor | None:
        """What each of `num_slots` slots received, (B, num_slots); None where nothing was measured."""
        if not self.parts:
            return None
        first = self.parts[0][1]
        total = first.new_zeros(first.shape[0], num_slots)
        for end, part in self.parts:  # a sliding layer shows its last keys only
            total[:, end - part.shape[1] : end] += part.to(total.device)
        return total


@dataclass
class PromptWatch:
    """What the target made of a prompt, on behalf of a drafter.

    Args:
        target (`Target`): The target.
        drafter (`Drafter`): Who asks.
        meter (`AttentionMeter`): What the prompt's tokens received.
        embeds, features (`torch.Tensor` of shape `(B, T, ...)`, *optional*): What was recorded, as the drafter needs it.
        positions (`torch.Tensor` of shape `(..., B, T)`, *optional*): The same of the tokens' positions.
        past_length (`int`): Slots that were filled before.
    """

    target: Target
    drafter: Drafter
    meter: AttentionMeter
    embeds: torch.Tensor | None = None
    features: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    past_length: int = 0

    def prefill(
        self,
        prompt_ids: torch.Tensor,  # (B, P)
        first_tokens: torch.Tensor,  # (B, 1)
        attention_mask: torch.Tensor | None,  # (B, slots)
        cache: Cache,
        end_ids: frozenset[int],
        **further: Any,
    ) -> Prefill:
        """Lay it out, with the prompt's keys the last ones in `cache`; `further` are fields of [`Prefill`] as they are."""
        num_slots = int(cache.get_seq_length())
        seen = self.embeds if self.features is None else self.features
        num_new = num_slots - self.past_length if seen is None else seen.shape[1]
        earlier = None
        if attention_mask is None and prompt_ids.shape[1] >= num_new:
            earlier = recall(cache, self.drafter, num_slots - num_new, prompt_ids[:, -num_new:][:, :1])
        # Who needs nothing of the target, and has no earlier session, may read what the target has read in other turns.
        num_tokens = prompt_ids.shape[1] if seen is None and earlier is None else num_new
        token_ids = prompt_ids[:, -num_tokens:]
        real = torch.ones(first_tokens.shape[0], num_slots, dtype=torch.bool, device=prompt_ids.device)
        if attention_mask is not None:
            real = attention_mask[:, :num_slots].bool()
        received = self.meter.received(num_slots)
        return Prefill(
            target=self.target,
            token_ids=token_ids,
            real=real,
            is_visual=self.target.is_visual(token_ids),
            first_tokens=first_tokens,
            end_ids=end_ids,
            embeds=self.embeds,
            features=self.features,
            attention=None if received is None else received[:, -num_tokens:],
            positions=self.positions,
            earlier=earlier,
            **further,
        )


@contextmanager
def watching_prompt(
    target: Target, drafter: Drafter, record: DecoderRecord, prompt_ids: torch.Tensor, past_length: int
) -> Iterator[PromptWatch]:
    """Watch the target read a prompt while in the block, for what the drafter needs and no more."""
    watch = PromptWatch(target, drafter, AttentionMeter(past_length), past_length=past_length)
    with ExitStack() as stack:
        if drafter.needs.attention and bool(target.is_visual(prompt_ids).any()):
            stack.enter_context(observe_attention([target.last_attention], watch.meter.observe))
        yield watch
    watch.positions = record.take_positions()
    watch.embeds, watch.features = record.take()


def _counted(chunks: Iterator[torch.Tensor], sizes: list[int]) -> Iterator[torch.Tensor]:
    """The same chunks (B, heads, Q, K); `sizes` gets how many queries each has."""
    for chunk in chunks:
        sizes.append(chunk.shape[2])
        yield chunk
