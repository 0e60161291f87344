"""How each kind of drafter goes along a text in training: what it reads of the target, and what it says step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

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


@dataclass(frozen=True)
class Way:
    """What training asks of a kind of drafter.

    Args:
        reads_placeholders (`bool`): Whether pictures are their placeholders' embeddings to it, and not merged ones.
        layers: Drafter -> layers whose features a batch holds side by side, as [`Needs`] names them; the last is -1.
        roll_out: As [`roll_out`].
        logits: Drafter and the target's head, of what may be drafted -> from what a step says to logits of the same tokens.
        start: Drafter and number of rows -> an empty state for a replay, which has `read`.
        levels: A state and what it drafts with -> the levels below what it has read.
        rows: A batch -> the same for a replay.
    """

    reads_placeholders: bool
    layers: Callable[[Any], tuple[int, ...]]
    roll_out: Callable[..., Iterator[RolloutStep]]
    logits: Callable[[Any, Logits], Logits]
    start: Callable[[Any, int], Any]
    levels: Callable[[Any, TargetHead], LevelSource]
    rows: Callable[[DrafterBatch], Rows]


def way_of(drafter: Any) -> Way:
    """How a drafter is trained.

    Raises:
        TypeError: It is of no kind that is.
    """
    if isinstance(drafter, DreamDrafter):
        return DREAM
    if isinstance(drafter, EagleDrafter):
        return PAIRS
    raise TypeError(
        f"`model` is a `{type(drafter).__name__}`; pass the drafter to train, for example `DreamDrafter.for_target(target)` "
        "or `EagleDrafter.for_target(target)`."
    )


def _columns(batch: DrafterBatch) -> Rows:
    text = batch.text
    return Rows(text.embeds, text.features, text.positions, batch.token_ids, batch.predicts, behind=1)


def _pairs(batch: DrafterBatch) -> Rows:
    text = batch.text
    read = text.features[:, :-1, : -text.embeds.shape[-1]]
    return Rows(
        text.embeds[:, 1:], read, text.positions[:, :-1], batch.token_ids[:, 1:], batch.predicts[:, 1:], behind=0
    )


def _read_and_last(drafter: EagleDrafter) -> tuple[int, ...]:
    """Of the last layer losses are made, whether it is read or not."""
    return (*drafter.needs.layers, -1)


def _logits_of_pairs(drafter: EagleDrafter, head: Logits) -> Logits:
    own: Any = drafter.lm_head or head
    return lambda states: own(drafter.for_head(states)).float()


DREAM = Way(False, lambda drafter: (-1,), roll_out, lambda drafter, head: head, DrafterState, DreamLevels, _columns)
PAIRS = Way(True, _read_and_last, roll_out_pairs, _logits_of_pairs, PairedState, PairedLevels, _pairs)  # EAGLE
