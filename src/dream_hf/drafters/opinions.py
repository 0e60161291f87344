"""Several drafters' trees below one token as one: what each thinks may follow, the most trusted first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..decoding.settings import DraftSettings
from ..decoding.tree import DraftTree
from .best_first import Nodes, best_nodes

GUESS = 0.5  # of each token of a drafter that says no probabilities
UNSAID = 0.05  # share of what a drafter has left that one token gets which it has not named
LEAD = 4.0  # of the last drafter: as if others had found one token 50 times less probable
DOUBT = 0.1  # what a drafter has left at the least when it is judged: probabilities of drafts are overconfident
MEMORY = 0.9  # of trust, from one token to the next


@dataclass
class Opinion:
    """What a drafter thinks may follow a node: the probability of each token, and what it thinks after that."""

    shares: dict[int, float] = field(default_factory=dict)
    after: dict[int, Opinion] = field(default_factory=dict)

    def share(self, token: int) -> float:
        """The probability of a token, named or not."""
        named = self.shares.get(token)
        return UNSAID * max(1.0 - sum(self.shares.values()), DOUBT) if named is None else max(named, 1e-6)

    def room(self, max_depth: int, end_ids: frozenset[int]) -> float:
        """The greatest probability that is left for others: of what follows a node beside what is named there."""
        most, nodes = 0.0, [(self, 1.0, 0)]
        for opinion, reached, depth in nodes:  # which grows meanwhile
            if depth < max_depth:
                most = max(most, reached * (1.0 - sum(opinion.shares.values())))
                nodes += [
                    (opinion.after[token], reached * share, depth + 1)
                    for token, share in opinion.shares.items()
                    if token not in end_ids
                ]
        return most


def reach(opinion: Opinion, tokens: Sequence[int]) -> int:
    """How many of the tokens that followed were drafted one below the other."""
    found = 0
    for token in tokens:
        if token not in opinion.after:
            break
        opinion, found = opinion.after[token], found + 1
    return found


def opinions_of(tree: DraftTree) -> list[Opinion]:
    """The opinion below the root of each row of a tree; nodes that are never reached are left out."""
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    log_probs = (math.log(GUESS) * tree.depths if tree.log_probs is None else tree.log_probs).tolist()
    rows = []
    for row_tokens, row_parents, row_log_probs in zip(tokens, parents, log_probs, strict=True):
        nodes: list[Opinion | None] = [Opinion()]
        for node in range(1, len(row_tokens)):
            parent, above = nodes[row_parents[node]], row_log_probs[row_parents[node]]
            if parent is None or row_log_probs[node] == -math.inf or row_tokens[node] in parent.shares:
                nodes.append(None)
                continue
            opinion = Opinion()
            parent.shares[row_tokens[node]] = min(math.exp(row_log_probs[node] - above), 1.0)
            parent.after[row_tokens[node]] = opinion
            nodes.append(opinion)
        assert nodes[0] is not None
        rows.append(nodes[0])
    return rows


class Panel:
    """How far each drafter is trusted in one row's text: how probable it found what the target wrote, the latest above all.

    Args:
        num_drafters (`int`): How many there are. The last has a lead.
    """

    def __init__(self, num_drafters: int):
        self.trust = [0.0] * (num_drafters - 1) + [LEAD]

    def judge(self, opinions: Mapping[int, Opinion], tokens: Sequence[int]) -> None:
        """Take in what the target has written where those who were asked had these opinions, by their places."""
        for token in tokens:
            shares = {place: math.log(opinion.share(token)) for place, opinion in opinions.items() if opinion.shares}
            best = max(shares.values(), default=0.0)
            for place, share in shares.items() if len(shares) > 1 else ():  # one alone is compared with nobody
                self.trust[place] = MEMORY * self.trust[place] + share - best
            opinions = {place: opinion.after[token] for place, opinion in opinions.items() if token in opinion.after}


def agreed_nodes(
    opinions: Sequence[Opinion], settings: DraftSettings, max_depth: int, end_ids: frozenset[int]
) -> Nodes:
    """The nodes most worth verifying, of all that those who were asked have drafted, the most trusted first.

    The probabilities of the most trusted drafter count as they are; the next one shares what that has left, and so on. Where a
    drafter says nothing the next one has it all.
    """
    return best_nodes(_following, list(opinions), settings, max_depth, end_ids)


def _following(
    opinions: list[Opinion], token: int | None, min_share: float
) -> tuple[list[Opinion], list[tuple[int, float]]]:
    """What is thought after `token`, the most trusted first, and what may follow there, the likeliest first."""
    if token is not None:
        opinions = [opinion.after[token] for opinion in opinions if token in opinion.after]
    shares: dict[int, float] = {}
    rest = 1.0
    for opinion in opinions:
        for follower, share in opinion.shares.items():
            if rest * share >= min_share:
                shares.setdefault(follower, rest * share)
        rest *= max(1.0 - sum(opinion.shares.values()), 0.0)
        if rest < min_share:
            break
    return opinions, sorted(shares.items(), key=_share, reverse=True)


def _share(pair: tuple[int, float]) -> float:
    return pair[1]
