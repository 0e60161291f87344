"""How probable a token is after what was matched.

Contexts of all lengths are mixed, the longest first, as in prediction by partial matching: a context after which `seen` tokens
were seen speaks for `seen / (seen + escape)` of what longer ones have left, and shorter ones share the rest. What the target
itself found likely after the same token comes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .ngrams import Match, NgramIndex

NEGLIGIBLE = 0.02  # share that shorter contexts are not asked for
FLOOR = 0.1
PART = 0.5  # of the smallest share that counts: what is less than that can hardly add up to it

Ranked = list[tuple[int, int]]  # tokens and their counts, most frequent first


@dataclass(frozen=True)
class Source:
    """Texts, and how much a sighting in them counts."""

    index: NgramIndex
    weight: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """What contexts are worth. Measured on answers of a vision-language model (`benchmarks/replay.py`).

    Args:
        escapes (`tuple[float, ...]`): For contexts of 0, 1, ... tokens: the sightings that weigh as much as all that was never
            seen.
        distinct (`float`): What each different token that was seen adds to that.
    """

    escapes: tuple[float, ...] = (8.0, 6.0, 4.0, 2.0, 1.4, 1.0, 0.4)
    distinct: float = 1.0

    @property
    def longest(self) -> int:
        """Tokens of the longest context."""
        return len(self.escapes) - 1

    def probabilities(
        self,
        sources: Sequence[Source],
        matches: Sequence[Match],
        likeliest: Sequence[tuple[int, float]] = (),
        min_share: float = 0.0,
    ) -> dict[int, float]:
        """The probability of each token that anything suggests.

        Args:
            sources (`Sequence[Source]`): Where to look.
            matches (`Sequence[Match]`): What was matched in each source.
            likeliest (`Sequence[tuple[int, float]]`): The target's choices after the same last token, with probabilities.
            min_share (`float`): Probability below which a token is of no use; what cannot reach it is not looked at closely.
        """
        probabilities: dict[int, float] = {}
        rest, negligible, floor = 1.0, max(NEGLIGIBLE, PART * min_share), FLOOR * min_share
        for length in range(max(map(len, matches)) - 1, -1, -1):
            if length == 0 and likeliest:  # they are the better guess
                rest = _add_likeliest(probabilities, likeliest, rest)
            found, seen, num_different = _sightings(sources, matches, length)
            if not seen:
                continue
            escape = self.escapes[length] + self.distinct * num_different
            share = rest / (seen + escape)
            for weight, ranked in found:
                each = share * weight
                for token, count in ranked:
                    if each * count < floor:
                        break
                    probabilities[token] = probabilities.get(token, 0.0) + each * count
            rest = share * escape
            if rest < negligible:
                break
        return probabilities


def _add_likeliest(probabilities: dict[int, float], likeliest: Sequence[tuple[int, float]], rest: float) -> float:
    """Give the target's likeliest tokens their shares of `rest`; returns what is left."""
    left = 1.0
    for token, share in likeliest:
        probabilities[token] = probabilities.get(token, 0.0) + rest * share
        left -= share
    return rest * max(left, 0.0)


def _sightings(
    sources: Sequence[Source], matches: Sequence[Match], length: int
) -> tuple[list[tuple[float, Ranked]], float, int]:
    """What followed the matched context of a length in each source with its weight; how often in all; how many different."""
    found: list[tuple[float, Ranked]] = []
    seen, num_different = 0.0, 0
    for source, match in zip(sources, matches, strict=True):
        if len(match) > length:
            count, ranked = source.index.ranked(match[length])
            if count:
                seen += source.weight * count
                num_different += len(ranked)
                found.append((source.weight, ranked))
    return found, seen, num_different
