"""Which sublayers to leave out: a seeded search for the set without which the target says the same (SWIFT, section 3.3)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..private_files import write_private


@dataclass
class SkipSearch:
    """The best set so far, and what to try next: other random sets, and neighbours of the best.

    Args:
        names (`Sequence[str]`): The sublayers that there are.
        ratio (`float`): Share of them to leave out.
        seed (`int`): Of the search.
        max_tries (`int`): Sets to try, the first included.
        good_enough (`float`): Share of the tokens said right that ends the search.
    """

    names: Sequence[str]
    ratio: float = 0.45
    seed: int = 0
    max_tries: int = 200
    good_enough: float = 0.98
    best: frozenset[str] = frozenset()
    best_match: float = -1.0  # not tried yet
    num_tries: int = 0
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        if not self.best:
            self.best = self._every_other()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to try."""
        return self.num_tries >= self.max_tries or self.best_match >= self.good_enough

    def candidate(self) -> frozenset[str]:
        """A set to try: the present one first, then by turns a random one and one that differs from the best in a few."""
        if self.best_match < 0:
            return self.best
        if self.num_tries % 2:
            return frozenset(self.random.sample(list(self.names), len(self.best)))
        inside = [name for name in self.names if name in self.best]
        outside = [name for name in self.names if name not in self.best]
        num_changed = min(self.random.randint(1, 3), len(inside), len(outside))
        gone, come = self.random.sample(inside, num_changed), self.random.sample(outside, num_changed)
        return self.best - frozenset(gone) | frozenset(come)

    def note(self, candidate: frozenset[str], match: float) -> bool:
        """Take note of the share of tokens that the target says right without `candidate`; whether that is the best."""
        self.num_tries += 1
        is_better = match > self.best_match
        if is_better:
            self.best, self.best_match = candidate, match
        return is_better

    def settle(self, names: frozenset[str], match: float = 1.0) -> None:
        """Be content with this set."""
        self.best, self.best_match, self.max_tries = names, match, 0

    def _every_other(self) -> frozenset[str]:
        """As many as `ratio` says, spread evenly; those of the first and the last layer last of all."""
        first, last = (name.split(".")[0] for name in (self.names[0], self.names[-1]))
        inner = [name for name in self.names if name.split(".")[0] not in (first, last)] or list(self.names)
        num_skipped = min(round(self.ratio * len(self.names)), len(inner))
        return frozenset(inner[index * len(inner) // num_skipped] for index in range(num_skipped))


def read_skip(path: Path, names: Iterable[str], identity: dict[str, Any]) -> tuple[frozenset[str], float]:
    """The set of sublayers in a file that [`write_skip`] wrote, and its share of tokens.

    Raises:
        ValueError: The file is none of these, or of another target.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        skip, match, found = frozenset(content["skip"]), float(content["match"]), content["target"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`path` ({str(path)!r}) holds no set of sublayers: {error}. Name another file.") from error
    if found != identity or not skip <= set(names):
        raise ValueError(f"`path` ({str(path)!r}) was written for the target {found}, and this one is {identity}.")
    return skip, match


def write_skip(path: Path, skip: frozenset[str], match: float, identity: dict[str, Any]) -> None:
    """Write the file that [`read_skip`] reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, [json.dumps({"target": identity, "match": match, "skip": sorted(skip)}, indent=1)])
