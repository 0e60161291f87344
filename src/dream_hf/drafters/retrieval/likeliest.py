"""What the target found likely after each token: its logits, used again (token recycling, arXiv 2408.08696)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ...decoding.drafter import Verified

MAX_ROWS = 32_768


class LikeliestTokens:
    """The target's likeliest tokens, best first, the last time that a token was verified; old ones are forgotten."""

    def __init__(self) -> None:
        self._rows: dict[int, list[int]] = {}
        self._lock = threading.Lock()  # a store's are noted by all who draft from it

    def after(self, token: int) -> Sequence[int]:
        """The likeliest tokens after `token`, as far as anything is known."""
        return self._rows.get(token, ())

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
