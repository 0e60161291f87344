"""When rows end: what the criteria say, asked as plain decoding asks them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from .sequences import Sequences


class Stopping:
    """Decides, token by token, where rows end; the criteria see what they would see in `generate()`.

    As there, a finished row is padded if an end-of-sequence token is set. If none is, it goes on until all rows have
    met a criterion.

    Args:
        criteria (`StoppingCriteriaList`): As prepared by `generate()`.
        batch_size (`int`): Rows.
    """

    def __init__(self, criteria: StoppingCriteriaList, batch_size: int):
        self.criteria = criteria
        self.pads_finished_rows = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.ended_at: list[int | None] = [None] * batch_size
        self.eos_token_ids = frozenset(
            int(token)
            for criterion in criteria
            if type(criterion) is EosTokenCriteria
            for token in criterion.eos_token_id
        )
        self.others = StoppingCriteriaList(
            criterion for criterion in criteria if type(criterion) not in (EosTokenCriteria, MaxLengthCriteria)
        )
        limits = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
        self.max_length = min(limits) if limits else None

    def levels_left(self, length: int) -> int | None:
        """How deep a tree can be of use below a row of a length, the target adding a token, or None without a limit."""
        return None if self.max_length is None else self.max_length - length - 1

    @property
    def end(self) -> int | None:
        """Length at which the last row met a criterion, or None while one has not."""
        known = [length for length in self.ended_at if length is not None]
        return max(known) if len(known) == len(self.ended_at) else None

    @property
    def is_open(self) -> bool:
        """Whether rows may have to go on after their end, for rows that have not met a criterion yet."""
        return bool(self.others) and not self.pads_finished_rows

    def is_done(self, sequences: Sequences) -> bool:
        """Whether no row needs another token."""
        return self.end is not None and (self.pads_finished_rows or min(sequences.lengths) >= self.end)

    def is_resting(self, row: int) -> bool:
        """Whether a row gets no more tokens."""
        ended_at = self.ended_at[row]
        return ended_at is not None and (self.pads_finished_rows or ended_at == self.max_length)

    def look(
        self,
        sequences: Sequences,
        rows: Sequence[int],
        tokens: Sequence[int],
        shown: Sequence[int],
        scores: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Find out which of `rows` end with the `tokens` they have just gained.

        Args:
            sequences (`Sequences`): All rows, those of `rows` of equal length.
            rows, tokens (`Sequence[int]`): Rows, and the last token of each.
            shown (`Sequence[int]`): Rows that criteria are shown, `rows` among them.
            scores (`Sequence[torch.Tensor]`, *optional*): Scores (B, V) behind every new token, for criteria.
        """
        length = sequences.lengths[rows[0]]
        is_met = [False] * len(shown)
        if self.others:
            seen = None if scores is None else tuple(scores[: length - sequences.prompt_length])
            is_met = self.others(sequences.at(length, shown), seen).tolist()  # type: ignore[arg-type]
        stopped = {row for row, met in zip(shown, is_met, strict=True) if met}
        for row, token in zip(rows, tokens, strict=True):
            is_over = row in stopped or token in self.eos_token_ids or length == self.max_length
            if is_over and self.ended_at[row] is None:
                self.ended_at[row] = length

    def cut(self, row: int, start: int, tokens: list[int]) -> int:
        """End a row of `start` tokens with the first of `tokens` that ends it, criteria apart; returns how many it keeps."""
        for count, token in enumerate(tokens, 1):
            if token in self.eos_token_ids or start + count == self.max_length:
                self.ended_at[row] = start + count
                return count
        return len(tokens)
