"""Training the drafter on its own features, step by step as it meets them in decoding (HASS, arXiv 2408.15766; EAGLE-3).

Step 0 is one causal pass over the text. In step s every base (a position that predicts an answer token) gets the query
that a chain drafted below it would have at depth s, its token known from the text: the query sees the verified tokens up to
the base and the target's features below it, and of everything drafted only its own chain. B rows, K tokens, M bases,
N predictions, H width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..drafters.visibility import DraftMasks, FromStart, OwnChains
from ..runtime.alignment import left_aligned
from .target_features import DrafterBatch

LayerStates = dict[int, tuple[torch.Tensor, torch.Tensor]]  # keys and values by layer


@dataclass(frozen=True)
class RolloutStep:
    """What the drafter says in one step, about the predictions that this step reaches.

    Args:
        index (`int`): The step, 0 for the pass on the target's features.
        predictions (`torch.LongTensor` of shape `(n,)`): Which of the N predictions these are.
        hidden (`torch.Tensor` of shape `(n, H)`): Final features.
        mid (`torch.Tensor` of shape `(n, H)`, *optional*): Intermediate features, of those that make any.
    """

    index: int
    predictions: torch.Tensor
    hidden: torch.Tensor
    mid: torch.Tensor | None = None


class StepCache:
    """Keys and values of one step behind those of the steps before it; gradients flow through both.

    Unlike a library cache it takes the same update twice, as gradient checkpointing repeats it.
    """

    def __init__(self, earlier: tuple[LayerStates, ...] = ()):
        self.earlier = earlier
        self.own: LayerStates = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Keep new keys and values and return all, (B, heads, slots, head_dim) each."""
        self.own[layer_idx] = keys, values
        steps = [step[layer_idx] for step in self.earlier] + [(keys, values)]
        return torch.cat([step[0] for step in steps], dim=2), torch.cat([step[1] for step in steps], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots before this step."""
        return sum(step[layer_idx][0].shape[2] for step in self.earlier)

    def next_step(self) -> StepCache:
        """The cache of the step that follows."""
        return StepCache((*self.earlier, self.own))


def roll_out(
    drafter: nn.Module,
    batch: DrafterBatch,
    features: torch.Tensor,
    num_steps: int = 1,
    starts: torch.Tensor | None = None,
) -> Iterator[RolloutStep]:
    """Run `num_steps` steps of the drafter over a batch.

    Args:
        drafter (`nn.Module`): The drafter, or whatever wraps it for training.
        batch (`DrafterBatch`): The text and where it predicts.
        features (`torch.Tensor` of shape `(B, K, H)`): The target's features as the drafter sees them, noise included.
        num_steps (`int`): How many steps.
        starts (`torch.BoolTensor` of shape `(B, K)`, *optional*): Below which of the positions that predict chains are
            followed; by default all of them.

    Yields:
        `RolloutStep`
    """
    text, predicts = batch.text, batch.predicts
    embeds = text.embeds.to(features.dtype)
    masks = DraftMasks(FromStart(), FromStart(behind=1))
    cache = StepCache() if num_steps > 1 else None
    out = drafter(embeds, features, attention_mask=masks, position_ids=text.positions, past_key_values=cache)
    numbers = torch.arange(int(predicts.sum()), device=predicts.device)
    hidden = out.last_hidden_state
    yield RolloutStep(0, numbers, hidden[predicts], out.mid_hidden_state[predicts])
    if num_steps == 1:
        return

    chains = Chains.below(predicts, predicts if starts is None else starts)
    hidden = entries(hidden, chains.bases)
    for step in range(1, num_steps):
        cache = cache.next_step()  # type: ignore[union-attr]
        is_reached, at = chains.at_depth(step)
        out = drafter(
            entries(embeds, at),
            hidden,
            attention_mask=chains.masks(step),
            position_ids=text.positions.gather(1, at),
            past_key_values=cache,
        )
        hidden = out.last_hidden_state
        yield RolloutStep(
            step, chains.numbers[is_reached] + step, hidden[is_reached], out.mid_hidden_state[is_reached]
        )


def sample_starts(predicts: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """A share of the positions `predicts` (B, K), evenly spaced in each row from a random one on: (B, K).

    Each position is as likely as any other, so a sum over those chosen, divided by `share`, estimates the sum over all.
    """
    offsets = torch.rand(len(predicts), 1, generator=generator, device=predicts.device)
    passed = predicts.cumsum(-1) * share + offsets  # each whole number that it passes chooses one
    return predicts & (passed.floor() > (passed - share).floor())


@dataclass(frozen=True)
class Chains:
    """Where chains start: `bases` (B, M) columns, `is_base` (B, M) and `numbers` (B, M) of their predictions."""

    predicts: torch.Tensor
    bases: torch.Tensor
    is_base: torch.Tensor
    numbers: torch.Tensor

    @classmethod
    def below(cls, predicts: torch.Tensor, starts: torch.Tensor) -> Chains:
        order, counts = left_aligned(starts)
        slots = torch.arange(max(int(counts.max()), 1), device=predicts.device)
        bases = order[:, : len(slots)]
        numbers = (predicts.flatten().cumsum(0) - 1).view_as(predicts)
        return cls(predicts, bases, slots < counts[:, None], numbers.gather(1, bases))

    def at_depth(self, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which chains still predict an answer token at `depth`, and their columns there, (B, M) each."""
        last = self.predicts.shape[1] - 1
        is_reached = self.is_base
        for ahead in range(1, depth + 1):
            at = self.bases + ahead
            is_reached = is_reached & (at <= last) & self.predicts.gather(1, at.clamp(max=last))
        return is_reached, (self.bases + depth).clamp(max=last)

    def masks(self, depth: int) -> DraftMasks:
        """Verified slots up to the base (features: below it), and one's own chain of those drafted."""
        return DraftMasks(OwnChains(self.bases + 1, depth), OwnChains(self.bases, depth))


def entries(states: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Entries `at` (B, M) of states (B, K, H)."""
    return states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
