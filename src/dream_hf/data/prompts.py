"""Conversations that wait for an answer -> inputs of `generate()`, written and tokenised as in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .chat import Messages, Tools, find_chat_format, tokenizer_of
from .images import as_processed
from .placeholders import check_placeholders


class PromptEncoder:
    """
    Write prompts the way the target reads them.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): The target's own, with its chat template.

    Raises:
        ValueError: There is no chat template, or no padding token.
    """

    def __init__(self, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
        self.processor = processor
        self.tokenizer = tokenizer_of(processor)
        self.chat_format = find_chat_format(processor)
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"The tokenizer of `processor` ({type(self.tokenizer).__name__}) has no padding token, which batches "
                "need. Set `tokenizer.pad_token`, for instance to its `eos_token`."
            )

    def text(self, messages: Messages, tools: Tools = None) -> str:
        """`messages`, parsed (see [`~dream_hf.data.conversations.parse_row`]), as text that an answer follows."""
        check_placeholders(messages, self.processor)
        return self.chat_format.render(messages, tools, add_generation_prompt=True)

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
        images = [[as_processed(picture, self.processor) for picture in pictures] for _, pictures in conversations]
        bos = self.tokenizer.bos_token
        options: dict[str, Any] = {
            # A template that writes the first token itself must not get a second one.
            "add_special_tokens": bos is None or not texts[0].startswith(bos),
            "padding": True,
            "padding_side": "left",
            "return_tensors": "pt",
        }
        if self.tokenizer is not self.processor:
            return self.processor(text=texts, images=images if any(images) else None, **options)
        if any(images):
            raise ValueError("The prompt has pictures and `processor` is a tokenizer; pass the target's processor.")
        return self.processor(texts, **options)

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
