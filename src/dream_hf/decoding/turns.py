"""Sessions that go on where the last turn of a conversation left them.

A conversation continues by passing the target's cache to the next `generate()`. The target then runs over the new tokens
only, and has no features of the others to offer; a drafter's session still holds what it read. It is kept here for as long as
the target's cache lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache

from .drafter import Drafter, DraftSession


@dataclass(frozen=True)
class Turn:
    """Where a turn left a drafter.

    Args:
        drafter (`Drafter`): Whose session it is.
        session (`DraftSession`): What it has read, or has taken note of.
        num_slots (`int`): Tokens in the target's cache, which the last token is not.
        last_tokens (`torch.LongTensor` of shape `(B, 1)`): The last token of each row.
    """

    drafter: Drafter
    session: DraftSession
    num_slots: int
    last_tokens: torch.Tensor


_turns: WeakKeyDictionary[Cache, Turn] = WeakKeyDictionary()


def remember(cache: Cache, drafter: Drafter, session: DraftSession, last_tokens: torch.Tensor) -> None:
    """Keep the session of a drafter that knows all tokens in `cache` and the `last_tokens` (B, 1), if it can go on."""
    suspended = session.suspend()
    if suspended is not None:
        _turns[cache] = Turn(drafter.plain, suspended, int(cache.get_seq_length()), last_tokens)


def recall(cache: Cache, drafter: Drafter, num_slots: int, last_tokens: torch.Tensor) -> DraftSession | None:
    """The session of `drafter` if it was remembered for just this text: `num_slots` tokens and the `last_tokens` (B, 1)."""
    turn = _turns.pop(cache, None)
    if turn is None or turn.drafter is not drafter.plain or turn.num_slots != num_slots:
        return None
    return turn.session if torch.equal(turn.last_tokens, last_tokens) else None
