"""Where rows come from: a list, a `datasets.Dataset`, a JSON Lines, JSON or Parquet file, or a dataset on the Hub."""

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


class Rows(Protocol):
    """Rows that can be counted and read in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class RowSource:
    """Rows, and the folder their relative image paths start from (`None`: the working directory)."""

    rows: Rows
    folder: Path | None = None


class JsonLines:
    """The lines of a JSON Lines file, parsed when asked for, so that a broken line costs one row and not the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets: list[int] = []
        with path.open("rb") as file:
            start = file.read(3)
            if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError("it is written in UTF-16; save it as UTF-8")
            offset = len(codecs.BOM_UTF8) if start == codecs.BOM_UTF8 else 0
            file.seek(offset)
            for line in file:
                if line.strip():
                    self.offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int, /) -> Any:
        # Opened for each row: a shared handle would be moved by every worker process at once.
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return json.loads(file.readline())


def open_rows(source: Any, *, split: str = "train", name: str = "train_dataset") -> RowSource:
    """
    Make `source` readable row by row.

    Args:
        source (`Sequence[dict]`, `datasets.Dataset`, `pandas.DataFrame`, `str` or `Path`):
            The rows; a file (`.jsonl`, `.json` with a list, `.parquet`) whose image paths are relative to it; or the
            id of a dataset on the Hub.
        split (`str`): The split to take of a dataset on the Hub.
        name (`str`): What errors call `source`.

    Raises:
        ValueError: There is nothing to read at `source`.
        TypeError: `source` cannot be counted and read in any order (a stream, a dictionary of splits).
    """
    if isinstance(source, str | Path):
        return _open_path(source, split, name)
    if callable(to_records := getattr(source, "to_dict", None)) and hasattr(source, "columns"):
        return RowSource(to_records("records"))  # a pandas DataFrame
    if isinstance(source, Mapping):
        raise TypeError(f"`{name}` holds several splits ({sorted(source)}); pass one of them, as `{name}[{split!r}]`.")
    if not isinstance(source, Sequence) and not (_has(source, "__len__") and _has(source, "__getitem__")):
        raise TypeError(
            f"`{name}` is a {type(source).__name__}, which cannot be read in any order. Pass a list of rows, a "
            "`datasets.Dataset` (load it without `streaming=True`, or take its first rows: `list(stream.take(500))`), a file "
            "or a Hub id."
        )
    return RowSource(source)


def _has(source: Any, method: str) -> bool:
    return callable(getattr(source, method, None))


def _open_path(source: str | Path, split: str, name: str) -> RowSource:
    path = Path(source).expanduser()
    if path.suffix not in FILE_SUFFIXES:
        return RowSource(_load_dataset(str(source), split, name))
    if not path.is_file():
        raise ValueError(
            f"`{name}` ({str(source)!r}) does not exist. Give a file's path, or the id of a dataset on the Hub."
        )
    try:
        if path.suffix == ".parquet":
            return RowSource(import_datasets(f"`{name}`").Dataset.from_parquet(str(path)), path.parent)
        if path.suffix == ".jsonl":
            return RowSource(JsonLines(path), path.parent)
        rows = json.loads(path.read_bytes())  # of bytes it finds out the encoding, a byte order mark included
    except (ValueError, OSError) as error:  # JSON or Parquet that is broken
        raise ValueError(f"`{name}` ({str(source)!r}) cannot be read: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"`{name}` ({str(source)!r}) must hold a list of rows, not a {type(rows).__name__}.")
    return RowSource(rows, path.parent)


def _load_dataset(source: str, split: str, name: str) -> Rows:
    """A dataset on the Hub, or a folder that `datasets` understands."""
    datasets = import_datasets(f"`{name}`")
    if (Path(source) / "state.json").is_file():
        return datasets.load_from_disk(source)
    try:
        return datasets.load_dataset(source, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{name}` ({source!r}) is neither a file ({', '.join(FILE_SUFFIXES)}) nor a dataset that can be loaded, "
            f"split {split!r}: {error}"
        ) from error


def import_datasets(what: str) -> Any:
    """The `datasets` package; `what` is read with it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{what} is read with the `datasets` package: `pip install datasets`.") from error
    return datasets
