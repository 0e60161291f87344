"""A drafter that knows what the target will write and errs on purpose, so that paths of every length are accepted.

Rows differ in where they err. A draft is right for `length - 1` tokens and then wrong, for the lengths in a `Plan`, so a
verification gains exactly `length` tokens; on every third position the right token is only the second best guess, so that
the accepted path is not always the likeliest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from family_configs import TEXT_IDS
from torch import Tensor
from transformers import PreTrainedModel

from dream_hf.drafters.dream.drafter import DreamDrafter
from dream_hf.drafters.dream.modeling import DreamDrafterOutput
from dream_hf.targets.target import Target

FITTING_STEPS = 60
DECOY_EVERY = 3  # positions; two decoys within a default depth of six keep both branches in a default tree


@dataclass(frozen=True)
class Plan:
    """What the oracle guesses after each position of the real tokens, (B, positions), and what each step will gain."""

    first: Tensor
    second: Tensor
    is_close: Tensor  # where the second guess comes near to the first
    gains: list[list[int]]  # per row


def make_plan(sequences: Tensor, attention_mask: Tensor, depth: int, seed: int = 0, decoys: bool = True) -> Plan:
    """Guess the tokens of `sequences` (B, P + N) after prompts with `attention_mask` (B, P), wrong now and then."""
    generator = torch.Generator().manual_seed(seed)
    first, second, close, gains = [], [], [], []
    for tokens, mask in zip(sequences, attention_mask, strict=True):
        num_real = int(mask.sum())
        real = tokens[len(mask) - num_real :]
        wrong = torch.randint(*TEXT_IDS, real.shape, generator=generator)
        guesses = torch.cat([real[1:], real[:1]])  # by the position of the token before
        wrong = torch.where(wrong == guesses, (wrong + 1) % TEXT_IDS[1], wrong)
        best, next_best, is_close = guesses.clone(), wrong.clone(), torch.zeros_like(guesses)
        position, row_gains = num_real, []  # the first generated token: the first root
        while position < len(real):
            if len(row_gains) % (depth + 1) == 0:
                lengths = torch.randperm(depth + 1, generator=generator) + 1
            length = int(lengths[len(row_gains) % (depth + 1)])
            for node in range(position, min(position + length - 1, len(real))):
                if decoys and node % DECOY_EVERY == 0:
                    best[node], next_best[node], is_close[node] = wrong[node], guesses[node], True
            if length <= depth:
                miss = position + length - 1
                if miss < len(real):
                    best[miss], next_best[miss] = wrong[miss], (wrong[miss] + 1) % TEXT_IDS[1]
                    if next_best[miss] == guesses[miss]:
                        next_best[miss] = (wrong[miss] + 2) % TEXT_IDS[1]
            row_gains.append(length)
            position += length
        first.append(best)
        second.append(next_best)
        close.append(is_close)
        gains.append(row_gains)
    return Plan(_padded(first), _padded(second), _padded(close).bool(), gains)


class NoisyOracle(DreamDrafter):
    """A drafter whose features make the target's head say what a plan says. Make one with [`make_oracle`]."""

    table: Tensor  # (B, positions, H)

    def forward(
        self, inputs_embeds: Tensor, target_features: Tensor, *, position_ids: Tensor | None = None, **kwargs: Any
    ) -> DreamDrafterOutput:
        """Features by position alone; the caches stay empty."""
        assert position_ids is not None
        positions = position_ids.clamp(max=self.table.shape[1] - 1)
        rows = torch.arange(self.table.shape[0])[:, None]
        return DreamDrafterOutput(self.table[rows, positions].to(inputs_embeds.dtype))


def make_oracle(target: PreTrainedModel, plan: Plan, **config: Any) -> NoisyOracle:
    """An oracle that drafts by `plan` for `target`."""
    drafter = NoisyOracle.for_target(target, **config)
    likelihoods = torch.zeros(*plan.first.shape, drafter.config.vocab_size)
    seconds = torch.where(plan.is_close, 0.45, 0.02)[..., None]
    likelihoods.scatter_(2, plan.second[..., None], seconds)
    likelihoods.scatter_(2, plan.first[..., None], 1 - seconds)
    drafter.table = fit_features(target, likelihoods)
    return drafter


def fit_features(target: PreTrainedModel, likelihoods: Tensor) -> Tensor:
    """Features (B, positions, H) whose logits come as near to `likelihoods` (B, positions, V) as the head allows."""
    view = Target(target)
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        outputs = target(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        view.learn_logit_rule(outputs.hidden_states[-1][:, -1], outputs.logits[:, -1])
    head = view.lm_head.weight.float().detach()
    features = (likelihoods @ head).requires_grad_()
    optimizer = torch.optim.Adam([features], lr=0.3)
    with torch.enable_grad():
        for _ in range(FITTING_STEPS):
            scores = view.logit_rule(features @ head.T).log_softmax(-1)
            loss = -(likelihoods * scores).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return features.detach()


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=TEXT_IDS[0])
