"""Rows that cannot be used: named, counted, skipped up to a limit."""

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

STREAM_SLOTS = 2**20  # for rows of streams, which share a slot when they are this far apart


class BadRows:
    """
    The rows of one dataset that could not be used.

    The record lies in shared memory, so that the worker processes of a data loader count together and a row met again
    in a later epoch counts once.

    Args:
        num_rows (`int`, *optional*): Rows of the dataset; None for a stream, of which no one knows.
        max_bad_rows (`int`): How many of them may be skipped.
        name (`str`): What messages call the dataset.
    """

    def __init__(self, num_rows: int | None, max_bad_rows: int, name: str) -> None:
        self.num_rows, self.max_bad_rows, self.name = num_rows, max_bad_rows, name
        self.seen = torch.zeros(
            STREAM_SLOTS if num_rows is None else num_rows, dtype=torch.bool, device="cpu"
        ).share_memory_()

    def __len__(self) -> int:
        return int(self.seen.sum())

    def report(self, index: int, cause: str) -> None:
        """
        Record that row `index` is skipped because of `cause`.

        Raises:
            ValueError: More rows than `max_bad_rows` have been skipped, or all there are.
        """
        slot = index % len(self.seen)
        if self.seen[slot]:
            return
        self.seen[slot] = True
        cause = cause.rstrip(".")
        logger.warning(f"Row {index} of `{self.name}` is skipped: {cause}")
        of_rows = "" if self.num_rows is None else f" of {self.num_rows}"
        if len(self) > self.max_bad_rows:
            raise ValueError(
                f"{len(self)}{of_rows} rows of `{self.name}` cannot be used, more than `max_bad_rows` "
                f"({self.max_bad_rows}). The last one is row {index}: {cause}. Repair or remove such rows, or raise "
                "`max_bad_rows`."
            )
        if len(self) == self.num_rows:
            raise ValueError(
                f"None of the {self.num_rows} rows of `{self.name}` can be used. The last one is row {index}: {cause}."
            )
