"""What followed which runs of tokens: a trie of n-grams that is read as contexts of falling length.

An n-gram seen once is no node but a place in the text, where what follows it can be read; only repeated ones cost a node. So a
token costs a few dictionary entries, whatever the vocabulary, and matching one more token costs one look-up per length.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 6  # tokens that are matched
MAX_RANKED = 20  # followers of a context that are worth a look


class Context:
    """An n-gram that was seen more than once.

    Args:
        count (`int`): How often it was seen.
        followers (`dict[int, Context | int]`): What followed it: the n-gram one token longer, or the place behind that where
            it was seen but once.
        ranked (`tuple`, *optional*): What [`NgramIndex.ranked`] has found, until something changes.
    """

    __slots__ = ("count", "followers", "ranked")

    def __init__(self, count: int):
        self.count = count
        self.followers: dict[int, Context | int] = {}
        self.ranked: tuple[int, list[tuple[int, int]]] | None = None


Match = list[Context | int]  # for lengths 0, 1, ...: where the last tokens of that number stand


class NgramIndex:
    """The n-grams of texts, up to a length.

    Args:
        max_length (`int`): Longest run of tokens that is matched.
    """

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.tokens: list[int] = []
        self.num_dropped = 0  # tokens at the start that are forgotten
        self.root = Context(0)
        self.stale_at = 0  # place from which the root's ranking is made anew
        self.active: list[Context] = [self.root]  # contexts that the next token follows: lengths 0, 1, ...

    def append(self, token: int) -> None:
        """Go on with the text; what a negative token stands for is unknown, and no n-gram spans it."""
        place = self.num_dropped + len(self.tokens)
        self.tokens.append(token)
        if token < 0:
            self.active = [self.root]
            return
        going_on = [self.root]
        if place >= self.stale_at:  # what follows nothing at all hardly changes
            self.root.ranked, self.stale_at = None, place + place // 16 + 1
        for context in self.active:
            if context is not self.root:
                context.ranked = None
            found = context.followers.get(token)
            if found is None:
                context.followers[token] = place + 1
                continue
            if isinstance(found, int):
                found = context.followers[token] = self._expanded(found)
            found.count += 1
            if len(going_on) <= self.max_length:
                going_on.append(found)
        self.active = going_on

    def forget(self, num_tokens: int) -> None:
        """Forget the first tokens, but for the last few of the text."""
        num_tokens = min(num_tokens, len(self.tokens) - self.max_length - 2)
        for start in range(num_tokens):
            self._forget_ngrams(self.tokens[start : start + self.max_length + 1])
        if num_tokens > 0:
            del self.tokens[:num_tokens]
            self.num_dropped += num_tokens
            self.root.ranked = None

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on with several tokens."""
        for token in tokens:
            self.append(token)

    def match(self) -> Match:
        """Where the last tokens stood before, for every length that did."""
        return list(self.active)

    def matched(self, tokens: Sequence[int]) -> Match:
        """Where the last of `tokens` stand, for every length that does."""
        match: Match = [self.root]
        for token in tokens[-self.max_length :]:
            match = self.followed(match, token)
        return match

    def followed(self, match: Match, token: int) -> Match:
        """Where the matched tokens and `token` stand."""
        longer: Match = [self.root]
        tokens, start = self.tokens, self.num_dropped
        for context in match[: self.max_length]:
            if isinstance(context, int):
                if context - start >= len(tokens) or tokens[context - start] != token:
                    break
                longer.append(context + 1)
            else:
                found = context.followers.get(token)
                if found is None:
                    break
                longer.append(found)
        return longer

    def ranked(self, context: Context | int) -> tuple[int, list[tuple[int, int]]]:
        """How often something followed, and the tokens that did most often, with their counts."""
        if isinstance(context, int):
            place = context - self.num_dropped
            if place >= len(self.tokens) or self.tokens[place] < 0:
                return 0, []
            return 1, [(self.tokens[place], 1)]
        if context.ranked is None:
            counts = [
                (token, 1 if isinstance(found, int) else found.count) for token, found in context.followers.items()
            ]
            counts.reverse()  # of those equally frequent the latest come first
            counts.sort(key=_count, reverse=True)
            context.ranked = sum(count for _, count in counts), counts[:MAX_RANKED]
        return context.ranked

    def _forget_ngrams(self, tokens: Sequence[int]) -> None:
        """Forget the first sighting of every n-gram that `tokens` begin with."""
        context = self.root
        for token in tokens:
            found = context.followers.get(token)  # a negative token follows nothing
            if found is None:
                return
            context.ranked = None
            if isinstance(found, int) or found.count == 1:
                del context.followers[token]  # with all that is longer
                return
            found.count -= 1
            context = found

    def _expanded(self, place: int) -> Context:
        """The node of an n-gram that was seen once, before `place`."""
        context = Context(1)
        if self.tokens[place - self.num_dropped] >= 0:
            context.followers[self.tokens[place - self.num_dropped]] = place + 1
        return context


def _count(entry: tuple[int, int]) -> int:
    return entry[1]
