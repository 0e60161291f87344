"""Conversations with pictures -> batches with an answer mask."""

from .answer_tokens import count_answer_tokens
from .collator import ConversationCollator
from .dataset import ConversationDataset, ConversationStream, is_stream
from .rows import open_rows

__all__ = [
    "ConversationCollator",
    "ConversationDataset",
    "ConversationStream",
    "count_answer_tokens",
    "is_stream",
    "open_rows",
]
