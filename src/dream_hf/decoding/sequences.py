"""The rows being generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Sequences:
    """Token rows of different lengths, laid out as `generate()` returns them: prompt, new tokens, padding.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, P)`): The prompts, padded on the left.
        pad_token_id (`int`): Fills what a row has not reached.
    """

    def __init__(self, input_ids: torch.Tensor, pad_token_id: int):
        self.ids = input_ids  # (B, room), written in place behind the prompt; never the caller's tensor by then
        self.pad_token_id = pad_token_id
        self.prompt_length = input_ids.shape[1]
        self.lengths = [self.prompt_length] * input_ids.shape[0]

    def extend(self, tokens: torch.Tensor, counts: Sequence[int]) -> None:
        """Append the first `counts[b]` of `tokens` (B, D) to row b."""
        self._reserve(max(length + count for length, count in zip(self.lengths, counts, strict=True)))
        for row, count in enumerate(counts):
            self.ids[row, self.lengths[row] : self.lengths[row] + count] = tokens[row, :count]
            self.lengths[row] += count

    def append(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Append one of `tokens` to each of `rows`, which have equally many."""
        length = self.lengths[rows[0]]
        self._reserve(length + 1)
        self.ids[rows, length] = self.ids.new_tensor(tokens)
        for row in rows:
            self.lengths[row] += 1

    def at(self, length: int, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Some rising rows, by default all, when they had `length` tokens, (n, length); rows that are not there are padded."""
        self._reserve(length)
        if rows is None or len(rows) == self.ids.shape[0]:
            return self.ids[:, :length].contiguous()
        return self.ids[list(rows), :length]

    def column(self, place: int) -> torch.Tensor:
        """The token of each row at one place, (B,)."""
        self._reserve(place + 1)
        return self.ids[:, place]

    def _reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens, and for as many again, so that nothing is copied token by token."""
        missing = length - self.ids.shape[1]
        if missing > 0:
            padding = self.ids.new_full((self.ids.shape[0], length), self.pad_token_id)
            self.ids = torch.cat([self.ids, padding], dim=1)
