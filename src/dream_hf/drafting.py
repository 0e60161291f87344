"""Growing a draft tree with the drafter (paper, section 3.1; the dynamic tree of EAGLE-2, arXiv 2406.16858).

B rows, k beams per level, N drafted nodes, H width. The drafter's caches hold the verified tokens and features; while a
tree grows, its beams sit in the tentative slots behind them, and a beam sees of those only its own ancestors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache

from .caches import Slots, slot_cache
from .configuration_dream import DreamConfig
from .modeling_dream import DraftMasks, DreamDrafter
from .tree import DraftTree

# Scores of a child and its parent can tie when the child is certain. A small price per level makes parents win, so that
# a node is never kept without its parent.
LEVEL_PRICE = 1e-3


@dataclass(frozen=True)
class TargetHead:
    """The two ends of the target a drafter borrows: `embed` (ids (...) -> (..., H)) and `logits` ((..., H) -> (..., V)).

    With `token_ids` (R,), a reduced draft vocabulary on the drafter's device, `logits` are those of these tokens, (..., R).
    """

    embed: Callable[[torch.Tensor], torch.Tensor]
    logits: Callable[[torch.Tensor], torch.Tensor]
    token_ids: torch.Tensor | None = None


class DrafterState:
    """A drafter in mid-decoding: its caches, and where each row stands.

    Args:
        drafter (`DreamDrafter`): The drafter; not changed.
        batch_size (`int`): Rows.
    """

    def __init__(self, drafter: DreamDrafter, batch_size: int):
        self.drafter = drafter
        self.tokens = Slots([0] * batch_size)
        self.features = Slots([0] * batch_size)
        blocks = drafter.config.block_types
        self.cache: Cache = slot_cache([self.features if block == "cross" else self.tokens for block in blocks])
        self.root_features: torch.Tensor | None = None  # (B, 1, H), the drafter's own for the last token
        self.root_positions: torch.Tensor | None = None  # (B, 1)

    def read(
        self,
        embeds: torch.Tensor,  # (B, T, H)
        features: torch.Tensor,  # (B, S, H), S = T, or T - 1 at the start
        positions: torch.Tensor,  # (B, T)
        counts: Sequence[int],
    ) -> None:
        """Take in verified text: the first `counts[b]` tokens of row b, of which the last has no feature yet."""
        device, dtype = self.drafter.device, self.drafter.dtype
        positions = positions.to(device)
        num_missing = embeds.shape[1] - features.shape[1]
        token_starts = self.tokens.tensor(device)
        query_slots = token_starts[:, None] + torch.arange(embeds.shape[1], device=device)
        hidden = self._forward(
            embeds.to(device, dtype),
            features.to(device, dtype),
            DraftMasks(
                _visible_slots(query_slots, 0, self.tokens.longest + embeds.shape[1]),
                _visible_slots(query_slots, -1, self.features.longest + features.shape[1]),
            ),
            positions,
        )
        self.tokens.commit(counts)
        self.features.commit([max(count - num_missing, 0) for count in counts])
        last = torch.tensor([max(count - 1, 0) for count in counts], device=device)[:, None]
        self.root_features = hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1]))
        self.root_positions = positions.gather(1, last)

    def read_on(self, embeds: torch.Tensor, features: torch.Tensor, counts: Sequence[int]) -> None:
        """Take in what came right after the last token: embeds and features (B, T, H), `counts[b]` tokens of row b."""
        assert self.root_positions is not None  # something has been read
        steps = torch.arange(1, embeds.shape[1] + 1, device=self.drafter.device)
        self.read(embeds, features, self.root_positions + steps, counts)

    def beams(
        self,
        embeds: torch.Tensor,
        features: torch.Tensor,
        seen_tokens: torch.Tensor,
        seen_features: torch.Tensor,
        level: int,
    ) -> torch.Tensor:
        """Run one level's beams, tentatively: embeds (B, k, H), their parents' level's features, who sees whom."""
        tokens, banked = self.tokens, self.features
        masks = DraftMasks(
            _verified_and(tokens.tensor(embeds.device), tokens.end + embeds.shape[1], seen_tokens),
            _verified_and(banked.tensor(embeds.device), banked.end + features.shape[1], seen_features),
            every_token_sees_features=True,  # the root's, at least
        )
        assert self.root_positions is not None  # something has been read
        positions = (self.root_positions + level).expand(-1, embeds.shape[1])
        hidden = self._forward(embeds, features, masks, positions)
        tokens.extend(embeds.shape[1])
        banked.extend(features.shape[1])
        return hidden

    def forget_beams(self) -> None:
        """Take the tentative slots back."""
        self.tokens.rollback()
        self.features.rollback()

    def _forward(self, embeds, features, masks, positions) -> torch.Tensor:
        outputs = self.drafter(
            embeds, features, attention_mask=masks, position_ids=positions, past_key_values=self.cache
        )
        return outputs.last_hidden_state


@dataclass
class _Candidates:
    """All expanded nodes so far, in order of levels: tokens, scores (cumulative log-probability) and parents, (B, C) each."""

    tokens: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    parents: list[torch.Tensor] = field(default_factory=list)  # index among the candidates, -1 for the root

    def add(self, tokens: torch.Tensor, scores: torch.Tensor, parents: torch.Tensor) -> int:
        """Add a level; returns the index of its first candidate."""
        first = sum(level.shape[1] for level in self.tokens)
        self.tokens.append(tokens)
        self.scores.append(scores)
        self.parents.append(parents)
        return first


def grow_tree(state: DrafterState, head: TargetHead, root_tokens: torch.Tensor, config: DreamConfig) -> DraftTree:
    """Draft a tree below each row's last token.

    At every level the `tree_top_k` beams of highest cumulative probability are each expanded by their `tree_top_k`
    likeliest tokens; of all expanded nodes the `tree_size` best are kept, and a kept node's parent always is.

    Args:
        state (`DrafterState`): A state that has read all verified text; its tentative slots are empty again on return.
        head (`TargetHead`): The target's embedding and head.
        root_tokens (`torch.LongTensor` of shape `(B, 1)`): The last token of each row.
        config (`DreamConfig`): `tree_depth`, `tree_top_k` and `tree_size`.

    Returns:
        `DraftTree`: `min(tree_size, number of expanded nodes)` nodes and the root, on the state's device.
    """
    top_k, batch = config.tree_top_k, root_tokens.shape[0]
    device = state.drafter.device
    found = _Candidates()
    assert state.root_features is not None  # something has been read
    features = state.root_features
    scores, tokens = _top_log_probs(head, features, top_k)  # (B, 1, k) each
    beam_scores, beam_tokens = scores.flatten(1), tokens.flatten(1)
    beam_candidates = torch.arange(top_k, device=device).expand(batch, -1)
    found.add(beam_tokens, beam_scores, torch.full_like(beam_tokens, -1))
    above = torch.zeros(batch, top_k, 0, dtype=torch.bool, device=device)  # which earlier beams are a beam's ancestors
    itself = torch.eye(top_k, dtype=torch.bool, device=device).expand(batch, -1, -1)
    root = torch.ones(batch, top_k, 1, dtype=torch.bool, device=device)

    for level in range(1, config.tree_depth):
        if config.tree_min_level_probability and _promise(beam_scores) < config.tree_min_level_probability:
            break
        embeds = head.embed(beam_tokens).to(device, state.drafter.dtype)
        upwards = torch.cat([above, itself], dim=-1)
        features = state.beams(embeds, features, upwards, torch.cat([root, above], dim=-1), level)
        child_scores, child_tokens = _top_log_probs(head, features, top_k)  # (B, k, k)
        child_scores = (child_scores + beam_scores[..., None]).flatten(1)
        child_tokens = child_tokens.flatten(1)
        first = found.add(child_tokens, child_scores, beam_candidates.repeat_interleave(top_k, dim=1))

        beam_scores, chosen = child_scores.topk(top_k, dim=-1)
        beam_tokens = child_tokens.gather(1, chosen)
        beam_candidates = first + chosen
        parent_beams = (chosen // top_k)[..., None].expand(-1, -1, upwards.shape[-1])
        above = upwards.gather(1, parent_beams)
    state.forget_beams()
    return _best_tree(found, root_tokens.to(device), config)


def _best_tree(found: _Candidates, root_tokens: torch.Tensor, config: DreamConfig) -> DraftTree:
    """Keep the `tree_size` best candidates, in the order they were found, so that parents come first."""
    num_nodes, num_levels = config.tree_size, len(found.tokens)
    prices = [LEVEL_PRICE * level for level, scores in enumerate(found.scores) for _ in range(scores.shape[1])]
    scores = torch.cat(found.scores, dim=1)
    scores = scores - torch.tensor(prices, device=scores.device)
    best = scores.topk(min(num_nodes, scores.shape[1]), dim=-1)
    if config.tree_min_node_probability:
        is_likely = best.values >= math.log(config.tree_min_node_probability)
        num_nodes = max(int(is_likely.sum(-1).max()), 1)
    chosen = best.indices[:, :num_nodes].sort(dim=-1).values
    tokens = torch.cat(found.tokens, dim=1).gather(1, chosen)
    parents = torch.cat(found.parents, dim=1).gather(1, chosen)

    # Node index of every candidate: 0 for the root, kept at the end so that parent -1 finds it.
    nodes = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.long, device=scores.device)
    nodes.scatter_(1, chosen, torch.arange(1, chosen.shape[1] + 1, device=scores.device).expand_as(chosen))
    parents = nodes.gather(1, parents % nodes.shape[1])
    return DraftTree.from_parents(
        torch.cat([root_tokens, tokens], dim=1),
        torch.cat([torch.zeros_like(root_tokens), parents], dim=1),
        num_levels,
    )


def _promise(beam_scores: torch.Tensor) -> float:
    """Probability that the target reaches one of a row's beams, by the drafter's estimate, in the best row."""
    return float(beam_scores.exp().sum(-1).max())


def _top_log_probs(head: TargetHead, features: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, relative to what may be drafted, and tokens of the `top_k` likeliest successors.

    (B, n, H) -> (B, n, k) each.
    """
    logits = head.logits(features).to(features.device)
    scores, tokens = logits.topk(top_k, dim=-1)
    if head.token_ids is not None:
        tokens = head.token_ids[tokens]
    return scores - logits.logsumexp(-1, keepdim=True), tokens


def _visible_slots(query_slots: torch.Tensor, offset: int, num_slots: int) -> torch.Tensor:
    """Slots up to each query's own plus `offset`: (B, T) -> (B, T, num_slots)."""
    return torch.arange(num_slots, device=query_slots.device) <= query_slots[..., None] + offset


def _verified_and(lengths: torch.Tensor, num_slots: int, seen: torch.Tensor) -> torch.Tensor:
    """Each row's verified slots, and of the tentative ones behind them those `seen` (B, T, n): (B, T, num_slots)."""
    behind = torch.arange(num_slots, device=lengths.device) - lengths[:, None]  # (B, num_slots)
    num_tentative = seen.shape[-1]
    picked = behind.clamp(0, num_tentative - 1)[:, None].expand(-1, seen.shape[1], -1)
    return (behind < 0)[:, None] | ((behind < num_tentative)[:, None] & seen.gather(2, picked))
