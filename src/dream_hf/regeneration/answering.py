"""Batches of prompts -> answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..data.prompts import PromptEncoder, on_model
from ..decoding.drafter import Drafter
from ..targets.target import end_ids


@dataclass(frozen=True)
class Answer:
    """One answer: its text, and whether the target ended it itself."""

    text: str
    is_finished: bool


@dataclass(frozen=True)
class Answerer:
    """Answers batches of prompts; arguments as in [`~dream_hf.regeneration.regenerate.regenerate`]."""

    target: Any
    encoder: PromptEncoder
    drafter: Drafter | None
    max_new_tokens: int
    temperature: float

    def answer(self, prompts: Mapping[str, Any], seed: int) -> list[Answer]:
        """One answer for each of a batch of encoded prompts."""
        inputs = on_model(prompts, self.target)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            # transformers samples from 50 tokens only unless told otherwise
            top_k = self.target.generation_config.top_k or 0
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": top_k}
            torch.manual_seed(seed)
        output = self.target.generate(
            **inputs, **sampling, max_new_tokens=self.max_new_tokens, assistant_model=self.drafter
        )
        return [self._read(tokens) for tokens in output[:, inputs["input_ids"].shape[1] :].tolist()]

    def _read(self, tokens: list[int]) -> Answer:
        ends = end_ids(self.target.generation_config)
        length = next((place for place, token in enumerate(tokens) if token in ends), None)
        return Answer(self.encoder.decode(tokens[:length]), length is not None)
