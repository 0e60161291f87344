"""A DFlash drafter at work in one `generate()`: the context that it has read, and a lattice of what may follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ...decoding.drafter import Prefill, Verified
from ...decoding.settings import DraftSettings
from ...decoding.tree import DraftTree
from ...runtime.alignment import left_aligned
from ...runtime.counts import Counts
from ...runtime.kv_cache import leave_inference_mode, slot_cache
from ...runtime.phases import DRAFTER, GROWTH, phase
from ...runtime.slots import Slots
from ...runtime.threads import cpu_threads
from ...targets.target import LogitRule
from ..lattice import tree_of_lattice
from ..lazy_session import LazySession
from ..levels import TargetHead, likeliest_of
from ..pending import PendingTokens


class ContextState:
    """The context of a DFlash drafter: keys and values of what it has read, one slot for each token of a row.

    Args:
        drafter (`DFlashModel`): The drafter; not changed.
        batch_size (`int`): Rows of the batch.
    """

    def __init__(self, drafter: Any, batch_size: int):
        self.drafter = drafter
        self.slots = Slots([0] * batch_size)
        self.cache = slot_cache([self.slots] * len(drafter.layers))

    def read(self, features: torch.Tensor, counts: Sequence[int]) -> None:
        """Take in features (B, T, feature_size) right behind the last ones, the first `counts[b]` of row b."""
        drafter = self.drafter
        context = drafter.context(features.to(drafter.device, drafter.dtype))
        steps = torch.arange(context.shape[1], device=context.device)
        drafter.remember(context, self.slots.tensor(context.device)[:, None] + steps, self.cache)
        self.slots.commit(Counts.of(counts))

    def block(self, embeds: torch.Tensor) -> torch.Tensor:
        """What comes out of a block behind the context, embeddings (B, T, H) -> (B, T, H). Nothing of it is kept."""
        return self.drafter(embeds, self.cache, self.slots.tensor(embeds.device))


class LatticeLevel(NamedTuple):
    """One depth of a lattice below some nodes, as whoever asks for levels knows them; see `growth.Level`."""

    tokens: torch.Tensor  # (B, n)
    scores: torch.Tensor  # (B, n)
    best: torch.Tensor  # (B, k)
    best_tokens: torch.Tensor  # (B, k)
    best_scores: torch.Tensor  # (B, k)


@dataclass(frozen=True)
class LatticeLevels:
    """A lattice, asked level by level: what a depth says does not hang on what comes before it.

    Args:
        head (`TargetHead`): Embedding and head, the drafter's own or the target's.
        states (`torch.Tensor` of shape `(B, D, H)`): What drafts each depth.
    """

    head: TargetHead
    states: torch.Tensor

    def first_level(self, num_levels: int, top_k: int) -> LatticeLevel:
        """The likeliest tokens of the first depth."""
        return self._level(0, self.states.new_zeros(len(self.states), 1), top_k)

    def next_level(self, level: LatticeLevel, places: list[int], depth: int, top_k: int) -> LatticeLevel:
        """Those of the depth below, behind each of the best nodes of a level at `places`."""
        return self._level(depth, level.best_scores[:, places], top_k)

    def forget_levels(self) -> None:
        """Nothing was written."""

    def _level(self, depth: int, above: torch.Tensor, top_k: int) -> LatticeLevel:
        if depth < self.states.shape[1]:
            scores, tokens = likeliest_of(self.head, self.states[:, depth : depth + 1], top_k)
        else:  # nothing is said of what lies behind the block
            scores, tokens = likeliest_of(self.head, self.states[:, :1], top_k)
            scores = torch.full_like(scores, -math.inf)
        scores = (above[..., None] + scores).flatten(1)
        tokens = tokens.expand(-1, above.shape[1], -1).flatten(1)
        best_scores, best = scores.topk(top_k, dim=-1)
        return LatticeLevel(tokens, scores, best, tokens.gather(1, best), best_scores)


class DFlashSession(LazySession):
    """Reads lazily, see [`LazySession`]; one forward of a block drafts a whole tree.

    Args:
        drafter (`DFlashDrafter`): The drafter; not changed.
        prefill (`Prefill`): What the target has read, with features.
        settings (`DraftSettings`): How to draft.
    """

    def __init__(self, drafter: Any, prefill: Prefill, settings: DraftSettings):
        self.drafter, self.settings = drafter, settings
        self.head = head_for(drafter, prefill)
        self.roots = prefill.first_tokens.to(drafter.device)  # (B, 1), the last token of each row
        earlier = prefill.earlier
        if isinstance(earlier, DFlashSession) and earlier.drafter is drafter:
            self.state, self.pending = earlier.state, earlier.pending
            leave_inference_mode(self.state.cache)
            self._catch_up()
        else:
            self.state, self.pending = ContextState(drafter, len(self.roots)), PendingTokens()
        self._read_prompt(prefill)

    def _read_prompt(self, prefill: Prefill) -> None:
        """Read a prompt's features; what padding has, be it NaN, is not kept: it would lie behind shorter rows."""
        assert prefill.features is not None  # the drafter needs them
        num_new, device = prefill.features.shape[1], prefill.features.device
        real = prefill.real[:, -num_new:].to(device)
        order, counts = left_aligned(real)
        features = prefill.features.masked_fill(~real[..., None], 0.0)
        features = features.gather(1, order[..., None].expand(-1, -1, features.shape[-1]))
        with phase(DRAFTER):
            self.state.read(features, counts.tolist())

    def read(self, verified: Verified) -> None:
        super().read(verified)
        tokens, counts = verified.tokens.to(self.roots.device), Counts.of(verified.counts)
        last = tokens.gather(1, counts.less(1).on(tokens.device)[:, None])
        self.roots = torch.where(counts.on(tokens.device)[:, None] > 0, last, self.roots)

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        self.roots, settings = root_tokens.to(self.drafter.device), self.settings
        depth = min(settings.tree_depth, self.drafter.config.num_drafted, *([] if max_depth is None else [max_depth]))
        if depth < 1:
            return DraftTree.chain(self.roots)
        with cpu_threads(settings.draft_threads):
            with phase(DRAFTER):
                log_probs, tokens = likeliest_of(self.head, self.levels().states[:, :depth], settings.tree_top_k)
            with phase(GROWTH):
                return tree_of_lattice(self.roots, tokens, log_probs, settings, self.head.ends)

    def levels(self) -> LatticeLevels:
        """What the block behind the last tokens says; what was gained is read first."""
        self._catch_up()
        drafter = self.drafter
        config = drafter.config
        masks = self.roots.new_full((len(self.roots), config.block_size - 1), config.mask_token_id)
        embeds = self.head.embed(torch.cat([self.roots, masks], dim=1)).to(drafter.device, drafter.dtype)
        states = self.state.block(embeds)
        return LatticeLevels(self.head, states[:, config.block_size - config.num_drafted :])

    def _read_on(self, tokens: torch.Tensor, features: torch.Tensor, counts: Counts) -> None:
        self.state.read(features, counts)


def head_for(drafter: Any, prefill: Prefill) -> TargetHead:
    """The drafter's own table and head, or the target's, with rows as they stand there and logits as the drafter has them."""
    assert prefill.features is not None  # the drafter needs them
    table = drafter.embed_tokens or prefill.target.embedding
    rule = LogitRule(drafter.config.logit_scale, drafter.config.logit_softcap)
    head, like = (prefill.target.lm_head, prefill.features) if drafter.lm_head is None else (drafter.lm_head, None)
    return TargetHead(
        embed=partial(_embed, table, drafter.config.embedding_scale),
        logits=partial(_logits, drafter, head, rule, like),
        token_ids=drafter.draft_token_ids,
        ends=prefill.end_ids,
    )


def _embed(table: Any, scale: float, token_ids: torch.Tensor) -> torch.Tensor:
    """Rows of a table, whatever the target makes of them, times `scale`."""
    return scale * nn.functional.embedding(token_ids.to(table.weight.device), table.weight)


def _logits(drafter: Any, head: Any, rule: LogitRule, like: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) of states (..., H); a head that is not the drafter's reads them in the dtype and place of `like`."""
    states = drafter.for_head(states)
    logits = head(states if like is None else states.to(like.device, like.dtype))
    return rule(logits.to(torch.promote_types(logits.dtype, torch.float32)))
