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

from .drafter_state import DrafterState
from .modeling_dream import DreamDrafter


@dataclass(frozen=True)
class _Turn:
    state: DrafterState
    num_slots: int  # tokens in the target's cache, which the last token is not
    last_tokens: torch.Tensor  # (B, 1)


_turns: WeakKeyDictionary[Cache, _Turn] = WeakKeyDictionary()


def remember(cache: Cache, state: DrafterState, last_tokens: torch.Tensor) -> None:
    """Keep the state of a drafter that has read all tokens in `cache` and the `last_tokens` (B, 1) behind them."""
    _turns[cache] = _Turn(state, int(cache.get_seq_length()), last_tokens)


def recall(cache: Cache, drafter: DreamDrafter, num_slots: int, last_tokens: torch.Tensor) -> DrafterState | None:
    """The state of `drafter` if it was remembered for just this text: `num_slots` tokens and the `last_tokens` (B, 1)."""
    turn = _turns.pop(cache, None)
    if turn is None or turn.state.drafter is not drafter or turn.num_slots != num_slots:
        return None
    return turn.state if torch.equal(turn.last_tokens, last_tokens) else None
