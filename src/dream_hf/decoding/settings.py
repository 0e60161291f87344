"""How to draft: what belongs to a call of `generate()` and not to the shape of a drafter."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True)
class DraftSettings:
    """Settings of decoding, by the same names for every drafter.

    Args:
        tree_depth (`int`): Levels of the draft tree.
        tree_top_k (`int`): Beams per level and children per beam; 1 drafts a chain.
        tree_size (`int`): Drafted nodes verified per step, the root not counted.
        tree_min_level_probability (`float`): Stop growing a tree when the beams of a level, by the drafter's estimate, are
            reached with less than this probability together; 0 grows every tree to its full depth.
        tree_min_node_probability (`float`): Leave out nodes that, by the drafter's estimate, are reached with less than this
            probability; 0 verifies `tree_size` nodes whatever they promise.
        pause_below (`float`): Tokens per drafted step, bonus included, below which drafting pauses; 0 never pauses.
        compile (`bool`): Compile the forwards of decoding where that is possible.
        draft_threads (`int`, *optional*): CPU threads that draft; by default as many as PyTorch uses.

    Raises:
        ValueError: A value that drafts nothing or has no meaning; the message names it.
    """

    tree_depth: int = 6
    tree_top_k: int = 4
    tree_size: int = 32
    tree_min_level_probability: float = 0.0
    tree_min_node_probability: float = 0.0
    pause_below: float = 0.0
    compile: bool = False
    draft_threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("tree_depth", "tree_top_k", "tree_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` ({value!r}) must be an integer of at least 1.")
        for name in ("tree_min_level_probability", "tree_min_node_probability"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must lie in [0, 1).")
        if self.draft_threads is not None and self.draft_threads < 1:
            raise ValueError(
                f"`draft_threads` ({self.draft_threads}) must be at least 1, or None for PyTorch's number."
            )
        if not 0.0 <= self.pause_below < math.inf:
            raise ValueError(f"`pause_below` ({self.pause_below}) must be a number of tokens, 0 or above.")

    @classmethod
    def of(cls, holder: Any) -> DraftSettings:
        """The settings kept as attributes of `holder`, a drafter's config for instance."""
        return cls(**{name: getattr(holder, name) for name in cls.names()})

    @classmethod
    def names(cls) -> list[str]:
        """The names of all settings."""
        return [field.name for field in fields(cls)]

    def changed(self, **changes: Any) -> DraftSettings:
        """The same settings but for `changes`.

        Raises:
            ValueError: A name that is no setting, or a value that has no meaning.
        """
        for name in changes.keys() - set(self.names()):
            near = get_close_matches(name, self.names(), n=1)
            hint = f" Did you mean `{near[0]}`?" if near else f" Settings are {', '.join(self.names())}."
            raise ValueError(f"`{name}` is no setting of decoding.{hint}")
        return replace(self, **changes)
