"""What sessions of drafters that read features have in common: they read when the next tree is wanted, and not before."""

from __future__ import annotations

from typing import Any

import torch

from ..decoding.drafter import DraftSession, Verified
from ..decoding.settings import DraftSettings
from ..decoding.tree import DraftTree
from ..runtime.counts import Counts
from .growth import LevelSource, grow_tree
from .levels import TargetHead
from .pending import PendingTokens


class LazySession(DraftSession):
    """Reads lazily: what steps have gained piles up, and is read in one forward before the next tree.

    Whoever derives from it sets what stands here, and makes the levels.
    """

    drafter: Any
    settings: DraftSettings
    head: TargetHead
    state: Any  # has `read_on(embeds, features, counts)`
    pending: PendingTokens

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        roots = root_tokens.to(self.drafter.device)
        return grow_tree(self.levels(), roots, self.settings, self.head.ends, max_depth)

    def levels(self) -> LevelSource:
        """The levels below the last tokens; what was gained is read first."""
        raise NotImplementedError

    def read(self, verified: Verified) -> None:
        assert verified.features is not None  # such drafters need them
        self.pending.add(verified.tokens, verified.features, verified.counts)

    def suspend(self) -> LazySession:
        return self

    def _catch_up(self) -> None:
        """Read what was gained since the last draft."""
        if self.pending:
            self._read_on(*self.pending.take())

    def _read_on(self, tokens: torch.Tensor, features: torch.Tensor, counts: Counts) -> None:
        """Read the first `counts[b]` of tokens (B, T), and the features (B, T, feature_size) that they were chosen from."""
        self.state.read_on(self.head.embed(tokens), features, counts)
