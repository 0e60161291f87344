"""`RetrievalDrafter`: drafts without training, from texts and from what the target found likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from ...decoding.drafter import Drafter, DraftSession, Needs, Prefill, Verified
from ...decoding.settings import DraftSettings
from ...decoding.tree import DraftTree
from ...runtime.phases import GROWTH, phase
from ..best_first import tree_of
from .likeliest import RANKS, LikeliestTokens
from .mixture import Mixture
from .store import RetrievalStore
from .text import UNKNOWN, GrowingText, Limits

DEFAULTS = DraftSettings(tree_depth=10, tree_top_k=16, tree_size=48, tree_min_node_probability=0.012)


class RetrievalDrafter(Drafter):
    """Drafts what followed the same words before, and what the target found likely after the same token.

    Needs no training. Trees are grown best first, from the text so far, from `draft_text`, from a store of earlier answers
    and from the target's likeliest tokens after every node that it verified (suffix decoding, arXiv 2411.04975; token
    recycling, arXiv 2408.08696). Of the settings, `tree_top_k` is the number of a node's children, and thresholds are taken at
    the drafter's own estimates.

    Args:
        store (`RetrievalStore`, *optional*): Earlier answers; those of this drafter's calls are added. It is shared by whoever
            is given it.
        draft_text (`str` or `Sequence[int]`, *optional*): A text that the answer probably resembles, from any point to any
            other: a page's words, an earlier version, a template. Token ids, or a string with `tokenizer`.
        tokenizer (*optional*): The target's tokenizer or processor, for a `draft_text` that is a string.
        num_likeliest (`int`): Tokens that are kept of what the target found likely after a node; 0 for none.
        max_text (`int`): Tokens of a text that are remembered, the last ones. About 0.3 kB each.
        settings (`DraftSettings`, *optional*): How to draft.

    Raises:
        ValueError: A string without a tokenizer, or a number that has no meaning.
    """

    def __init__(
        self,
        store: RetrievalStore | None = None,
        draft_text: str | Sequence[int] | torch.Tensor | None = None,
        tokenizer: Any = None,
        num_likeliest: int = 8,
        max_text: int = 32_768,
        settings: DraftSettings | None = None,
    ):
        self.mixture = Mixture()
        most = len(RANKS)
        if not 0 <= num_likeliest <= most:
            raise ValueError(f"`num_likeliest` ({num_likeliest}) must lie between 0 and {most}.")
        if max_text < 64:
            raise ValueError(f"`max_text` ({max_text}) must be at least 64.")
        self.store, self.num_likeliest, self.max_text = store, num_likeliest, max_text
        self.draft_ids = _token_ids(draft_text, tokenizer)
        self._settings = settings or DEFAULTS

    @property
    def settings(self) -> DraftSettings:
        return self._settings

    @property
    def needs(self) -> Needs:
        """The target's likeliest tokens after every node."""
        return Needs(num_likeliest=self.num_likeliest)

    def check(self, target: PreTrainedModel, settings: DraftSettings) -> None:
        """Refuse a vocabulary that has fewer tokens than are asked for."""
        num_tokens = target.config.get_text_config(decoder=True).vocab_size
        if self.num_likeliest > num_tokens:
            raise ValueError(
                f"`num_likeliest` ({self.num_likeliest}) must not exceed the target's `vocab_size` ({num_tokens})."
            )

    def start(self, prefill: Prefill, settings: DraftSettings) -> RetrievalSession:
        return RetrievalSession(self, prefill, settings)


class RetrievalSession(DraftSession):
    """The texts of all rows, and what the target found likely in any of them."""

    def __init__(self, drafter: RetrievalDrafter, prefill: Prefill, settings: DraftSettings):
        self.drafter, self.settings = drafter, settings
        prompts = prefill.token_ids.masked_fill(~prefill.is_text, UNKNOWN).tolist()
        earlier = prefill.earlier
        self.likeliest: LikeliestTokens
        self.texts: list[GrowingText]
        if isinstance(earlier, RetrievalSession) and earlier.drafter is drafter:
            self.likeliest, self.texts = earlier.likeliest, earlier.texts
            prompts = [prompt[1:] for prompt in prompts]  # which knows the first of these tokens
        else:
            self.likeliest = LikeliestTokens() if drafter.store is None else drafter.store.likeliest
            self.texts = [self._new_text(prefill) for _ in prompts]
        for text, prompt, first in zip(self.texts, prompts, prefill.first_tokens.tolist(), strict=True):
            text.read_prompt(prompt)
            text.read(first)

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        depth = self.settings.tree_depth if max_depth is None else min(self.settings.tree_depth, max_depth)
        with phase(GROWTH):
            return tree_of(root_tokens, [text.draft(self.settings, depth) for text in self.texts])

    def read(self, verified: Verified) -> None:
        for text, tokens, count in zip(self.texts, verified.tokens.tolist(), verified.counts, strict=True):
            text.read(tokens[:count])
        self.likeliest.note(verified)

    def suspend(self) -> RetrievalSession:
        return self

    def close(self) -> None:
        """Keep the answers, if there is a store."""
        if self.drafter.store is not None:
            for text in self.texts:
                self.drafter.store.add(text.answer)

    def _new_text(self, prefill: Prefill) -> GrowingText:
        """A text in which nothing stands but the drafter's `draft_text`."""
        target = prefill.target
        limits = Limits(
            num_tokens=target.text_config.vocab_size,
            never=frozenset(target.visual_ids),
            end_ids=prefill.end_ids,
            longest_text=self.drafter.max_text,
        )
        text = GrowingText(self.drafter.mixture, limits, self.drafter.store, self.likeliest)
        if self.drafter.draft_ids:
            text.read_prompt([*self.drafter.draft_ids, UNKNOWN])
        return text


def _token_ids(draft_text: str | Sequence[int] | torch.Tensor | None, tokenizer: Any) -> list[int]:
    """The tokens of a text."""
    if draft_text is None:
        return []
    if isinstance(draft_text, torch.Tensor):
        return [int(token) for token in draft_text.flatten().tolist()]
    if not isinstance(draft_text, str):
        return [int(token) for token in draft_text]
    if tokenizer is None:
        raise ValueError("`draft_text` is a string: pass the target's `tokenizer` as well, or token ids.")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    return list(tokenizer(draft_text, add_special_tokens=False)["input_ids"])
