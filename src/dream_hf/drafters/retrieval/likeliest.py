"""What the target found likely after each token: its logits, used again (token recycling, arXiv 2408.08696)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ...decoding.drafter import Verified

MAX_ROWS = 32_768


class LikeliestTokens(Mapping[int, Sequence[int]]):
    """The target's likeliest tokens, best first, the last time that a token was verified; old ones are forgotten."""

    def __init__(self) -> None:
        self._rows: dict[int, list[int]] = {}

    def __getitem__(self, token: int) -> list[int]:
        return self._rows[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def note(self, verified: Verified) -> None:
        """Take in what was found after every verified node, the rejected ones too."""
        if verified.tree is None or verified.likeliest is None:
            return
        for tokens, rows in zip(verified.tree.tokens.tolist(), verified.likeliest.tolist(), strict=True):
            # Of one token's rows the first counts: nodes are in order of promise, and what fills up a tree is at its end.
            for token, row in zip(reversed(tokens), reversed(rows), strict=True):
                self._rows.pop(token, None)
                self._rows[token] = row
        while len(self._rows) > MAX_ROWS:
            del self._rows[next(iter(self._rows))]
