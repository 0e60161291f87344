"""What was gained and has yet to be read by a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..runtime.alignment import left_aligned
from ..runtime.counts import Counts


@dataclass
class PendingTokens:
    """Tokens that were gained and that the drafter has yet to read, step by step, with the features below them, of any H."""

    tokens: list[torch.Tensor] = field(default_factory=list)  # (B, T) each
    features: list[torch.Tensor] = field(default_factory=list)  # (B, T, H) each
    counts: list[Counts] = field(default_factory=list)  # of row b the first `counts[b]` matter

    def add(self, tokens: torch.Tensor, features: torch.Tensor, counts: Sequence[int]) -> None:
        """Keep what a step gained: the first `counts[b]` of `tokens` (B, T) and `features` (B, T, H) of row b."""
        self.tokens.append(tokens)
        self.features.append(features)
        self.counts.append(Counts.of(counts))

    def take(self) -> tuple[torch.Tensor, torch.Tensor, Counts]:
        """All of it, laid out as one step would be: tokens (B, T), features (B, T, H), counts; nothing is left."""
        steps = list(zip(self.tokens, self.features, self.counts, strict=True))
        self.tokens, self.features, self.counts = [], [], []
        if len(steps) == 1:
            return steps[0]
        tokens, features = (torch.cat(parts, dim=1) for parts in list(zip(*steps, strict=True))[:2])
        cpu = torch.device("cpu")
        is_gained = torch.cat(
            [torch.arange(part.shape[1], device=cpu) < row.on(cpu)[:, None] for part, _, row in steps], dim=1
        )
        counts = Counts([sum(row) for row in zip(*(counts for *_, counts in steps), strict=True)])
        order = left_aligned(is_gained)[0][:, : max(counts)]
        tokens = tokens.gather(1, order.to(tokens.device))
        wide = order.to(features.device)[..., None].expand(-1, -1, features.shape[-1])
        return tokens, features.gather(1, wide), counts

    def __bool__(self) -> bool:
        return bool(self.tokens)
