"""One level of a draft tree as functions of tensors: who the beams are, what they see, what comes below them.

B rows, k beams, H width. A mask's column c stands for token slot c and for feature slot c - 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache

from .lean import Angles, LeanDrafter
from .modeling_dream import DraftMasks


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
    """The n nodes of a level that are expanded, at most k, in each of B rows."""

    tokens: torch.Tensor  # (B, n)
    scores: torch.Tensor  # (B, n), cumulative log-probabilities
    features: torch.Tensor  # (B, n, H), their parents'
    sees: torch.Tensor  # (B, n, columns), the verified tokens, their ancestors and themselves
    own: torch.Tensor  # (B, k, 1), the token slots for k beams, the first n of which these are written to

    def at(self, places: list[int]) -> Beams:
        """Some of them, closed up."""
        num_beams = len(places)
        if num_beams == self.tokens.shape[1]:
            return self
        if places[-1] == num_beams - 1:  # the first: views
            tokens, scores, features, sees = (part[:, :num_beams] for part in self[:-1])
            return Beams(tokens, scores, features, sees, self.own)
        old, new = self.own[:, places], self.own[:, :num_beams]
        sees = self.sees[:, places].scatter_(2, old, False).scatter_(2, new, True)
        return Beams(self.tokens[:, places], self.scores[:, places], self.features[:, places], sees, self.own)


class Level(NamedTuple):
    """All expanded nodes of a level, n of them in each row, and the best of them."""

    tokens: torch.Tensor  # (B, n)
    scores: torch.Tensor  # (B, n)
    chosen: torch.Tensor  # (B, k), which of them are the beams
    beams: Beams

    def only(self, places: list[int]) -> Level:
        """The level with some of its beams."""
        if len(places) == self.chosen.shape[1]:
            return self
        is_first = places[-1] == len(places) - 1
        chosen = self.chosen[:, : len(places)] if is_first else self.chosen[:, places]
        return self._replace(chosen=chosen, beams=self.beams.at(places))


def first_level(
    head: TargetHead, root_features: torch.Tensor, lengths: torch.Tensor, num_columns: int, top_k: int
) -> Level:
    """The likeliest tokens below the root, from its features (B, 1, H), in rows of `lengths` (B,) verified tokens."""
    scores, tokens = _top_log_probs(head, root_features, top_k)  # (B, 1, k) each
    verified = torch.arange(num_columns, device=lengths.device) < lengths[:, None]
    own = (lengths[:, None] + torch.arange(top_k, device=lengths.device))[..., None]
    return _choose(tokens, scores, root_features, verified[:, None], own)


def next_level(head: TargetHead, beams: Beams, hidden: torch.Tensor, top_k: int) -> Level:
    """The children of `beams`, whose features are `hidden` (B, k, H), `top_k` of each."""
    scores, tokens = _top_log_probs(head, hidden, top_k)  # (B, k, top_k) each
    return _choose(tokens, scores + beams.scores[..., None], hidden, beams.sees, beams.own + beams.tokens.shape[1])


def _choose(
    tokens: torch.Tensor,  # (B, parents, k)
    scores: torch.Tensor,  # (B, parents, k)
    hidden: torch.Tensor,  # (B, parents, H)
    sees: torch.Tensor,  # (B, parents, columns)
    own: torch.Tensor,  # (B, k, 1)
) -> Level:
    """The k best of the nodes become the next beams: each sees what its parent saw, and itself."""
    num_parents, top_k = tokens.shape[1:]
    tokens, scores = tokens.flatten(1), scores.flatten(1)
    if num_parents == 1:  # its children are all there is, the likeliest first
        chosen = torch.arange(top_k, device=tokens.device).expand_as(tokens)
        features, sees = hidden.expand(-1, top_k, -1), sees.expand(-1, top_k, -1).scatter(2, own, True)
        return Level(tokens, scores, chosen, Beams(tokens, scores, features, sees, own))
    beam_scores, chosen = scores.topk(top_k, dim=-1)
    parents = (chosen // top_k)[..., None]
    features = hidden.gather(1, parents.expand(-1, -1, hidden.shape[-1]))
    sees = sees.gather(1, parents.expand(-1, -1, sees.shape[-1])).scatter_(2, own, True)
    return Level(tokens, scores, chosen, Beams(tokens.gather(1, chosen), beam_scores, features, sees, own))


def lean_level(
    lean: LeanDrafter,
    cache: Cache,
    head: TargetHead,
    beams: Beams,
    angles: Angles,
    top_k: int,
) -> Level:
    """A whole level as one function of tensors, to be compiled: the beams go in, their children and the next beams come out."""
    embeds = head.embed(beams.tokens).to(beams.features.device, beams.features.dtype)
    masks = DraftMasks(beams.sees, beams.sees[..., 1:])
    return next_level(head, beams, lean(embeds, beams.features, masks, angles, cache), top_k)


def let_beams_vary(beams: Beams) -> None:
    """Let code compiled for these beams serve any other number of them (but one, which is another graph) and of columns."""
    for part in beams[:-1]:
        torch._dynamo.maybe_mark_dynamic(part, 1)
    torch._dynamo.maybe_mark_dynamic(beams.sees, 2)


def _top_log_probs(head: TargetHead, features: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, relative to what may be drafted, and tokens of the `top_k` likeliest successors.

    (B, n, H) -> (B, n, k) each.
    """
    scores, tokens = head.logits(features).to(features.device).log_softmax(-1).topk(top_k, dim=-1)
    return scores, tokens if head.token_ids is None else head.token_ids[tokens]
