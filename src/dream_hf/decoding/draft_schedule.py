"""Drafting less deep, or not at all for a while, where it does not pay.

The rule looks at tokens gained and at nothing else, no clock above all: the same seed gives the same output. What is gained
in a pause piles up until drafting goes on; the drafter then reads it in one forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..drafters.dream.compression import left_aligned

WINDOW = 4  # drafted steps that are judged together
PROBE = 2  # drafted steps after a pause that decide about the next one
FIRST_PAUSE, LONGEST_PAUSE = 8, 64  # plain steps


class Pausing:
    """Whether the next step is drafted, and how deep.

    A tree has no more levels than twice the tokens that the best of the last `WINDOW` drafted steps gained, from the first
    pause or the first `WINDOW` steps on: a drafter that is sure of itself and wrong costs little, and one that is right is
    soon trusted with deep trees again.

    Drafting pauses when the last `WINDOW` drafted steps gained too little on average. At the start, where nothing is known,
    `PROBE` drafted steps are enough to say so. A pause lasts `FIRST_PAUSE` steps; then `PROBE` drafted steps decide whether it
    goes on. Every time they gain too little the pause is twice as long as the one before, up to `LONGEST_PAUSE`; after `WINDOW`
    steps that gained enough, pauses start short again.

    Args:
        pause_below (`float`): Tokens per drafted step, bonus included, that are too few below this; 0 never drafts less.
    """

    def __init__(self, pause_below: float):
        self.pause_below = pause_below
        self.gains: deque[float] = deque(maxlen=WINDOW)  # of drafted steps since the last pause, the mean over rows
        self.best_gains: deque[int] = deque(maxlen=WINDOW)  # of drafted steps, the row that gained most
        self.num_plain = 0  # steps left in this pause
        self.next_pause = FIRST_PAUSE

    @property
    def is_paused(self) -> bool:
        """Whether the next step is a plain one."""
        return self.num_plain > 0

    @property
    def max_depth(self) -> int | None:
        """Most levels the next tree should have, or None without a limit."""
        has_paused = self.next_pause > FIRST_PAUSE
        if not self.pause_below or (len(self.best_gains) < WINDOW and not has_paused):
            return None
        return 2 * max(self.best_gains)

    def note(self, gained: Sequence[int]) -> None:
        """Take in the tokens that the rows that go on have gained in the step just made."""
        if self.num_plain:
            self.num_plain -= 1
            return
        self.gains.append(sum(gained) / len(gained))
        self.best_gains.append(max(gained))
        if len(self.gains) not in (PROBE, WINDOW):
            return
        if sum(self.gains) < self.pause_below * len(self.gains):
            self.num_plain = self.next_pause
            self.next_pause = min(2 * self.next_pause, LONGEST_PAUSE)
            self.gains.clear()
        elif len(self.gains) == WINDOW:
            self.next_pause = FIRST_PAUSE


@dataclass
class Unread:
    """Tokens that were gained and that the drafter has yet to read, step by step, with the features below them."""

    tokens: list[torch.Tensor] = field(default_factory=list)  # (B, T) each
    features: list[torch.Tensor] = field(default_factory=list)  # (B, T, H) each
    counts: list[Sequence[int]] = field(default_factory=list)  # of row b the first `counts[b]` matter

    def add(self, tokens: torch.Tensor, features: torch.Tensor, counts: Sequence[int]) -> None:
        """Keep what a step gained: the first `counts[b]` of `tokens` (B, T) and `features` (B, T, H) of row b."""
        self.tokens.append(tokens)
        self.features.append(features)
        self.counts.append(counts)

    def take(self) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """All of it, laid out as one step would be: tokens (B, T), features (B, T, H), counts; nothing is left."""
        tokens, features = torch.cat(self.tokens, dim=1), torch.cat(self.features, dim=1)
        counts = [sum(row) for row in zip(*self.counts, strict=True)]
        if len(self.tokens) > 1:
            matters = [torch.arange(part.shape[1]) for part in self.tokens]
            is_gained = torch.cat(
                [places < torch.tensor(row)[:, None] for places, row in zip(matters, self.counts, strict=True)], dim=1
            )
            order = left_aligned(is_gained)[0][:, : max(counts)]
            tokens = tokens.gather(1, order.to(tokens.device))
            wide = order.to(features.device)[..., None].expand(-1, -1, features.shape[-1])
            features = features.gather(1, wide)
        self.tokens, self.features, self.counts = [], [], []
        return tokens, features, counts

    def __bool__(self) -> bool:
        return bool(self.tokens)
