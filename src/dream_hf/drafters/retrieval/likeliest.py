"""What the target found likely after each token: its logits, used again (token recycling, arXiv 2408.08696)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise

from ...decoding.drafter import Verified

MAX_ROWS = 32_768
RANKS = (0.4, 0.13, 0.07, 0.05, 0.03, 0.025, 0.02, 0.015)  # how often a rank is right, as long as nothing is known
NUM_ASSUMED = 20  # sightings that this counts as


class LikeliestTokens:
    """The target's likeliest tokens, the last time that a token was verified, and how often each rank turns out right.

    Old rows are forgotten.
    """

    def __init__(self) -> None:
        self._rows: dict[int, list[int]] = {}
        self._num_right = [NUM_ASSUMED * share for share in RANKS]
        self._num_seen = float(NUM_ASSUMED)
        self._lock = threading.Lock()  # a store's are noted by all who draft from it

    def after(self, token: int) -> list[tuple[int, float]]:
        """The likeliest tokens after `token`, best first, with their probabilities; none where nothing is known."""
        row = self._rows.get(token)
        if row is None:
            return []
        num_seen = self._num_seen
        return [(follower, right / num_seen) for follower, right in zip(row, self._num_right, strict=False)]

    def judge(self, tokens: Sequence[int]) -> None:
        """Learn from what the target wrote how good its earlier choices were as guesses."""
        with self._lock:
            for token, follower in pairwise(tokens):
                row = self._rows.get(token)
                if row is not None:
                    self._num_seen += 1
                    if follower in row:
                        self._num_right[row.index(follower)] += 1

    def note(self, verified: Verified) -> None:
        """Take in what was found after every verified node, the rejected ones too."""
        if verified.tree is None or verified.likeliest is None:
            return
        with self._lock:
            for tokens, rows in zip(verified.tree.tokens.tolist(), verified.likeliest.tolist(), strict=True):
                # Of one token's rows the first counts: nodes are in order of promise, what fills up a tree is at its end.
                for token, row in zip(reversed(tokens), reversed(rows), strict=True):
                    self._rows.pop(token, None)
                    self._rows[token] = row
            while len(self._rows) > MAX_ROWS:
                del self._rows[next(iter(self._rows))]
