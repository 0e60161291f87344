"""A model that drafts, at work in one `generate()`: its cache, what it has yet to read, and the trees it grows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...decoding.drafter import DraftSession, Prefill, Verified
from ...decoding.settings import DraftSettings
from ...decoding.target_forward import TargetForward
from ...decoding.tree import DraftTree
from ...runtime.counts import Counts
from ...runtime.phases import DRAFTER, phase
from ...runtime.threads import cpu_threads
from ...targets.target import DecoderRecord, Target
from ..growth import grow_tree
from ..pending import PendingTokens
from ..tentative import Draftable, TentativeLevels
from .reading import read_pictures, read_text


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
        self.root_logits = prompt.logits
        self.forward = TargetForward(self.model, len(prefill.first_tokens), DecoderRecord(), self.settings.tree_size)
        self.forward.begin(prompt.cache, prompt.model_kwargs, None)
        self.forward.take_over(prompt.cache)

    def _goes_on_from(self, prefill: Prefill) -> bool:
        """Take over what an earlier turn has left, unless this one has pictures of its own."""
        earlier = prefill.earlier
        if not isinstance(earlier, ModelSession) or earlier.model is not self.model or prefill.is_visual.any():
            return False
        self.pending, self.root_logits = earlier.pending, earlier.root_logits
        self.forward = earlier.forward
        if not torch.is_inference_mode_enabled():
            for layer in self.forward.layers:
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
        return TentativeLevels(self.forward, self.draftable, lambda: self.root_logits, self.model.model.device)

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
        places = torch.arange(tokens.shape[1], device=tokens.device)
        seen = (places[:, None] >= places).expand(len(tokens), -1, -1)
        with phase(DRAFTER), cpu_threads(self.settings.draft_threads):
            logits = self.forward.draft(tokens, places, seen).logits[:, -tokens.shape[1] :]
        counts = Counts.of(counts)
        self.forward.slots.commit(counts)
        last = counts.less(1).on(logits.device)[:, None, None].expand(-1, -1, logits.shape[-1])
        is_new = (counts.on(logits.device) > 0)[:, None, None]  # a row that gained nothing stays where it is
        self.root_logits = torch.where(is_new, logits.gather(1, last), self.root_logits)
