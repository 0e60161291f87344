"""One level of a draft tree as functions of tensors: who the beams are, what they see, what comes below them.

B rows, k beams, H width. A mask's column c stands for token slot c and for feature slot c - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .visibility import bias_of


@dataclass(frozen=True)
class TargetHead:
    """The two ends of the target a drafter borrows: `embed` (ids (...) -> (..., H)) and `logits` ((..., H) -> (..., V)).

    With `token_ids` (R,), a reduced draft vocabulary on the drafter's device, `logits` are those of these tokens, (..., R).
    Below the tokens `ends`, which end a text, nothing need be drafted.
    """

    embed: Callable[[torch.Tensor], torch.Tensor]
    logits: Callable[[torch.Tensor], torch.Tensor]
    token_ids: torch.Tensor | None = None
    ends: frozenset[int] = frozenset()


class Beams(NamedTuple):
    """The m nodes of a level that are expanded, at most k, in each of B rows."""

    tokens: torch.Tensor  # (B, m)
    scores: torch.Tensor  # (B, m), cumulative log-probabilities
    features: torch.Tensor  # (B, m, H), their parents'
    sees: torch.Tensor  # (B, m, columns), 0 at the verified tokens, their ancestors and themselves, else -inf
    own: torch.Tensor  # (B, k, 1), the token slots for k beams, the first m of which these are written to


class SlotLevel(NamedTuple):
    """All expanded nodes of a level, n of them in each row, and the k best of them, which may be expanded in turn.

    The level of a drafter that keeps beams in the tentative slots of its caches and reads their parents' features.
    """

    tokens: torch.Tensor  # (B, n)
    scores: torch.Tensor  # (B, n)
    best: torch.Tensor  # (B, k), places of the best nodes among all, best first
    best_tokens: torch.Tensor  # (B, k)
    best_scores: torch.Tensor  # (B, k)
    features: torch.Tensor  # (B, k, H), of the parents of the best nodes
    seen: torch.Tensor  # (B, k, columns), 0 at what these parents see, else -inf
    own: torch.Tensor  # (B, k, 1), the token slots for k beams

    def beams(self, places: list[int]) -> Beams:
        """Some of the best nodes as beams: each sees what its parent saw, and itself."""
        chosen = index_of(places)
        sees = self.seen[:, chosen].scatter(2, self.own[:, : len(places)], 0.0)
        tokens, scores = self.best_tokens[:, chosen], self.best_scores[:, chosen]
        return Beams(tokens, scores, self.features[:, chosen], sees, self.own)

    def all_beams(self, places: list[int]) -> Beams:
        """All of the best nodes as beams; those at other places than these will have children of no probability."""
        beams, num_beams = self.beams(list(range(self.best.shape[1]))), self.best.shape[1]
        if len(places) == num_beams:
            return beams
        is_promising = torch.tensor([place in places for place in range(num_beams)], device=beams.scores.device)
        return beams._replace(scores=beams.scores.masked_fill(~is_promising, -math.inf))


def index_of(places: list[int]) -> slice | list[int]:
    """Rising places as an index: the first few as a slice, which copies nothing."""
    return slice(len(places)) if places[-1] == len(places) - 1 else places


def first_level(
    head: TargetHead, root_features: torch.Tensor, lengths: torch.Tensor, num_columns: int, top_k: int
) -> SlotLevel:
    """The likeliest tokens below the root, from its features (B, 1, H), in rows of `lengths` (B,) verified tokens."""
    return level_below_root(*likeliest_of(head, root_features, top_k), root_features, lengths, num_columns)


def level_below_root(
    scores: torch.Tensor, tokens: torch.Tensor, root_features: torch.Tensor, lengths: torch.Tensor, num_columns: int
) -> SlotLevel:
    """The level of the root's likeliest successors, (B, 1, k) each; features are (B, 1, H), of any H."""
    top_k = tokens.shape[-1]
    verified = torch.arange(num_columns, device=lengths.device) < lengths[:, None]
    own = (lengths[:, None] + torch.arange(top_k, device=lengths.device))[..., None]
    tokens, scores = tokens[:, 0], scores[:, 0]  # which are all there are
    best = torch.arange(top_k, device=tokens.device).expand_as(tokens)
    seen = bias_of(verified, root_features.dtype)[:, None].repeat(1, top_k, 1)
    return SlotLevel(tokens, scores, best, tokens, scores, root_features.repeat(1, top_k, 1), seen, own)


def next_level(head: TargetHead, beams: Beams, hidden: torch.Tensor, top_k: int) -> SlotLevel:
    """The children of `beams`, whose features are `hidden` (B, m, H), `top_k` of each."""
    return level_below(beams, *likeliest_of(head, hidden, top_k), hidden)


def level_below(beams: Beams, scores: torch.Tensor, tokens: torch.Tensor, hidden: torch.Tensor) -> SlotLevel:
    """The level of the likeliest successors of `beams`, (B, m, top_k) each; features are `hidden` (B, m, H), of any H."""
    top_k = tokens.shape[-1]
    tokens, scores = tokens.flatten(1), (scores + beams.scores[..., None]).flatten(1)
    own = beams.own + hidden.shape[1]
    if hidden.shape[1] == 1:  # its children are all there are
        best = torch.arange(top_k, device=tokens.device).expand_as(tokens)
        features, seen = hidden.expand(-1, top_k, -1), beams.sees.expand(-1, top_k, -1)
        return SlotLevel(tokens, scores, best, tokens, scores, features, seen, own)
    best_scores, best = scores.topk(top_k, dim=-1)
    parents = (best // top_k)[..., None]
    features = hidden.gather(1, parents.expand(-1, -1, hidden.shape[-1]))
    seen = beams.sees.gather(1, parents.expand(-1, -1, beams.sees.shape[-1]))
    return SlotLevel(tokens, scores, best, tokens.gather(1, best), best_scores, features, seen, own)


def top_log_probs(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and tokens of the `top_k` likeliest successors, (B, n, V) -> (B, n, k) each."""
    dtype = torch.promote_types(logits.dtype, torch.float32)  # sums of so many have no digits to lose
    scores, tokens = logits.log_softmax(-1, dtype=dtype).topk(top_k, dim=-1)
    return scores, tokens


def likeliest_of(head: TargetHead, features: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from features (B, n, H), as token ids, relative to what may be drafted; on the features' device."""
    scores, tokens = (part.to(features.device) for part in top_log_probs(head.logits(features), top_k))
    return scores, tokens if head.token_ids is None else head.token_ids[tokens]
