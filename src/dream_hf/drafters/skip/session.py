"""The target drafting for itself, in tentative slots of its own cache."""

from __future__ import annotations

import torch

from ...decoding.drafter import DraftSession, NodeForward, Prefill, Verified
from ...decoding.settings import DraftSettings
from ...decoding.tree import DraftTree
from ...runtime.phases import DRAFTER, phase
from ...runtime.threads import cpu_threads
from ...targets.sublayers import leaving_out
from ...targets.target import sliding_windows
from ..growth import grow_tree
from ..tentative import Draftable, TentativeLevels
from .choice import SublayerChoice

LONGEST, SHORTEST = 32, 16  # tokens that a set of sublayers is tried on


class SkipSession(DraftSession):
    """Keeps nothing but the last tokens of each row; all that is read is in the target's cache.

    Args:
        choice (`SublayerChoice`): Knows what to leave out, and learns it.
        prefill (`Prefill`): With the target's forwards.
        settings (`DraftSettings`): How to draft.
    """

    def __init__(self, choice: SublayerChoice, prefill: Prefill, settings: DraftSettings):
        if prefill.forward is None:
            raise ValueError(
                "`LayerSkipDrafter` drafts in the target's cache, which transformers' own assisted decoding keeps to itself. "
                "Pass it to `generate(assistant_model=...)`."
            )
        self.choice, self.settings, self.end_ids = choice, settings, prefill.end_ids
        self.forward: NodeForward = prefill.forward
        self.draftable = Draftable(prefill.target.text_config.vocab_size, tuple(prefill.target.visual_ids))
        # All that is tried on has to see a key, and what has left a window may be gone.
        self.window = min(filter(None, sliding_windows(prefill.target.text_config)), default=LONGEST + 1)
        self.written: list[list[int]] = prefill.first_tokens.tolist()
        self.roots = prefill.first_tokens

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        self.roots = root_tokens
        with leaving_out(self.choice.modules()):
            return grow_tree(self.levels(), root_tokens, self.settings, self.end_ids, max_depth)

    def levels(self) -> TentativeLevels:
        """The levels below the last tokens, the root being the first node of all."""
        return TentativeLevels(self.forward, self.draftable, self._read_root, self.roots.device)

    def read(self, verified: Verified) -> None:
        for row, tokens, count in zip(self.written, verified.tokens.tolist(), verified.counts, strict=True):
            row.extend(tokens[:count])
            del row[: -LONGEST - 1]
        if not self.choice.search.is_over:  # whether or not drafting rests
            self._try_another()

    def _read_root(self) -> torch.Tensor:
        device = self.roots.device
        seen = torch.ones(len(self.roots), 1, 1, dtype=torch.bool, device=device)
        return self.forward.draft(self.roots, torch.zeros(1, dtype=torch.long, device=device), seen).logits[:, -1:]

    def _try_another(self) -> None:
        """Let the target say the last tokens again, all at once, without some other sublayers.

        They see the keys of the text before them as the whole target has written them, their own included.
        """
        num_tokens = min(*(len(row) - 1 for row in self.written), LONGEST, self.window - 1)
        if num_tokens < min(SHORTEST, self.window - 1):
            return
        rows = torch.tensor([row[-num_tokens - 1 :] for row in self.written], device=self.roots.device)
        depths = torch.arange(-num_tokens, 0, device=rows.device)
        nothing = torch.zeros(len(rows), num_tokens, num_tokens, dtype=torch.bool, device=rows.device)
        candidate = self.choice.search.candidate()
        with leaving_out(self.choice.modules(candidate)), phase(DRAFTER), cpu_threads(self.settings.draft_threads):
            logits = self.forward.draft(rows[:, :-1], depths, nothing).logits[:, -num_tokens:]
        self.forward.take_back()
        says = self.draftable(logits).argmax(-1).to(rows.device)
        self.choice.note(candidate, float((says == rows[:, 1:]).double().mean()))
