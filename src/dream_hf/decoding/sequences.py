"""The rows being generated, and when they end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class Texts:
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


class Ends:
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

    def room(self, texts: Texts) -> int | None:
        """How many tokens the shortest row may still gain, or None without a limit."""
        return None if self.max_length is None else self.max_length - min(texts.lengths)

    @property
    def end(self) -> int | None:
        """Length at which the last row met a criterion, or None while one has not."""
        known = [length for length in self.ended_at if length is not None]
        return max(known) if len(known) == len(self.ended_at) else None

    @property
    def is_open(self) -> bool:
        """Whether rows may have to go on after their end, for rows that have not met a criterion yet."""
        return bool(self.others) and not self.pads_finished_rows

    def is_done(self, texts: Texts) -> bool:
        """Whether no row needs another token."""
        return self.end is not None and (self.pads_finished_rows or min(texts.lengths) >= self.end)

    def is_resting(self, row: int) -> bool:
        """Whether a row gets no more tokens."""
        ended_at = self.ended_at[row]
        return ended_at is not None and (self.pads_finished_rows or ended_at == self.max_length)

    def look(
        self,
        texts: Texts,
        rows: Sequence[int],
        tokens: Sequence[int],
        shown: Sequence[int],
        scores: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Find out which of `rows` end with the `tokens` they have just gained.

        Args:
            texts (`Texts`): All rows, those of `rows` of equal length.
            rows, tokens (`Sequence[int]`): Rows, and the last token of each.
            shown (`Sequence[int]`): Rows that criteria are shown, `rows` among them.
            scores (`Sequence[torch.Tensor]`, *optional*): Scores (B, V) behind every new token, for criteria.
        """
        length = texts.lengths[rows[0]]
        is_met = [False] * len(shown)
        if self.others:
            seen = None if scores is None else tuple(scores[: length - texts.prompt_length])
            is_met = self.others(texts.at(length, shown), seen).tolist()  # type: ignore[arg-type]
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


class Stream:
    """Feeds a streamer token by token, all rows of a batch in step, as `generate()` does."""

    def __init__(self, streamer: BaseStreamer | None, texts: Texts):
        self.streamer = streamer
        self.num_sent = texts.prompt_length

    def send(self, texts: Texts, ends: Ends) -> None:
        """Send what every row has reached."""
        if self.streamer is None:
            return
        reached = [length for row, length in enumerate(texts.lengths) if not ends.is_resting(row)]
        for length in range(self.num_sent, min(reached) if reached else max(texts.lengths)):
            self.streamer.put(texts.column(length).cpu())
            self.num_sent = length + 1

    def close(self) -> None:
        """Tell the streamer that nothing follows."""
        if self.streamer is not None:
            self.streamer.end()
