"""What training rows and prompts have in common: how a target's text is written, and what its processor is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .chat import Messages, Tools, find_chat_format, tokenizer_of
from .images import as_processed
from .placeholders import check_placeholders


class ChatReader:
    """
    Writes and tokenises conversations the way the target reads them.

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
                f"The target's tokenizer ({type(self.tokenizer).__name__}) has no padding token, which batches need. Set "
                "`tokenizer.pad_token`, for instance to its `eos_token`."
            )

    def text(self, messages: Messages, tools: Tools = None, add_generation_prompt: bool = False) -> str:
        """`messages`, parsed (see [`~dream_hf.data.conversations.parse_row`]), as text. Refuses stray placeholders."""
        check_placeholders(messages, self.processor)
        return self.chat_format.render(messages, tools, add_generation_prompt)

    def process(self, texts: Sequence[str], images: Sequence[Sequence[Any]], **options: Any) -> Any:
        """What the processor makes of texts and the pictures of each, padded. Raises what the processor raises."""
        bos = self.tokenizer.bos_token
        # A template that writes the first token itself must not get a second one.
        options |= {"padding": True, "add_special_tokens": bos is None or not texts[0].startswith(bos)}
        pictures = [[as_processed(image, self.processor) for image in each] for each in images]
        if self.tokenizer is not self.processor:
            return self.processor(text=list(texts), images=pictures if any(pictures) else None, **options)
        if any(pictures):
            raise ValueError("there are pictures, which a tokenizer alone does not take; pass the target's processor")
        return self.processor(list(texts), **options)
