"""What was gained and has yet to be read by a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..runtime.alignment import left_aligned


@dataclass
class PendingTokens:
    """Tokens that were gained and that the drafter has yet to read, step by step, with the features below them."""

    tokens: list[torch.Tensor] = field(default_factory=list)  # (B, T) each
    features: list[torch.Tensor] = field(default_factory=list)  # (B, T, H) each
    counts: list[Sequence[int]] = field(default_factory=list)  # of row b the first `counts[b]` matter

    def add(self, tokens: torch.Tensor, features: torch.Tensor, counts: Sequence[int]) -> None:
        """Keep what a step gained: the first `counts[b]` of `tokens` (B, T) and `features` (B, T, H) of row b."""
        self.tokens.append(tokens)
        self.features.append(features)
        self.counts.append(counts)

    def take(self) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """All of it, laid out as one step would be: tokens (B, T), features (B, T, H), counts; nothing is left."""
        tokens, features = torch.cat(self.tokens, dim=1), torch.cat(self.features, dim=1)
        counts = [sum(row) for row in zip(*self.counts, strict=True)]
        if len(self.tokens) > 1:
            matters = [torch.arange(part.shape[1]) for part in self.tokens]
            is_gained = torch.cat(
                [places < torch.tensor(row)[:, None] for places, row in zip(matters, self.counts, strict=True)], dim=1
            )
            order = left_aligned(is_gained)[0][:, : max(counts)]
            tokens = tokens.gather(1, order.to(tokens.device))
            wide = order.to(features.device)[..., None].expand(-1, -1, features.shape[-1])
            features = features.gather(1, wide)
        self.tokens, self.features, self.counts = [], [], []
        return tokens, features, counts

    def __bool__(self) -> bool:
        return bool(self.tokens)
