"""A model that drafts, at work in one `generate()`: its cache, what it has yet to read, and the trees it grows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...decoding.drafter import DraftSession, Prefill, Verified
from ...decoding.settings import DraftSettings
from ...decoding.tree import DraftTree
from ...runtime.phases import DRAFTER, phase
from ...targets.target import Target
from ..growth import grow_tree
from ..pending import PendingTokens
from ..tentative import Draftable, TentativeLevels
from .reading import read_pictures, read_text
from .text import ReadText


class ModelSession(DraftSession):
    """What a model has read lies in slots of its own cache. It reads lazily: what was gained, before the next tree.

    Args:
        model (`Target`): The model that drafts.
        prefill (`Prefill`): What the target has read.
        settings (`DraftSettings`): How to draft.
        draftable (`Draftable`): What may be drafted.
        use_pictures (`bool`): Whether the model takes the target's pictures.
    """

    def __init__(
        self, model: Target, prefill: Prefill, settings: DraftSettings, draftable: Draftable, use_pictures: bool
    ):
        self.model, self.settings, self.draftable, self.end_ids = model, settings, draftable, prefill.end_ids
        if not self._goes_on_from(prefill):
            self._begin(prefill, use_pictures)

    def _begin(self, prefill: Prefill, use_pictures: bool) -> None:
        """Read a prompt from its start; the pictures of earlier turns are not at hand."""
        self.pending = PendingTokens()
        sees_pictures = use_pictures and bool(prefill.inputs) and bool(prefill.is_visual.any())
        with phase(DRAFTER):
            prompt = read_pictures(self.model, prefill) if sees_pictures else read_text(self.model, prefill)
        if sees_pictures:
            self._note(prefill.first_tokens, [1] * len(prefill.first_tokens))
        self.text = ReadText(self.model, prompt, self.settings.tree_size)

    def _goes_on_from(self, prefill: Prefill) -> bool:
        """Take over what an earlier turn has left, unless this one has pictures of its own."""
        earlier = prefill.earlier
        if not isinstance(earlier, ModelSession) or earlier.model is not self.model or prefill.is_visual.any():
            return False
        self.pending, self.text = earlier.pending, earlier.text
        if not torch.is_inference_mode_enabled():
            for layer in self.text.forward.layers:
                layer.leave_inference_mode()
        new = torch.cat([prefill.token_ids[:, 1:], prefill.first_tokens.to(prefill.token_ids)], dim=1)
        self._note(new, [new.shape[1]] * len(new))
        return True

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        roots = root_tokens.to(self.model.model.device)
        with self.model.taking_trees():
            return grow_tree(self.levels(), roots, self.settings, self.end_ids, max_depth)

    def levels(self) -> TentativeLevels:
        """The levels below the last tokens; what was gained is read first."""
        self._catch_up()
        return self.text.levels(self.draftable)

    def read(self, verified: Verified) -> None:
        self._note(verified.tokens, verified.counts)

    def suspend(self) -> ModelSession:
        return self

    def _note(self, tokens: torch.Tensor, counts: Sequence[int]) -> None:
        """Take note of the first `counts[b]` tokens of each row; a model needs no features."""
        tokens = tokens.to(self.model.model.device)
        self.pending.add(tokens, tokens.new_zeros(*tokens.shape, 0), counts)

    def _catch_up(self) -> None:
        """Read what was gained since the last draft, all of it in one forward."""
        if not self.pending:
            return
        tokens, _, counts = self.pending.take()
        tokens = tokens[:, : max(counts)].clamp(max=self.model.text_config.vocab_size - 1)
        self.text.read(tokens, counts, self.settings.draft_threads)
