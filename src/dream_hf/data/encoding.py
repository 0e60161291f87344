"""Conversations -> a processor's tensors, with the tokens of the answers marked."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .alignment import check_text_kept, expand_spans, tokens_in_spans
from .chat import Messages, Span, Tools
from .conversations import Conversation
from .reader import ChatReader


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
        self.reader = ChatReader(processor)
        self.tokenizer = self.reader.tokenizer
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"The target's tokenizer ({type(self.tokenizer).__name__}) does not report character offsets, which the "
                "answer mask needs. Load it as a fast tokenizer (with `tokenizers` installed)."
            )

    def render(self, conversation: Conversation) -> RenderedRow:
        """Write a conversation and find its answers. Raises a `ValueError` where there are none."""
        messages, tools = conversation.messages, conversation.tools
        text = self.reader.text(messages, tools)
        spans = self.reader.chat_format.answer_spans(messages, text, tools)
        if not spans:
            raise ValueError("the row has no answer: its assistant messages are empty")
        return RenderedRow(messages, conversation.images, tools, text, spans)

    def encode(self, rows: list[RenderedRow]) -> EncodedRows:
        """Tokenise `rows` together with their pictures and mark the answers' tokens."""
        options = {"padding_side": "right", "return_offsets_mapping": True}
        if self.tokenizer is not self.reader.processor:
            options["return_text_replacement_offsets"] = True
        inputs = self.reader.process([row.text for row in rows], [row.images for row in rows], **options)
        offsets = torch.as_tensor(inputs.pop("offset_mapping"), device="cpu")  # (B, T, 2)
        replacements = inputs.pop("text_replacement_offsets", None) or [[] for _ in rows]
        inputs.convert_to_tensors("pt")
        masks = []
        for row, row_offsets, row_replacements in zip(rows, offsets, replacements, strict=True):
            check_text_kept(row.text, row_replacements, row_offsets)
            masks.append(tokens_in_spans(row_offsets, expand_spans(row.answer_spans, row_replacements)))
        return EncodedRows(dict(inputs), torch.stack(masks), inputs["attention_mask"].sum(1))
