"""`DreamDrafter`: what is trained, published, loaded, and passed to `generate(assistant_model=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import AutoModel, AutoModelForCausalLM

from ...decoding.drafter import Drafter, DrafterAround, Needs, Prefill
from ...decoding.settings import DraftSettings
from ..vocabulary import sorted_token_ids
from .checks import check_dream
from .configuration import DreamConfig
from .modeling import DreamModel
from .reading import Reading
from .session import DreamSession


class DreamDrafter(DreamModel, Drafter):
    """The small model that drafts for a frozen target (DREAM, arXiv 2505.19201, section 3.1).

    It has neither an embedding table nor an LM head: the target lends both, so its inputs are the target's embeddings
    and its features go through the target's head.
    """

    @property
    def settings(self) -> DraftSettings:
        """As its config says."""
        return DraftSettings.of(self.config)

    @property
    def needs(self) -> Needs:
        """The last features and the embeddings of the prompt; attention where visual tokens are left out by it."""
        return _needs(self.config.reading)

    def check(self, target: PreTrainedModel, settings: DraftSettings) -> None:
        """Refuse a target that this drafter was not made for, settings beyond its vocabulary, and damaged weights."""
        check_dream(self, target, settings)

    def start(self, prefill: Prefill, settings: DraftSettings) -> DreamSession:
        """Read a prompt with the target's embeddings and features."""
        return DreamSession(self, prefill, settings, self.config.reading)

    def with_reading(self, visual_keep_ratio: float | None = None, visual_importance: str | None = None) -> Drafter:
        """The same drafter that reads other visual tokens of prompts, for calls of its own; this one is not changed.

        Args:
            visual_keep_ratio (`float`, *optional*): Share of the visual tokens kept; by default as the config says.
            visual_importance (`str`, *optional*): Which ones are kept; by default as the config says.

        Raises:
            ValueError: A value that has no meaning.
        """
        own = self.config.reading
        ratio = own.visual_keep_ratio if visual_keep_ratio is None else visual_keep_ratio
        return _DreamWithReading(self, Reading(ratio, visual_importance or own.visual_importance))

    @classmethod
    def for_target(cls, target: PreTrainedModel, **config_overrides: Any) -> DreamDrafter:
        """A fresh, untrained drafter with the target's shapes, dtype and device.

        Args:
            target (`PreTrainedModel`): The model to draft for, vision-language or text-only.
            **config_overrides: Any argument of [`DreamConfig`].

        Returns:
            `DreamDrafter`: In evaluation mode.
        """
        config = DreamConfig.from_target(target.config, **config_overrides)
        drafter: Any = cls(config)
        return drafter.to(device=target.device, dtype=target.dtype).eval()

    def set_draft_vocabulary(self, token_ids: Sequence[int] | torch.Tensor | None) -> None:
        """Draft these tokens only from now on, with those rows of the target's head; saved with the weights.

        What the target generates stays the same: it verifies over its whole vocabulary. Drafted probabilities are
        relative to the tokens that may be drafted.

        Args:
            token_ids (`Sequence[int]` or `torch.LongTensor` of shape `(R,)`, *optional*): The tokens, in any order, as
                `choose_draft_vocabulary` chooses them; `None` for the whole vocabulary again.

        Raises:
            ValueError: No whole numbers, none at all, repeats, or tokens beyond `config.vocab_size`.
        """
        ids = None if token_ids is None else sorted_token_ids(token_ids, self.config.vocab_size).to(self.device)
        self.draft_token_ids = ids
        self.config.draft_vocab_size = None if ids is None else len(ids)


class _DreamWithReading(DrafterAround):
    """A [`DreamDrafter`] and a reading of one's own for it."""

    inner: DreamDrafter

    def __init__(self, drafter: DreamDrafter, reading: Reading):
        super().__init__(drafter)
        self.reading = reading

    @property
    def needs(self) -> Needs:
        return _needs(self.reading)

    def start(self, prefill: Prefill, settings: DraftSettings) -> DreamSession:
        return DreamSession(self.inner, prefill, settings, self.reading)


def _needs(reading: Reading) -> Needs:
    return Needs(layers=(-1,), embeds=True, attention=reading.needs_attention)


for _auto_class in (AutoModel, AutoModelForCausalLM):
    _auto_class.register(DreamConfig, DreamDrafter, exist_ok=True)
