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
        self.ids = input_ids
        self.pad_token_id = pad_token_id
        self.prompt_length = input_ids.shape[1]
        self.lengths = [self.prompt_length] * input_ids.shape[0]

    def extend(self, tokens: torch.Tensor, counts: Sequence[int]) -> None:
        """Append the first `counts[b]` of `tokens` (B, D) to row b."""
        width = max(length + count for length, count in zip(self.lengths, counts, strict=True))
        self._widen(width)
        for row, count in enumerate(counts):
            self.ids[row, self.lengths[row] : self.lengths[row] + count] = tokens[row, :count]
            self.lengths[row] += count

    def cut(self, row: int, length: int) -> None:
        """Shorten a row to `length` tokens."""
        self.ids[row, length:] = self.pad_token_id
        self.lengths[row] = length

    def at(self, length: int) -> torch.Tensor:
        """All rows as they stood when they had `length` tokens, (B, length); rows that are not there yet are padded."""
        self._widen(length)
        return self.ids[:, :length]

    def _widen(self, width: int) -> None:
        missing = width - self.ids.shape[1]
        if missing > 0:
            padding = self.ids.new_full((self.ids.shape[0], missing), self.pad_token_id)
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

    def is_done(self, texts: Texts) -> bool:
        """Whether no row needs another token."""
        return self.end is not None and (self.pads_finished_rows or min(texts.lengths) >= self.end)

    def is_resting(self, row: int) -> bool:
        """Whether a row gets no more tokens."""
        ended_at = self.ended_at[row]
        return ended_at is not None and (self.pads_finished_rows or ended_at == self.max_length)

    def overshoot(self, texts: Texts) -> list[int]:
        """Tokens each row has beyond the end of the last one: rows that went on for others may have gone too far."""
        return [max(length - (self.end or length), 0) for length in texts.lengths]

    def cut(self, texts: Texts, gained: list[list[int]], scores: tuple[torch.Tensor, ...] | None) -> list[int]:
        """Cut freshly extended `texts` at their ends; returns how many of the `gained` tokens each row keeps."""
        starts = [length - len(tokens) for length, tokens in zip(texts.lengths, gained, strict=True)]
        for length in range(min(starts) + 1, max(texts.lengths) + 1):
            rows = [
                row
                for row, start in enumerate(starts)
                if start < length <= texts.lengths[row] and self.ended_at[row] is None
            ]
            if not rows:
                continue
            seen = scores and scores[: length - texts.prompt_length]
            others = self.others(texts.at(length), seen).tolist() if self.others else None
            for row in rows:
                token = gained[row][length - starts[row] - 1]
                is_full = self.max_length is not None and length >= self.max_length
                if is_full or token in self.eos_token_ids or (others is not None and others[row]):
                    self.ended_at[row] = length
        for row, start in enumerate(starts):
            ended_at = self.ended_at[row]
            if ended_at is not None and self.is_resting(row) and texts.lengths[row] > ended_at:
                texts.cut(row, max(ended_at, start))
        return [length - start for length, start in zip(texts.lengths, starts, strict=True)]


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
            self.streamer.put(texts.at(length + 1)[:, length].cpu())
            self.num_sent = length + 1

    def close(self) -> None:
        """Tell the streamer that nothing follows."""
        if self.streamer is not None:
            self.streamer.end()
