"""Conversations in the target's own words, as tensors: prompts of `families` with the answers the target gives to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from families import Family, Inputs, Target
from torch import Tensor, nn


@dataclass(frozen=True)
class Answered:
    """Right-padded conversations and where their answers are; `prompts` are the same rows, one by one."""

    inputs: Inputs
    answer_mask: Tensor
    prompts: list[Inputs]
    answers: list[Tensor]


def answer(
    family: Family, target: Target, lengths: list[int], images: int = 1, text_len: int = 12, seed: int = 0
) -> Answered:
    """Let `target` answer one prompt for each of `lengths`, greedily, with that many tokens."""
    prompts = family.make_rows(target, len(lengths), images if family.takes_images else 0, text_len, seed)
    rows, masks, answers = [], [], []
    for prompt, length in zip(prompts, lengths, strict=True):
        ids = target.generate(**prompt, max_new_tokens=length, do_sample=False)
        new = ids[:, prompt["input_ids"].shape[1] :]
        rows.append({**prompt, **{name: _extended(name, prompt, new) for name in text_names(family)}})
        masks.append(torch.arange(ids.shape[1]) >= prompt["input_ids"].shape[1])
        answers.append(new[0])
    longest = max(len(mask) for mask in masks)
    inputs = family.collate(rows)
    for name in text_names(family):  # the same rows, padded on the other side
        inputs[name] = torch.cat([nn.functional.pad(row[name], (0, longest - row[name].shape[1])) for row in rows])
    padded = [nn.functional.pad(mask, (0, longest - len(mask)), value=False) for mask in masks]
    return Answered(inputs, torch.stack(padded), prompts, answers)


def text_names(family: Family) -> list[str]:
    return ["input_ids", "attention_mask", *([family.token_types[0]] if family.token_types else [])]


def _extended(name: str, prompt: Inputs, new: Tensor) -> Tensor:
    added = {"input_ids": new, "attention_mask": torch.ones_like(new)}.get(name, torch.zeros_like(new))
    return torch.cat([prompt[name], added], dim=1)
