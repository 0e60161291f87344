"""What a model that drafts has read so far: its own cache, and what it expects next."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...decoding.target_forward import TargetForward
from ...runtime.counts import Counts
from ...runtime.phases import DRAFTER, phase
from ...runtime.threads import cpu_threads
from ...targets.target import DecoderRecord, Target
from ..tentative import Draftable, TentativeLevels
from .reading import ReadPrompt


class ReadText:
    """A text of each row in slots of the model's cache, and the logits (B, 1, V) after its last token.

    Args:
        model (`Target`): The model.
        prompt (`ReadPrompt`): How the texts begin.
        tree_size (`int`): Most nodes that are drafted below them.
    """

    def __init__(self, model: Target, prompt: ReadPrompt, tree_size: int):
        self.device, self.logits = model.model.device, prompt.logits
        self.forward = TargetForward(model, len(prompt.logits), DecoderRecord(), tree_size)
        self.forward.begin(prompt.cache, prompt.model_kwargs, None)
        self.forward.take_over(prompt.cache)

    def read(self, tokens: torch.Tensor, counts: Sequence[int], threads: int | None) -> None:
        """Read on: the first `counts[b]` of `tokens` (B, T) of row b, in one forward; a row may get none."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        seen = (places[:, None] >= places).expand(len(tokens), -1, -1)
        with phase(DRAFTER), cpu_threads(threads):
            logits = self.forward.draft(tokens, places, seen).logits[:, -tokens.shape[1] :]
        counts = Counts.of(counts)
        self.forward.slots.commit(counts)
        last = counts.less(1).on(logits.device)[:, None, None].expand(-1, -1, logits.shape[-1])
        is_new = (counts.on(logits.device) > 0)[:, None, None]  # a row that gained nothing stays where it is
        self.logits = torch.where(is_new, logits.gather(1, last), self.logits)

    def levels(self, draftable: Draftable) -> TentativeLevels:
        """The levels of a tree below the last tokens."""
        return TentativeLevels(self.forward, draftable, lambda: self.logits, self.device)
