"""Conversations -> a processor's tensors, with the tokens of the answers marked."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .alignment import check_text_kept, expand_spans, tokens_in_spans
from .chat import Messages, Span, Tools, find_chat_format, tokenizer_of
from .conversations import Conversation
from .images import as_processed
from .placeholders import check_placeholders


@dataclass(frozen=True)
class RenderedRow:
    """A conversation as text, with its pictures and its answers' characters."""

    messages: Messages
    images: list[Any]
    tools: Tools
    text: str
    answer_spans: list[Span]


@dataclass(frozen=True)
class EncodedRows:
    """Rows in the processor's tensors, padded on the right."""

    inputs: dict[str, Tensor]
    answer_mask: Tensor  # (B, T) bool
    lengths: Tensor  # (B,) tokens without padding


class ConversationEncoder:
    """
    Write and tokenise conversations the way the target reads them.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): The target's own, with its chat template.

    Raises:
        ValueError: No chat template, no padding token, or a tokenizer without character offsets.
    """

    def __init__(self, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
        self.processor = processor
        self.tokenizer = tokenizer_of(processor)
        self.chat_format = find_chat_format(processor)
        kind = type(self.tokenizer).__name__
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer of `processing_class` ({kind}) does not report character offsets, which the answer "
                "mask needs. Load it as a fast tokenizer (with `tokenizers` installed)."
            )
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"The tokenizer of `processing_class` ({kind}) has no padding token, which batches need. Set "
                "`tokenizer.pad_token`, for instance to its `eos_token`."
            )

    def render(self, conversation: Conversation) -> RenderedRow:
        """Write a conversation and find its answers. Raises a `ValueError` where there are none."""
        messages, tools = conversation.messages, conversation.tools
        check_placeholders(messages, self.processor)
        text = self.chat_format.render(messages, tools)
        spans = self.chat_format.answer_spans(messages, text, tools)
        if not spans:
            raise ValueError("the row has no answer: its assistant messages are empty")
        return RenderedRow(messages, conversation.images, tools, text, spans)

    def encode(self, rows: list[RenderedRow]) -> EncodedRows:
        """Tokenise `rows` together with their pictures and mark the answers' tokens."""
        inputs = self._process(rows)
        offsets = torch.as_tensor(inputs.pop("offset_mapping"))  # (B, T, 2)
        replacements = inputs.pop("text_replacement_offsets", None) or [[] for _ in rows]
        inputs.convert_to_tensors("pt")
        masks = []
        for row, row_offsets, row_replacements in zip(rows, offsets, replacements, strict=True):
            check_text_kept(row.text, row_replacements, row_offsets)
            masks.append(tokens_in_spans(row_offsets, expand_spans(row.answer_spans, row_replacements)))
        return EncodedRows(dict(inputs), torch.stack(masks), inputs["attention_mask"].sum(1))

    def _process(self, rows: list[RenderedRow]) -> Any:
        texts = [row.text for row in rows]
        images = [[as_processed(image, self.processor) for image in row.images] for row in rows]
        bos = self.tokenizer.bos_token
        options: dict[str, Any] = {
            # A template that writes the first token itself must not get a second one.
            "add_special_tokens": bos is None or not texts[0].startswith(bos),
            "padding": True,
            "padding_side": "right",
            "return_offsets_mapping": True,
        }
        if self.tokenizer is not self.processor:
            pictures = images if any(images) else None
            return self.processor(text=texts, images=pictures, return_text_replacement_offsets=True, **options)
        if any(images):
            raise ValueError("the row has pictures and `processing_class` is a tokenizer; pass the target's processor")
        return self.processor(texts, **options)
