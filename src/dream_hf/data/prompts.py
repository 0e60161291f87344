"""Conversations that wait for an answer -> inputs of `generate()`, written and tokenised as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .chat import Messages, Tools
from .reader import ChatReader


class PromptEncoder:
    """
    Write prompts the way the target reads them.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): The target's own, with its chat template.

    Raises:
        ValueError: There is no chat template, or no padding token.
    """

    def __init__(self, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
        self.reader = ChatReader(processor)
        self.tokenizer = self.reader.tokenizer

    def text(self, messages: Messages, tools: Tools = None) -> str:
        """`messages`, parsed (see [`~dream_hf.data.conversations.parse_row`]), as text that an answer follows."""
        return self.reader.text(messages, tools, add_generation_prompt=True)

    def encode(
        self, conversations: Sequence[tuple[Messages, Sequence[Any]]], tools: Sequence[Tools] | None = None
    ) -> BatchFeature:
        """Prompts and their pictures as one batch, padded on the left. Raises what the processor raises.

        Args:
            conversations (`Sequence[tuple]`): Of each its parsed messages and its pictures.
            tools (`Sequence`, *optional*): Of each what its template is told of.
        """
        told = tools or [None] * len(conversations)
        texts = [self.text(messages, each) for (messages, _), each in zip(conversations, told, strict=True)]
        images = [pictures for _, pictures in conversations]
        return self.reader.process(texts, images, padding_side="left", return_tensors="pt")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, special tokens left out."""
        text: Any = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text.strip()


def on_model(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """`inputs` on the device of `model`, floating-point tensors in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }
