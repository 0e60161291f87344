"""Training EAGLE on its own features (training-time test, arXiv 2503.01840, section 3.2).

A row pairs a token with the feature of the token before it, which is column 1 of a text onwards. Chains are those of
[`roll_out`]: a query at depth s sees the rows of the text up to its base, and its own chain. B rows, K tokens, H width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..drafters.visibility import FromStart, OwnChains
from .rollout import Chains, RolloutStep, StepCache, entries
from .target_features import DrafterBatch


def roll_out_pairs(
    drafter: nn.Module,
    batch: DrafterBatch,
    features: torch.Tensor,
    num_steps: int = 1,
    starts: torch.Tensor | None = None,
) -> Iterator[RolloutStep]:
    """Run `num_steps` steps of an EAGLE drafter over a batch.

    Args:
        drafter (`nn.Module`): The drafter, or whatever wraps it for training.
        batch (`DrafterBatch`): The text and where it predicts; a text's first token has no feature below it.
        features (`torch.Tensor` of shape `(B, K, layers * H)`): Features of the layers that it reads, noise included, and
            behind them the last ones, which it does not.
        num_steps (`int`): How many steps.
        starts (`torch.BoolTensor` of shape `(B, K)`, *optional*): As for [`roll_out`].

    Yields:
        `RolloutStep`
    """
    embeds = batch.text.embeds[:, 1:].to(features.dtype)
    positions, predicts = batch.text.positions[:, :-1], batch.predicts[:, 1:]
    read = features[:, :-1, : -embeds.shape[-1]]
    cache = StepCache() if num_steps > 1 else None
    states = drafter(embeds, read, FromStart(), positions, cache, is_fused=False).last_hidden_state
    numbers = torch.arange(int(predicts.sum()), device=predicts.device)
    yield RolloutStep(0, numbers, states[predicts])
    if num_steps == 1:
        return

    chains = Chains.below(predicts, predicts if starts is None else starts[:, 1:])
    states = entries(states, chains.bases)
    for step in range(1, num_steps):
        cache = cache.next_step()  # type: ignore[union-attr]
        is_reached, at = chains.at_depth(step)
        seen = OwnChains(chains.bases + 1, step)
        out = drafter(entries(embeds, at), states, seen, positions.gather(1, at), cache)
        states = out.last_hidden_state
        yield RolloutStep(step, chains.numbers[is_reached] + step, states[is_reached])
