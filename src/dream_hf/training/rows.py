"""The rows that a `DreamTrainer` is given: as datasets of conversations, looked over before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from ..data import ConversationCollator, ConversationDataset, ConversationStream, is_stream
from ..targets.target import Target
from .arguments import DreamTrainingArguments

NUM_PROBED_ROWS = 16


def read_rows(source: Any, name: str, args: DreamTrainingArguments) -> Any:
    """`source` as a dataset of conversations; a dictionary of sources as a dictionary of datasets."""
    if source is None or isinstance(source, ConversationDataset | ConversationStream):
        return source
    if name == "train_dataset" and is_stream(source):
        check_stream(args)
        return ConversationStream(source, name=name, max_bad_rows=args.max_bad_rows)
    if isinstance(source, Mapping):
        return {key: read_rows(value, f"{name}[{key!r}]", args) for key, value in source.items()}
    return ConversationDataset(source, name=name, max_bad_rows=args.max_bad_rows)


def check_stream(args: DreamTrainingArguments) -> None:
    """Refuse what needs all rows at once, and let every process take its own rows of a stream.

    Raises:
        ValueError: An argument that a stream cannot serve.
    """
    for name in ("feature_cache_dir", "draft_vocab_size"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"`{name}` ({getattr(args, name)!r}) needs all rows of `train_dataset`, which is a stream; leave it out, or "
                "load the rows without `streaming=True`."
            )
    # The alternative, one process that reads and cuts batches for all, would cut pictures' tensors like rows.
    config: Any = args.accelerator_config
    config.dispatch_batches = False


def probe_rows(rows: Any, name: str, collator: ConversationCollator, target: Target, vocab_size: int) -> None:
    """Refuse rows without answers, or of another tokenizer, before anything is trained.

    Args:
        rows: What [`read_rows`] made of them.
        name (`str`): What errors call them.
        collator (`ConversationCollator`): Makes batches of them.
        target (`Target`): Knows which tokens beyond its vocabulary are visual.
        vocab_size (`int`): Of the target.

    Raises:
        ValueError: None of the first rows can be learned from.
    """
    if rows is None:
        return
    if isinstance(rows, dict):
        for each in rows.values():
            probe_rows(each, name, collator, target, vocab_size)
        return
    num_rows = 0
    for index, item in enumerate(islice(rows, NUM_PROBED_ROWS)):
        num_rows = index + 1
        batch = collator([item])
        largest = batch["input_ids"].max()
        if largest >= vocab_size and not target.is_visual(largest):
            raise ValueError(
                f"`processing_class` makes token {int(largest)} of row {index} of `{name}`, and the target's vocabulary has "
                f"{vocab_size}. Pass the processor that belongs to the target."
            )
        if batch["answer_mask"].any():
            return
    raise ValueError(
        f"None of the first {num_rows} rows of `{name}` has an answer token. Rows need `messages` with at least one "
        "assistant message, and `max_length` must leave room for it."
    )
