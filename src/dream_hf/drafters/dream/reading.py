"""How much of a prompt's visual tokens a drafter reads (paper, section 3.3): it belongs to reading, not to drafting."""

from __future__ import annotations

from dataclasses import dataclass

VISUAL_IMPORTANCE = ("attention", "novelty", "uniform", "pool")


@dataclass(frozen=True)
class Reading:
    """Which visual tokens of a prompt are read.

    Args:
        visual_keep_ratio (`float`): Share of the visual tokens that is kept; 0 for none.
        visual_importance (`str`): Which ones are kept, as [`DreamConfig`] says.

    Raises:
        ValueError: A value that has no meaning; the message names it.
    """

    visual_keep_ratio: float
    visual_importance: str

    def __post_init__(self) -> None:
        if not 0.0 <= self.visual_keep_ratio <= 1.0:
            raise ValueError(f"`visual_keep_ratio` ({self.visual_keep_ratio}) must lie in [0, 1].")
        if self.visual_importance not in VISUAL_IMPORTANCE:
            raise ValueError(
                f"`visual_importance` ({self.visual_importance!r}) must be one of {list(VISUAL_IMPORTANCE)}."
            )

    @property
    def needs_attention(self) -> bool:
        """Whether visual tokens are left out by the attention they receive."""
        return 0.0 < self.visual_keep_ratio < 1.0 and self.visual_importance == "attention"
