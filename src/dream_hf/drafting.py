"""Growing a draft tree with the drafter (paper, section 3.1; the dynamic tree of EAGLE-2, arXiv 2406.16858).

B rows, k beams per level, N drafted nodes, H width. The drafter's caches hold the verified tokens and features; while a
tree grows, its beams sit in the tentative slots behind them, and a beam sees of those only its own ancestors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from transformers.cache_utils import Cache

from .caches import Slots, slot_cache
from .configuration_dream import DreamConfig
from .lean import Angles, lean_drafter
from .modeling_dream import DraftMasks, DreamDrafter
from .threads import cpu_threads
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

    A row's features are one fewer than its tokens: the last token has not been through the target. Feature slot s holds
    what produced the token in slot s + 1, so whoever sees that token sees that feature, and one mask serves both.

    Args:
        drafter (`DreamDrafter`): The drafter; not changed.
        batch_size (`int`): Rows.
    """

    def __init__(self, drafter: DreamDrafter, batch_size: int):
        self.drafter = drafter
        self.lean = lean_drafter(drafter)
        self.tokens = Slots([0] * batch_size)
        self.features = Slots([0] * batch_size)
        blocks = drafter.config.block_types
        self.cache: Cache = slot_cache([self.features if block == "cross" else self.tokens for block in blocks])
        self.root_features: torch.Tensor | None = None  # (B, 1, H), the drafter's own for the last token
        self.root_positions: torch.Tensor | None = None  # (B, 1)
        self.level_angles: Angles | None = None  # of the levels below the last token

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
        num_tokens, num_missing = embeds.shape[1], embeds.shape[1] - features.shape[1]
        own = self.tokens.tensor(device)[:, None] + torch.arange(num_tokens, device=device)
        columns = torch.arange(self.tokens.longest + num_tokens, device=device)
        sees = columns <= own[..., None]
        with cpu_threads(self.drafter.config.draft_threads):
            hidden = self._forward(embeds.to(device, dtype), features.to(device, dtype), sees, positions)
        self.level_angles = None
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

    def beams(self, embeds: torch.Tensor, features: torch.Tensor, sees: torch.Tensor, level: int) -> torch.Tensor:
        """Run one level's beams, tentatively: embeds (B, k, H), their parents' features (B, k, H) -> features (B, k, H).

        `sees` (B, k, slots) tells which slots each beam sees: the verified ones, its ancestors' and its own.
        """
        assert self.root_positions is not None  # something has been read
        num_beams = embeds.shape[1]
        positions = (self.root_positions + level).expand(-1, num_beams)
        sees = sees[..., : self.tokens.end + num_beams]
        hidden = self._forward(embeds, features, sees, positions, self._angles_of(level, embeds))
        self.tokens.extend(num_beams)
        self.features.extend(num_beams)
        return hidden

    def forget_beams(self) -> None:
        """Take the tentative slots back."""
        self.tokens.rollback()
        self.features.rollback()

    def _forward(
        self,
        embeds: torch.Tensor,
        features: torch.Tensor,
        sees: torch.Tensor,
        positions: torch.Tensor,
        angles: Angles | None = None,
    ) -> torch.Tensor:
        masks = DraftMasks(sees, sees[..., 1:])
        if self.lean is not None and self.features.longest:  # else the first token sees no feature
            angles = angles or self.lean.angles(embeds, positions)
            return self.lean(embeds, features, masks, angles, self.cache)
        outputs = self.drafter(
            embeds, features, attention_mask=masks, position_ids=positions, past_key_values=self.cache
        )
        return outputs.last_hidden_state

    def _angles_of(self, level: int, like: torch.Tensor) -> Angles | None:
        """Rotary angles of a level, all beams of which have one position; computed for all levels together."""
        if self.lean is None or self.root_positions is None:
            return None
        if self.level_angles is None or level > self.level_angles[0].shape[2]:
            levels = torch.arange(1, max(level, self.drafter.config.tree_depth) + 1, device=like.device)
            self.level_angles = self.lean.angles(like, self.root_positions + levels)
        cos, sin = self.level_angles
        return cos[:, :, level - 1 : level], sin[:, :, level - 1 : level]


class _Sight:
    """Which slots the beams of a growing tree see: the verified ones, their ancestors' and their own."""

    def __init__(self, lengths: torch.Tensor, num_slots: int, top_k: int):  # lengths: (B,), slots with all levels
        self.top_k = top_k
        verified = torch.arange(num_slots, device=lengths.device) < lengths[:, None]
        self.sees = verified[:, None].expand(-1, top_k, -1)  # (B, k, slots)
        self.own = (lengths[:, None] + torch.arange(top_k, device=lengths.device))[
            ..., None
        ]  # (B, k, 1), next level's

    def descend(self, parents: torch.Tensor) -> torch.Tensor:
        """Go one level down: each beam sees what its parent (B, k) among the beams saw, and itself."""
        self.sees = self.sees.gather(1, parents[..., None].expand(-1, -1, self.sees.shape[-1]))
        self.sees.scatter_(2, self.own, True)
        self.own = self.own + self.top_k
        return self.sees


@dataclass
class _Candidates:
    """All expanded nodes so far, in order of levels: tokens, cumulative log-probabilities and parents, (B, n) per level."""

    tokens: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    parents: list[torch.Tensor] = field(default_factory=list)  # index among the candidates, -1 for the root
    num_above: int = 0  # candidates above the last level

    def add(self, tokens: torch.Tensor, scores: torch.Tensor, parents: torch.Tensor) -> None:
        """Add a level."""
        self.num_above += self.tokens[-1].shape[1] if self.tokens else 0
        self.tokens.append(tokens)
        self.scores.append(scores)
        self.parents.append(parents)


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
    with cpu_threads(config.draft_threads):
        found = _expand_levels(state, head, root_tokens.shape[0], config)
        return _best_tree(found, root_tokens.to(state.drafter.device), config)


def _expand_levels(state: DrafterState, head: TargetHead, batch: int, config: DreamConfig) -> _Candidates:
    """All nodes found on the way down, level by level."""
    top_k, device, dtype = config.tree_top_k, state.drafter.device, state.drafter.dtype
    found = _Candidates()
    assert state.root_features is not None  # something has been read
    hidden = state.root_features
    scores, tokens = _top_log_probs(head, hidden, top_k)  # (B, 1, k) each
    found.add(tokens.flatten(1), scores.flatten(1), torch.full((batch, top_k), -1, device=device))
    lengths = state.tokens.tensor(device)
    sight = _Sight(lengths, state.tokens.longest + config.tree_depth * top_k, top_k)

    for level in range(1, config.tree_depth):
        beam_scores, chosen = found.scores[-1].topk(top_k, dim=-1)  # (B, k)
        if config.tree_min_level_probability and _promise(beam_scores) < config.tree_min_level_probability:
            break
        parents = torch.zeros_like(chosen) if level == 1 else chosen // top_k
        features = hidden.gather(1, parents[..., None].expand(-1, -1, hidden.shape[-1]))
        embeds = head.embed(found.tokens[-1].gather(1, chosen)).to(device, dtype)
        hidden = state.beams(embeds, features, sight.descend(parents), level)
        scores, tokens = _top_log_probs(head, hidden, top_k)  # (B, k, k)
        scores = scores + beam_scores[..., None]
        found.add(tokens.flatten(1), scores.flatten(1), (found.num_above + chosen).repeat_interleave(top_k, dim=1))
    state.forget_beams()
    return found


def _best_tree(found: _Candidates, root_tokens: torch.Tensor, config: DreamConfig) -> DraftTree:
    """Keep the `tree_size` best candidates, in the order they were found, so that parents come first."""
    num_nodes, num_levels = config.tree_size, len(found.tokens)
    scores = torch.cat(found.scores, dim=1)
    scores = scores - _level_prices(tuple(level.shape[1] for level in found.scores), scores.device)
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


@lru_cache(maxsize=64)
def _level_prices(level_sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """`LEVEL_PRICE` times the level of every candidate, (C,)."""
    return torch.tensor([LEVEL_PRICE * level for level, size in enumerate(level_sizes) for _ in range(size)]).to(
        device
    )


def _promise(beam_scores: torch.Tensor) -> float:
    """Probability that the target reaches one of a row's beams, by the drafter's estimate, in the best row."""
    return float(beam_scores.exp().sum(-1).max())


def _top_log_probs(head: TargetHead, features: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, relative to what may be drafted, and tokens of the `top_k` likeliest successors.

    (B, n, H) -> (B, n, k) each.
    """
    scores, tokens = head.logits(features).to(features.device).log_softmax(-1).topk(top_k, dim=-1)
    return scores, tokens if head.token_ids is None else head.token_ids[tokens]
