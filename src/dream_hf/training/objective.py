"""The drafter's loss over one batch (paper 3.2.1; rollout weights and acceptance losses beyond it).

N predictions of the batch, n reached by a step, H width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .losses import distribution_losses, normalize_features, smooth_l1, step_weights
from .rollout import RolloutStep, sample_starts
from .target_features import DrafterBatch
from .ways import DREAM, Way


@dataclass(frozen=True)
class Objective:
    """What is minimised; the fields are the arguments of that name in [`DreamTrainingArguments`]."""

    final_feature_loss_weight: float = 0.2
    mid_feature_loss_weight: float = 0.2
    kl_loss_weight: float = 1.0
    acceptance_loss: str = "none"
    acceptance_loss_weight: float = 1.0
    feature_normalization: str = "mid"
    rollout_steps: int = 1
    rollout_decay: float = 0.8
    rollout_share: float = 1.0
    way: Way = DREAM

    def weights(self) -> dict[str, float]:
        """Weight of each loss that counts, by the name it is logged under."""
        weights = {
            "kl": self.kl_loss_weight,
            "final": self.final_feature_loss_weight,
            "mid": self.mid_feature_loss_weight,
            self.acceptance_loss: self.acceptance_loss_weight,
        }
        return {name: weight for name, weight in weights.items() if weight and name != "none"}

    def __call__(
        self,
        drafter: nn.Module,
        batch: DrafterBatch,
        features: Tensor,
        head: Callable[[Tensor], Tensor],
        generator: torch.Generator | None = None,
        own_head: Callable[[Tensor], Tensor] | None = None,
    ) -> ObjectiveValue:
        """Run the drafter and sum up its losses.

        Args:
            drafter (`nn.Module`): The drafter, or whatever wraps it for training.
            batch (`DrafterBatch`): What it reads and where it predicts.
            features (`torch.Tensor` of shape `(B, K, H)`): The target's features as the drafter sees them.
            head (`Callable`): The target's LM head, (n, H) -> logits.
            generator (`torch.Generator`, *optional*): Chooses the chains that `rollout_share` leaves; without it all are
                followed.
            own_head (`Callable`, *optional*): Makes the drafter's logits, of the same tokens; by default `head` does.

        Returns:
            `ObjectiveValue`
        """
        clean = batch.text.features[batch.predicts][:, -batch.text.embeds.shape[-1] :].to(features.device)  # (N, H)
        total, parts, drafted = features.new_zeros((), dtype=torch.float32), {}, []
        step_weight = step_weights(self.rollout_steps, self.rollout_decay)
        starts = None
        if generator is not None and self.rollout_share < 1:
            starts = sample_starts(batch.predicts, self.rollout_share, generator)
            step_weight[1:] = [weight / self.rollout_share for weight in step_weight[1:]]
        for step in self.way.roll_out(drafter, batch, features, self.rollout_steps, starts):
            losses = self._losses(step, clean, batch.mid, head, own_head)
            for name, weight in self.weights().items():
                if name in losses:
                    summed = losses[name].sum()
                    total = total + step_weight[step.index] * weight * summed
                    suffix = f"_step_{step.index}" if step.index else ""
                    parts[f"loss_{name}{suffix}"] = (summed.detach(), len(losses[name]))
            drafted.append(step)
        return ObjectiveValue(total, parts, drafted[0])

    def _losses(
        self,
        step: RolloutStep,
        clean: Tensor,
        mid: Tensor | None,
        head: Callable[[Tensor], Tensor],
        own_head: Callable[[Tensor], Tensor] | None,
    ) -> dict[str, Tensor]:
        """Losses of the n positions of a step, by name."""
        weights, which = self.weights(), step.predictions
        losses: dict[str, Tensor] = {}
        if names := [name for name in ("kl", "tv", "nla") if name in weights]:
            losses |= distribution_losses(step.hidden, clean[which], head, names, own_head=own_head)
        if "final" in weights:
            losses["final"] = self._compare(step.hidden, clean[which], self.feature_normalization == "all")
        if "mid" in weights and mid is not None and step.mid is not None:
            losses["mid"] = self._compare(step.mid, mid[which], self.feature_normalization != "none")
        return losses

    @staticmethod
    def _compare(drafted: Tensor, features: Tensor, is_normalized: bool) -> Tensor:
        if is_normalized:
            drafted, features = normalize_features(drafted), normalize_features(features)
        return smooth_l1(drafted, features)


@dataclass(frozen=True)
class ObjectiveValue:
    """The weighted sum over predictions and steps, each loss's own sum and count, and the first step's output."""

    total: Tensor
    parts: dict[str, tuple[Tensor, int]]
    first: RolloutStep


def add_noise(features: Tensor, lengths: Tensor, width: float, generator: torch.Generator) -> Tensor:
    """Uniform noise of `width` * 512 / length on each row's features (published code): (B, K, H), (B,) -> (B, K, H)."""
    if not width:
        return features
    noise = torch.rand(features.shape, generator=generator, device=features.device, dtype=features.dtype) - 0.5
    return features + noise * (width * 512.0 / lengths.clamp(min=1)).to(features.dtype)[:, None, None]


def rms(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Root mean square of `values` (..., H) where `mask` (...) holds; NaN where it nowhere does."""
    squares = values.detach().float().square().mean(-1)
    if mask is None:
        return squares.mean().sqrt()
    return (squares.masked_fill(~mask, 0.0).sum() / mask.sum()).sqrt()
