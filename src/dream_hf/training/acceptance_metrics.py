"""The acceptance a drafter will have, found out on texts the target wrote, without calling `generate()`.

Along a greedy answer the target's choices are known: they are the answer. So decoding can be replayed with the drafter
alone, tree by tree, from features of one target forward. B rows, K tokens, N predictions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..decoding.acceptance import accept_greedy
from ..decoding.settings import DraftSettings
from ..drafters.growth import grow_tree
from ..drafters.levels import TargetHead
from .losses import MAX_LOGITS
from .target_features import DrafterBatch
from .ways import way_of


@dataclass
class AcceptanceCounts:
    """Sums over what has been seen so far, as they can be added up over batches and processes.

    Args:
        depth (`int`): Levels of the draft tree.
    """

    depth: int
    num_steps: int = 0
    num_gained: int = 0
    reached: list[int] = field(
        default_factory=list
    )  # by depth: trees that agree with the answer up to the depth above
    accepted: list[int] = field(default_factory=list)  # and those that agree at this depth too
    asked: list[int] = field(default_factory=list)  # by depth: drafts after the true prefix
    top_1: list[int] = field(default_factory=list)  # those whose likeliest token is the answer's
    top_k: list[int] = field(default_factory=list)  # those with the answer's token among the beams

    def __post_init__(self) -> None:
        for name in ("reached", "accepted", "asked", "top_1", "top_k"):
            setattr(self, name, getattr(self, name) or [0] * self.depth)

    def flat(self) -> list[int]:
        """All sums in a fixed order."""
        lists = (self.reached, self.accepted, self.asked, self.top_1, self.top_k)
        return [self.num_steps, self.num_gained, *(count for counts in lists for count in counts)]

    @classmethod
    def from_flat(cls, depth: int, counts: list[int]) -> AcceptanceCounts:
        """The inverse of `flat`."""
        lists = [counts[2 + index * depth : 2 + (index + 1) * depth] for index in range(5)]
        return cls(depth, counts[0], counts[1], *lists)

    def metrics(self) -> dict[str, float]:
        """Tau (bonus included; NaN where all answers are of one token) and rates by depth, those that were asked for.

        `accept_depth_d`: share of the trees right up to depth d - 1 that are right at depth d. `top_1_depth_d` and
        `top_k_depth_d`: the same of chains below every answer token, whose tokens above are the answer's.
        """
        found = {"tau": self.num_gained / self.num_steps if self.num_steps else math.nan}
        rates = (
            ("accept", self.accepted, self.reached),
            ("top_1", self.top_1, self.asked),
            ("top_k", self.top_k, self.asked),
        )
        for name, hits, tries in rates:
            for depth in range(self.depth):
                if tries[depth]:
                    found[f"{name}_depth_{depth + 1}"] = hits[depth] / tries[depth]
        return found


@torch.no_grad()
def replay_decoding(drafter: Any, head: TargetHead, batch: DrafterBatch, counts: AcceptanceCounts) -> list[list[int]]:
    """Decode every answer of a batch anew, greedily, the answer standing in for the target.

    Every step is drafted: pauses (`pause_below`) are about speed, not about the drafter.

    Args:
        drafter (`PreTrainedModel`): The drafter, with the tree of its config.
        head (`TargetHead`): Embedding and head that it drafts with.
        batch (`DrafterBatch`): Texts with the target's features.
        counts (`AcceptanceCounts`): Gets what was accepted.

    Returns:
        `list[list[int]]`: For each row the tokens gained by every verification, bonus included: `accepted_lengths` of
        `generate()` on the same prompt.
    """
    replay = _Replay(drafter, head, batch, counts)
    while replay.is_running:
        replay.step()
    return replay.gains


class _Replay:
    """Rows in lockstep, each at the column of its last token."""

    def __init__(self, drafter: Any, head: TargetHead, batch: DrafterBatch, counts: AcceptanceCounts):
        self.head, self.counts, self.device = head, counts, drafter.device
        self.way, self.settings = way_of(drafter), DraftSettings.of(drafter.config)
        rows = self.way.rows(batch)
        self.answers = [_answers(row) for row in rows.predicts.tolist()]
        self.gains: list[list[int]] = [[] for _ in self.answers]
        self.state = self.way.start(drafter, len(self.answers))
        self.at = [answers[0][0] if answers else 0 for answers in self.answers]
        self.features, self.behind = rows.features.to(self.device), rows.behind
        self.embeds, self.positions = rows.embeds.to(self.device), rows.positions.to(self.device)
        self.token_ids = rows.token_ids.to(self.device)
        if self.is_running:
            end = max(self.at) + 1
            self.state.read(
                self.embeds[:, :end],
                self.features[:, : end - self.behind],
                self.positions[:, :end],
                [at + 1 for at in self.at],
            )

    @property
    def is_running(self) -> bool:
        return any(self.answers)

    def step(self) -> None:
        """Draft a tree for each row, keep the path that agrees with its answer, go on behind it."""
        at = torch.tensor(self.at, device=self.device)[:, None]
        ends = torch.tensor([row[0][1] if row else 0 for row in self.answers], device=self.device)[:, None]
        levels, roots = self.way.levels(self.state, self.head), self.token_ids.gather(1, at)
        tree = grow_tree(levels, roots, self.settings, self.head.ends)
        following = at + tree.depths + 1
        choices = self.token_ids.gather(1, following.clamp(max=self.token_ids.shape[1] - 1))
        lengths = accept_greedy(tree, choices.masked_fill(following > ends, -1)).lengths.tolist()
        moves = [self._move(row, length) if self.answers[row] else 0 for row, length in enumerate(lengths)]
        if self.is_running:
            ahead = torch.arange(max(moves), device=self.device)
            last = self.token_ids.shape[1] - 1
            read = (at + 1 + ahead).clamp(max=last)
            below = (at + 1 - self.behind + ahead).clamp(max=last)
            self.state.read(
                _rows(self.embeds, read), _rows(self.features, below), self.positions.gather(1, read), moves
            )
        self.at = [column + move for column, move in zip(self.at, moves, strict=True)]

    def _move(self, row: int, length: int) -> int:
        """Note that a row was given `length` tokens; returns how many columns it goes on."""
        at, end = self.at[row], self.answers[row][0][1]
        gained = min(length, end - at)
        self.gains[row].append(gained)
        self.counts.num_steps += 1
        self.counts.num_gained += gained
        for depth in range(min(self.counts.depth, end - at, length)):
            self.counts.reached[depth] += 1
            self.counts.accepted[depth] += depth + 1 < length
        if at + gained == end:
            self.answers[row].pop(0)
            return self.answers[row][0][0] - at if self.answers[row] else 0
        return gained


@torch.no_grad()
def count_chain_hits(drafter: Any, head: TargetHead, batch: DrafterBatch, counts: AcceptanceCounts) -> None:
    """Draft a chain below every answer token, its tokens the answer's own, and see at every depth what it would draft.

    Args:
        drafter (`PreTrainedModel`): The drafter.
        head (`TargetHead`): Embedding and head that it drafts with.
        batch (`DrafterBatch`): Texts with the target's features.
        counts (`AcceptanceCounts`): Gets the hits.
    """
    # A prompt's last token drafts nothing in decoding: the answer's first token comes with the prefill.
    is_answer = torch.nn.functional.pad(batch.predicts[:, :-1], (1, 0), value=False)
    batch = DrafterBatch(batch.text, batch.token_ids, batch.predicts & is_answer, None)
    following = batch.token_ids.roll(-1, dims=1)[batch.predicts].to(drafter.device)
    top_k = drafter.config.tree_top_k
    for step in way_of(drafter).roll_out(
        drafter, batch, batch.text.features.to(drafter.device, drafter.dtype), counts.depth
    ):
        wanted = following[step.predictions]
        counts.asked[step.index] += len(wanted)
        size = max(1, MAX_LOGITS // drafter.config.vocab_size)
        for hidden, tokens in zip(step.hidden.split(size), wanted.split(size), strict=True):
            drafted = head.logits(hidden).to(tokens.device).topk(top_k, dim=-1).indices
            if head.token_ids is not None:
                drafted = head.token_ids[drafted]
            is_hit = drafted == tokens[:, None]
            counts.top_1[step.index] += int(is_hit[:, 0].sum())
            counts.top_k[step.index] += int(is_hit.any(-1).sum())


def _answers(predicts: list[bool]) -> list[tuple[int, int]]:
    """First and last column of every answer with a second token; the first token comes with the prefill."""
    answers, start = [], None
    for column, does in enumerate([*predicts, False]):
        if does and start is None:
            start = column
        if not does and start is not None:
            if column > start + 1:
                answers.append((start + 1, column))
            start = None
    return answers


def _rows(states: Tensor, at: Tensor) -> Tensor:
    return states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
