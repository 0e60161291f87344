"""One text that is being written, and how it may go on by all that is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from ...decoding.settings import DraftSettings
from ..best_first import Nodes, best_nodes
from .likeliest import LikeliestTokens
from .mixture import Mixture, Source
from .ngrams import Match, NgramIndex
from .store import RetrievalStore

UNKNOWN = -1  # stands for pictures and padding: equal to no token, and never drafted


@dataclass(frozen=True)
class Limits:
    """What may be drafted, and how much is remembered.

    Args:
        num_tokens (`int`): Size of the target's vocabulary.
        never (`frozenset[int]`): Tokens that are never drafted: placeholders of pictures.
        end_ids (`frozenset[int]`): Tokens that end the text.
        longest_text (`int`): Tokens of the text that are remembered, the last ones.
        own_weight (`float`): Sightings in a store that one in the text itself is worth.
    """

    num_tokens: int
    never: frozenset[int] = frozenset()
    end_ids: frozenset[int] = frozenset()
    longest_text: int = 32_768
    own_weight: float = 2.0


@dataclass
class GrowingText:
    """A prompt and what was written behind it.

    Args:
        mixture (`Mixture`): What contexts are worth.
        limits (`Limits`): What may be drafted.
        store (`RetrievalStore`, *optional*): Earlier answers.
        likeliest (`LikeliestTokens`): The target's likeliest tokens after each token.
    """

    mixture: Mixture
    limits: Limits
    store: RetrievalStore | None = None
    likeliest: LikeliestTokens = field(default_factory=LikeliestTokens)

    def __post_init__(self) -> None:
        self.index = NgramIndex(self.mixture.longest)
        self.sources = [Source(self.index, self.limits.own_weight)]
        if self.store is not None:
            self.sources.append(Source(self.store.index))
        self.last = [UNKNOWN]  # tokens, as many as are matched
        self.answer: list[int] = []

    def read_prompt(self, tokens: Sequence[int]) -> None:
        """Take in text that was not written by the target, `UNKNOWN` where there is none."""
        self.index.extend(tokens[-self.limits.longest_text :])
        self._note_last(tokens)
        self.answer = list(self.last)  # what an answer is found by

    def read(self, tokens: Sequence[int]) -> None:
        """Take in what the target has written."""
        self.likeliest.judge([*self.last[-1:], *tokens])
        self.index.extend(tokens)
        self._note_last(tokens)
        self.answer.extend(tokens)
        if len(self.index.tokens) > self.limits.longest_text:
            self.index.forget(self.limits.longest_text // 8)

    def draft(self, settings: DraftSettings, max_depth: int) -> Nodes:
        """The nodes most worth verifying."""
        with nullcontext() if self.store is None else self.store.lock:
            matches = [self.index.match()]
            if self.store is not None:
                matches.append(self.store.index.matched(self.last))
            return best_nodes(self._following, matches, settings, max_depth, self.limits.end_ids)

    def _following(
        self, matches: list[Match], token: int | None, min_share: float
    ) -> tuple[list[Match], list[tuple[int, float]]]:
        """What is matched one token further on, and what may follow there."""
        if token is None:
            token = self.last[-1]
        else:
            matches = [
                source.index.followed(match, token) for source, match in zip(self.sources, matches, strict=True)
            ]
        probabilities = self.mixture.probabilities(self.sources, matches, self.likeliest.after(token), min_share)
        num_tokens, never = self.limits.num_tokens, self.limits.never
        usable = [pair for pair in probabilities.items() if pair[0] < num_tokens and pair[0] not in never]
        usable.sort(key=_probability, reverse=True)
        return matches, usable

    def _note_last(self, tokens: Sequence[int]) -> None:
        self.last = [*self.last, *tokens[-self.mixture.longest :]][-self.mixture.longest :]


def _probability(pair: tuple[int, float]) -> float:
    return pair[1]
