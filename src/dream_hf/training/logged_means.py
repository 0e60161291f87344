"""What a `DreamTrainer` logs beside its loss: the single losses and the scales of what the drafter reads and writes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.utils import logging

from .objective import ObjectiveValue, rms
from .target_features import DrafterBatch

logger = logging.get_logger(__name__)


class LoggedMeans:
    """Sums and counts by name since the last log.

    Args:
        device (`torch.device`): Where they lie.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._has_shown_scales = False

    def add(self, value: ObjectiveValue, batch: DrafterBatch, is_visual: Tensor) -> None:
        """Add a batch whose tokens are visual at `is_visual` (B, K)."""
        for name, (total, count) in value.parts.items():
            self._add(name, total, torch.tensor(float(count), device=total.device))
        scales = _scales(value, batch, is_visual)
        if not self._has_shown_scales:
            self._has_shown_scales = True
            shown = ", ".join(f"{name} {scale.item():.3g}" for name, scale in scales.items() if torch.isfinite(scale))
            logger.info(f"Scales of the first batch: {shown}. Parts that differ much want normalisation.")
        for name, scale in scales.items():
            is_there = torch.isfinite(scale)
            self._add(name, torch.where(is_there, scale, 0.0), is_there.float())

    def take(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means by name, of all processes, whose sums `add_up` adds; from here on they start anew."""
        if not self._sums:
            return {}
        # Processes may have met different losses (a batch without pictures); the names are the same everywhere.
        pairs = torch.stack([torch.stack([total.float(), count]) for total, count in self._sums.values()])
        means = zip(self._sums, add_up(pairs).tolist(), strict=True)
        self._sums = {}
        return {name: total / count for name, (total, count) in means if count}

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + total.to(self.device), old_count + count.to(self.device))


def _scales(value: ObjectiveValue, batch: DrafterBatch, is_visual: Tensor) -> dict[str, Tensor]:
    """Root mean squares by name; NaN of what the batch has none of."""
    real = batch.mask
    scales = {
        "rms_text_embeds": rms(batch.text.embeds, real & ~is_visual),
        "rms_visual_embeds": rms(batch.text.embeds, real & is_visual),
        "rms_features": rms(batch.text.features, real),
        "rms_drafted_features": rms(value.first.hidden),
    }
    if value.first.mid is not None:
        scales["rms_drafted_mid_features"] = rms(value.first.mid)
    return scales if batch.mid is None else {**scales, "rms_mid_features": rms(batch.mid)}
