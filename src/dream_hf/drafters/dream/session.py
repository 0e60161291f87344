"""A drafter at work in one `generate()`: what it has read, what it has yet to read, and the trees it grows."""

from __future__ import annotations

import torch

from ...decoding.drafter import Prefill
from ...decoding.settings import DraftSettings
from ...decoding.tree import DraftTree
from ..lazy_session import LazySession
from ..levels import TargetHead
from ..pending import PendingTokens
from .compression import compress_text
from .modeling import DreamModel
from .reading import Reading
from .state import DrafterState, DreamLevels


class DreamSession(LazySession):
    """Reads lazily, see [`LazySession`].

    Args:
        drafter (`DreamModel`): The drafter; not changed.
        prefill (`Prefill`): What the target has read, with embeddings and features.
        settings (`DraftSettings`): How to draft.
        reading (`Reading`, *optional*): What to read of the prompt; by default as the drafter's config says.
    """

    def __init__(self, drafter: DreamModel, prefill: Prefill, settings: DraftSettings, reading: Reading | None = None):
        self.drafter, self.settings = drafter, settings
        self.reading = reading or drafter.config.reading
        self.head = borrow_head(drafter, prefill)
        self.state, self.pending = self._start_state(prefill)
        self._read_prompt(prefill)

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        whole, gained = self.state.whole_draft, None
        if whole is None or max_depth == 0:
            return super().draft(root_tokens, max_depth)
        if self.pending:
            gained = self.pending.take()
            if gained[0].shape[1] > self.settings.tree_depth + 1:  # more than a tree can gain, behind a pause
                self._read_on(*gained)
                gained = None
        return whole(self.state, self.head, root_tokens, gained)

    @property
    def looks_ahead(self) -> bool:
        return self.state.whole_draft is not None and not self.pending

    def look_ahead(self, tokens: torch.Tensor, features: torch.Tensor, counts: torch.Tensor) -> DraftTree:
        assert self.state.whole_draft is not None  # it looks ahead
        return self.state.whole_draft.look_ahead(self.state, self.head, tokens, features, counts)

    def levels(self) -> DreamLevels:
        self._catch_up()
        return DreamLevels(self.state, self.head)

    def _start_state(self, prefill: Prefill) -> tuple[DrafterState, PendingTokens]:
        """An empty state, or that of an earlier turn brought up to date."""
        if isinstance(prefill.earlier, DreamSession) and prefill.earlier.drafter is self.drafter:
            self.state, self.pending = prefill.earlier.state, prefill.earlier.pending
            self.state.settings = self.settings
            self.state.leave_inference_mode()
            self._catch_up()
            return self.state, self.pending
        batch_size = prefill.first_tokens.shape[0]
        num_slots = prefill.token_ids.shape[1] + self.settings.tree_depth * self.settings.tree_top_k
        state = DrafterState(self.drafter, batch_size, self.settings, prefill.compilation, num_slots)
        return state, PendingTokens()

    def _read_prompt(self, prefill: Prefill) -> None:
        """Read the prompt, without the visual tokens the target hardly attends to, and the first token behind it."""
        embeds, features = prefill.embeds, prefill.features
        assert embeds is not None and features is not None  # the drafter needs them
        # A drafter that goes on has read the first of these tokens, and not its feature.
        num_read = int(bool(self.state.tokens.longest))
        device = features.device
        text = compress_text(
            embeds[:, num_read:],
            features[:, num_read:],
            prefill.real.to(device),
            prefill.is_visual[:, num_read:].to(device),
            self.reading.visual_keep_ratio,
            self.reading.visual_importance,
            None if prefill.attention is None else prefill.attention[:, num_read:].to(device),
        )
        if prefill.longest_text is not None:
            depth, top_k = self.settings.tree_depth, self.settings.tree_top_k
            # A path that was gained, and beams behind it.
            self.state.limit(prefill.longest_text + depth * (top_k + 1) + 2)
        end = prefill.real.sum(-1, keepdim=True).to(device)
        self.state.read_prompt(text, self.head.embed(prefill.first_tokens), end, features[:, :num_read])


def borrow_head(drafter: DreamModel, prefill: Prefill) -> TargetHead:
    """The target's embedding and head, where they lie; they are asked for tokens and features from anywhere."""
    assert prefill.embeds is not None and prefill.features is not None
    target, embed_device = prefill.target, prefill.embeds.device
    device, dtype = prefill.features.device, prefill.features.dtype
    draft_logits = target.draft_logits(drafter)
    return TargetHead(
        embed=lambda token_ids: target.embed(token_ids.to(embed_device)),
        logits=lambda features: draft_logits(features.to(device, dtype)),
        token_ids=drafter.draft_token_ids,
        ends=prefill.end_ids,
    )
