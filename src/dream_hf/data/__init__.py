"""Conversations with pictures -> batches with an answer mask."""

from .collator import ConversationCollator
from .dataset import ConversationDataset, ConversationStream, is_stream
from .rows import open_rows
from .token_counts import count_answer_tokens

__all__ = [
    "ConversationCollator",
    "ConversationDataset",
    "ConversationStream",
    "count_answer_tokens",
    "is_stream",
    "open_rows",
]
