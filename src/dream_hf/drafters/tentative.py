"""Levels of a tree whose nodes stand in the tentative slots of a model's cache: drafting with any model of transformers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..decoding.drafter import NodeForward
from ..runtime.phases import DRAFTER, phase
from .levels import SlotLevel, level_below, level_below_root, top_log_probs


@dataclass(frozen=True)
class Draftable:
    """What may be drafted.

    Args:
        num_tokens (`int`): Tokens that the drafter and the target have in common, the first ones.
        never (`tuple[int, ...]`): Tokens that never are: placeholders of pictures.
    """

    num_tokens: int
    never: tuple[int, ...] = ()

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) with those of other tokens left out or -inf."""
        logits = logits[..., : self.num_tokens]
        never = [token for token in self.never if token < logits.shape[-1]]
        if not never:
            return logits
        return logits.index_fill(-1, torch.tensor(never, device=logits.device), -torch.inf)


class TentativeLevels:
    """A [`LevelSource`]: every level is a forward over its beams, each of which sees its ancestors in the slots before.

    Args:
        forward (`NodeForward`): The model's forwards; its tentative slots are empty between two trees.
        draftable (`Draftable`): What may be drafted.
        read_root (`Callable`): Gives the logits (B, 1, V) after the last token of each row, whose forward it may make.
        device (`torch.device`): Where trees are grown; logits may lie elsewhere.
    """

    def __init__(
        self,
        forward: NodeForward,
        draftable: Draftable,
        read_root: Callable[[], torch.Tensor],
        device: torch.device,
    ):
        self.forward, self.draftable, self.read_root, self.device = forward, draftable, read_root, device
        self.depths: list[int] = []  # of the nodes in the tentative slots

    def first_level(self, num_levels: int, top_k: int) -> SlotLevel:
        """The likeliest tokens below the last one of each row."""
        with phase(DRAFTER):
            logits = self.draftable(self.read_root())
        num_before = self.forward.slots.tentative  # 1 where the root itself is a node, else 0
        self.depths = list(range(num_before))
        # Columns are nodes, so that all of them before the first beams are seen.
        lengths = torch.full(logits.shape[:1], num_before, device=self.device)
        scores, tokens = (part.to(self.device) for part in top_log_probs(logits, top_k))
        return level_below_root(scores, tokens, _no_features(scores), lengths, num_before + num_levels * top_k)

    def next_level(self, level: SlotLevel, places: list[int], depth: int, top_k: int) -> SlotLevel:
        """Run the best nodes of a level at `places`, tentatively, and find `top_k` children of each."""
        beams = level.beams(places)
        above = self.depths[-1] if self.depths else -1
        self.depths += [above + 1] * len(places)
        depths = torch.tensor(self.depths, device=self.device)
        with phase(DRAFTER):
            outputs = self.forward.draft(beams.tokens, depths, beams.sees[..., : len(self.depths)] == 0)
            logits = self.draftable(outputs.logits[:, -len(places) :])
        scores, tokens = (part.to(self.device) for part in top_log_probs(logits, top_k))
        return level_below(beams, scores, tokens, _no_features(scores))

    def forget_levels(self) -> None:
        """Empty the tentative slots."""
        self.forward.take_back()


def _no_features(like: torch.Tensor) -> torch.Tensor:
    """Features (B, n, 0) for `like` (B, n, ...): what a level needs is in the slots."""
    return like.new_zeros(*like.shape[:2], 0)
