"""A drafter that is not shown the pictures, to see what they are worth to it."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..decoding.drafter import DrafterAround, DraftSession, Prefill
from ..decoding.settings import DraftSettings


class BlindDrafter(DrafterAround):
    """Hands another drafter zeros, as embeddings and as features, at the visual tokens of prompts.

    What is gained later has no visual tokens, and is handed on as it is.
    """

    def start(self, prefill: Prefill, settings: DraftSettings) -> DraftSession:
        embeds, features = _blanked(prefill.embeds, prefill), _blanked(prefill.features, prefill)
        return super().start(replace(prefill, embeds=embeds, features=features), settings)


def _blanked(states: torch.Tensor | None, prefill: Prefill) -> torch.Tensor | None:
    """`states` (B, T, width) with zeros at visual tokens."""
    return None if states is None else states * ~prefill.is_visual[..., None].to(states.device)
