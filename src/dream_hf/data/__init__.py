"""Conversations with pictures -> batches with an answer mask."""

from .answer_tokens import count_answer_tokens
from .collator import ConversationCollator
from .dataset import ConversationDataset
from .rows import open_rows

__all__ = ["ConversationCollator", "ConversationDataset", "count_answer_tokens", "open_rows"]
