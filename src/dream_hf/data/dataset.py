"""Datasets of conversations for a `torch.utils.data.DataLoader`: rows in any order, or a stream of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .bad_rows import BadRows
from .conversations import Conversation, parse_row
from .rows import open_rows


@dataclass(frozen=True)
class Item:
    """Row `index`: its conversation, or `None` where it could not be read; `bad_rows` is its dataset's record."""

    index: int
    conversation: Conversation | None
    bad_rows: BadRows


class ConversationDataset(Dataset[Item]):
    """
    Rows of `messages` and `images`, read when asked for.

    Args:
        source: The rows; see [`open_rows`].
        split (`str`): The split to take of a dataset on the Hub.
        name (`str`): What errors call the dataset.
        max_bad_rows (`int`): How many rows may be skipped because they cannot be used, before it is an error.

    Raises:
        ValueError: There are no rows, or nothing to read at `source`.
    """

    def __init__(
        self, source: Any, *, split: str = "train", name: str = "train_dataset", max_bad_rows: int = 0
    ) -> None:
        self.source = open_rows(source, split=split, name=name)
        self.name = name
        self.num_rows = len(self.source.rows)
        if self.num_rows == 0:
            raise ValueError(f"`{name}` is empty. It needs at least one row with `messages`.")
        self.bad_rows = BadRows(self.num_rows, max_bad_rows, name)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Item:
        index = range(len(self))[index]
        return _read(index, partial(self.source.rows.__getitem__, index), self.source.folder, self.bad_rows)


class ConversationStream(IterableDataset[Item]):
    """
    Rows of `messages` and `images` from a stream, in its order; worker processes share them out.

    Args:
        source (`Iterable`): What yields the rows, from the first one on whenever it is iterated: a
            `datasets.IterableDataset`, a `torch.utils.data.IterableDataset`.
        name (`str`): What errors call the stream.
        max_bad_rows (`int`): How many rows may be skipped because they cannot be used, before it is an error.
    """

    def __init__(self, source: Any, *, name: str = "train_dataset", max_bad_rows: int = 0) -> None:
        self.source, self.name = source, name
        self.bad_rows = BadRows(None, max_bad_rows, name)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index, row in islice(enumerate(self.source), first, None, step):
            yield _read(index, partial(_same, row), None, self.bad_rows)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, where the source does."""
        if callable(set_epoch := getattr(self.source, "set_epoch", None)):
            set_epoch(epoch)


def is_stream(source: Any) -> bool:
    """Whether rows can only be read one after the other, but again and again (a generator is used up by the first look)."""
    has_rows = callable(getattr(source, "__getitem__", None)) and callable(getattr(source, "__len__", None))
    return callable(getattr(source, "__iter__", None)) and not has_rows and not isinstance(source, Iterator | set)


def _same(row: Any) -> Any:
    return row


def _read(index: int, get: Callable[[], Any], folder: Path | None, bad_rows: BadRows) -> Item:
    """Row `index` of a dataset, or a report on it."""
    # Whatever is wrong with a row (broken JSON, a truncated picture, a decoder's own exception types) is a reason to
    # skip that row, and nothing else.
    try:
        return Item(index, parse_row(get(), folder), bad_rows)
    except Exception as error:
        bad_rows.report(index, f"{type(error).__name__}: {error}")
        return Item(index, None, bad_rows)
