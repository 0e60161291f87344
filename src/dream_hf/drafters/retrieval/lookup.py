"""Prompt lookup: what followed the last few tokens where they stood before (as `prompt_lookup_num_tokens` of transformers)."""

from __future__ import annotations

import torch

from ...decoding.drafter import Drafter, DraftSession, Prefill, Verified
from ...decoding.settings import DraftSettings
from ...decoding.tree import DraftTree

UNKNOWN = -1  # stands for pictures and padding: equal to no token, and never drafted


class PromptLookupDrafter(Drafter):
    """Drafts chains of up to `tree_depth` tokens; needs no training and nothing of the target.

    Args:
        max_match (`int`): Longest run of tokens that is looked for; shorter ones are tried where it is not found.
        settings (`DraftSettings`, *optional*): How to draft.
    """

    def __init__(self, max_match: int = 3, settings: DraftSettings | None = None):
        if max_match < 1:
            raise ValueError(f"`max_match` ({max_match}) must be at least 1.")
        self.max_match = max_match
        self._settings = settings or DraftSettings(tree_depth=10, tree_top_k=1)

    @property
    def settings(self) -> DraftSettings:
        return self._settings

    def start(self, prefill: Prefill, settings: DraftSettings) -> LookupSession:
        return LookupSession(prefill, self.max_match, settings)


class LookupSession(DraftSession):
    """The tokens of every row so far."""

    def __init__(self, prefill: Prefill, max_match: int, settings: DraftSettings):
        prompts = prefill.token_ids.masked_fill(~prefill.is_text, UNKNOWN)
        rows = torch.cat([prompts, prefill.first_tokens], dim=1).tolist()
        if isinstance(prefill.earlier, LookupSession):  # which knows the first of these tokens
            rows = [before + new[1:] for before, new in zip(prefill.earlier.rows, rows, strict=True)]
        self.rows: list[list[int]] = rows
        self.max_match, self.end_ids = max_match, prefill.end_ids
        self.max_depth = min(settings.tree_depth, settings.tree_size)

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        depth = self.max_depth if max_depth is None else min(self.max_depth, max_depth)
        return DraftTree.from_chains(root_tokens, [self._following(row, depth) for row in self.rows])

    def read(self, verified: Verified) -> None:
        gained = zip(verified.tokens.tolist(), verified.counts, strict=True)
        self.rows = [[*row, *tokens[:count]] for row, (tokens, count) in zip(self.rows, gained, strict=True)]

    def suspend(self) -> LookupSession:
        return self

    def _following(self, row: list[int], depth: int) -> list[int]:
        """Up to `depth` tokens that followed where the longest run of last tokens stood last."""
        for size in range(min(self.max_match, len(row) - 1), 0, -1):
            last = row[-size:]
            for start in range(len(row) - size - 1, -1, -1):
                if row[start : start + size] == last and UNKNOWN not in last:
                    return self._draftable(row[start + size : start + size + depth])
        return []

    def _draftable(self, tokens: list[int]) -> list[int]:
        """The first of `tokens`, up to a picture and with the first that ends the text."""
        for place, token in enumerate(tokens):
            if token == UNKNOWN:
                return tokens[:place]
            if token in self.end_ids:
                return tokens[: place + 1]
        return tokens
