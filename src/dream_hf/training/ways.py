"""How each kind of drafter goes along a text in training: what it reads of the target, and what it says step by step.

B rows, K tokens, H width of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..drafters.dream.drafter import DreamDrafter
from ..drafters.dream.state import DrafterState, DreamLevels
from ..drafters.eagle.drafter import EagleDrafter
from ..drafters.growth import LevelSource
from ..drafters.levels import TargetHead
from ..drafters.paired_state import PairedLevels, PairedState
from .paired_rollout import roll_out_pairs
from .rollout import RolloutStep, roll_out
from .target_features import DrafterBatch

Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """A batch as a drafter reads it while decoding is replayed.

    Args:
        embeds, features, positions, token_ids, predicts: Of each column, as in [`DrafterBatch`].
        behind (`int`): How many columns the feature that is read with a token lies before it.
    """

    embeds: torch.Tensor
    features: torch.Tensor
    positions: torch.Tensor
    token_ids: torch.Tensor
    predicts: torch.Tensor
    behind: int


class Way(Protocol):
    """What training asks of a kind of drafter."""

    reads_placeholders: bool  # whether pictures are their placeholders' embeddings to it, and not merged ones

    def layers(self, drafter: Any) -> tuple[int, ...]:
        """Layers whose features a batch holds side by side, as [`Needs`] names them; the last is -1."""

    def roll_out(
        self,
        drafter: nn.Module,
        batch: DrafterBatch,
        features: torch.Tensor,
        num_steps: int = 1,
        starts: torch.Tensor | None = None,
    ) -> Iterator[RolloutStep]:
        """As [`roll_out`]."""

    def logits(self, drafter: Any, head: Logits) -> Logits:
        """From what a step says to logits of what may be drafted; `head` is the target's, of these tokens."""

    def start(self, drafter: Any, num_rows: int) -> Any:
        """An empty state for a replay, which has `read`."""

    def levels(self, state: Any, head: TargetHead) -> LevelSource:
        """The levels below what a state has read."""

    def rows(self, batch: DrafterBatch) -> Rows:
        """The batch for a replay."""


class DreamWay:
    """DREAM: a token attends to the features below it."""

    reads_placeholders = False

    def layers(self, drafter: DreamDrafter) -> tuple[int, ...]:
        return (-1,)

    def roll_out(
        self,
        drafter: nn.Module,
        batch: DrafterBatch,
        features: torch.Tensor,
        num_steps: int = 1,
        starts: torch.Tensor | None = None,
    ) -> Iterator[RolloutStep]:
        return roll_out(drafter, batch, features, num_steps, starts)

    def logits(self, drafter: DreamDrafter, head: Logits) -> Logits:
        return head

    def start(self, drafter: DreamDrafter, num_rows: int) -> DrafterState:
        return DrafterState(drafter, num_rows)

    def levels(self, state: DrafterState, head: TargetHead) -> LevelSource:
        return DreamLevels(state, head)

    def rows(self, batch: DrafterBatch) -> Rows:
        text = batch.text
        return Rows(text.embeds, text.features, text.positions, batch.token_ids, batch.predicts, behind=1)


class PairedWay:
    """EAGLE: a row is a feature and the token chosen from it."""

    reads_placeholders = True

    def layers(self, drafter: EagleDrafter) -> tuple[int, ...]:
        return (*drafter.needs.layers, -1)  # of the last one losses are made, whether it is read or not

    def roll_out(
        self,
        drafter: nn.Module,
        batch: DrafterBatch,
        features: torch.Tensor,
        num_steps: int = 1,
        starts: torch.Tensor | None = None,
    ) -> Iterator[RolloutStep]:
        return roll_out_pairs(drafter, batch, features, num_steps, starts)

    def logits(self, drafter: EagleDrafter, head: Logits) -> Logits:
        own: Any = drafter.lm_head or head
        return lambda states: own(drafter.for_head(states)).float()

    def start(self, drafter: EagleDrafter, num_rows: int) -> PairedState:
        return PairedState(drafter, num_rows)

    def levels(self, state: PairedState, head: TargetHead) -> LevelSource:
        return PairedLevels(state, head)

    def rows(self, batch: DrafterBatch) -> Rows:
        text = batch.text
        read = text.features[:, :-1, : -text.embeds.shape[-1]]
        return Rows(
            text.embeds[:, 1:], read, text.positions[:, :-1], batch.token_ids[:, 1:], batch.predicts[:, 1:], behind=0
        )


def way_of(drafter: Any) -> Way:
    """How a drafter is trained.

    Raises:
        TypeError: It is of no kind that is.
    """
    if isinstance(drafter, DreamDrafter):
        return DreamWay()
    if isinstance(drafter, EagleDrafter):
        return PairedWay()
    raise TypeError(
        f"`model` is a `{type(drafter).__name__}`; pass the drafter to train, for example `DreamDrafter.for_target(target)` "
        "or `EagleDrafter.for_target(target)`."
    )
