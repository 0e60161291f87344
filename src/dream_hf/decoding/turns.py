"""Drafters that go on where the last turn of a conversation left them.

A conversation continues by passing the target's cache to the next `generate()`. The target then runs over the new tokens
only, and has no features of the others to offer; the drafter's own caches still hold what it read. They are kept here
for as long as the target's cache lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache

from ..drafters.dream.drafter import DreamDrafter
from ..drafters.dream.state import DrafterState
from .draft_schedule import Unread


@dataclass(frozen=True)
class Turn:
    """Where a turn left a drafter.

    Args:
        state (`DrafterState`): What it has read.
        unread (`Unread`): What it has yet to read of the turn's last steps; there may be no next turn.
        num_slots (`int`): Tokens in the target's cache, which the last token is not.
        last_tokens (`torch.LongTensor` of shape `(B, 1)`): The last token of each row.
    """

    state: DrafterState
    unread: Unread
    num_slots: int
    last_tokens: torch.Tensor


_turns: WeakKeyDictionary[Cache, Turn] = WeakKeyDictionary()


def remember(cache: Cache, state: DrafterState, unread: Unread, last_tokens: torch.Tensor) -> None:
    """Keep where a drafter is that knows, once it has read `unread`, all tokens in `cache` and the `last_tokens` (B, 1)."""
    _turns[cache] = Turn(state, unread, int(cache.get_seq_length()), last_tokens)


def recall(cache: Cache, drafter: DreamDrafter, num_slots: int, last_tokens: torch.Tensor) -> Turn | None:
    """The turn of `drafter` if it was remembered for just this text: `num_slots` tokens and the `last_tokens` (B, 1)."""
    turn = _turns.pop(cache, None)
    if turn is None or turn.state.drafter is not drafter or turn.num_slots != num_slots:
        return None
    if not torch.equal(turn.last_tokens, last_tokens):
        return None
    turn.state.leave_inference_mode()
    return turn
