"""Drafting less deep, or not at all for a while, where it does not pay.

The rule looks at tokens gained and at nothing else, no clock above all: the same seed gives the same output. What is gained
in a pause piles up until drafting goes on; the drafter then reads it in one forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

WINDOW = 4  # drafted steps that are judged together
PROBE = 2  # drafted steps after a pause that decide about the next one
FIRST_PAUSE, LONGEST_PAUSE = 8, 64  # plain steps


class DraftSchedule:
    """Whether the next step is drafted, and how deep.

    A tree has no more levels than twice the tokens that the best of the last `WINDOW` drafted steps gained, from the first
    pause or the first `WINDOW` steps on: a drafter that is sure of itself and wrong costs little, and one that is right is
    soon trusted with deep trees again.

    Drafting pauses when the last `WINDOW` drafted steps gained too little on average. At the start, where nothing is known,
    `PROBE` drafted steps are enough to say so. A pause lasts `FIRST_PAUSE` steps; then `PROBE` drafted steps decide whether it
    goes on. Every time they gain too little the pause is twice as long as the one before, up to `LONGEST_PAUSE`; after `WINDOW`
    steps that gained enough, pauses start short again.

    Args:
        pause_below (`float`): Tokens per drafted step, bonus included, that are too few below this; 0 never drafts less.
    """

    def __init__(self, pause_below: float):
        self.pause_below = pause_below
        self.gains: deque[float] = deque(maxlen=WINDOW)  # of drafted steps since the last pause, the mean over rows
        self.best_gains: deque[int] = deque(maxlen=WINDOW)  # of drafted steps, the row that gained most
        self.num_plain = 0  # steps left in this pause
        self.next_pause = FIRST_PAUSE

    @property
    def is_paused(self) -> bool:
        """Whether the next step is a plain one."""
        return self.num_plain > 0

    @property
    def max_depth(self) -> int | None:
        """Most levels the next tree should have, or None without a limit."""
        has_paused = self.next_pause > FIRST_PAUSE
        if not self.pause_below or (len(self.best_gains) < WINDOW and not has_paused):
            return None
        return 2 * max(self.best_gains)

    def note(self, gained: Sequence[int]) -> None:
        """Take in the tokens that the rows that go on have gained in the step just made."""
        if self.num_plain:
            self.num_plain -= 1
            return
        self.gains.append(sum(gained) / len(gained))
        self.best_gains.append(max(gained))
        if len(self.gains) not in (PROBE, WINDOW):
            return
        if sum(self.gains) < self.pause_below * len(self.gains):
            self.num_plain = self.next_pause
            self.next_pause = min(2 * self.next_pause, LONGEST_PAUSE)
            self.gains.clear()
        elif len(self.gains) == WINDOW:
            self.next_pause = FIRST_PAUSE
