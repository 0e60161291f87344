"""What is asked in a benchmark: the demo world's tasks, public sets by their Hub ids, or a file of rows.

Every prompt is a conversation that ends with a user message. Public sets are shuffled with a seed and the first prompts are
taken, as in the paper (section 4.1); `datasets` does the loading.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.conversations import parse_row, with_messages
from ..data.rows import FILE_SUFFIXES, RowSource, import_datasets, open_rows
from ..demo.rows import TASKS as DEMO_TASKS
from ..demo.rows import TRAIN_SEED_LIMIT, make_rows
from .public_sets import PUBLIC_SETS

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One question: parsed messages and pictures, and which row of its task it is."""

    task: str
    index: int
    messages: list[dict[str, Any]]
    images: list[Any]


def load_prompts(task: str, num_prompts: int, seed: int = 42, revision: str | None = None) -> list[Prompt]:
    """Prompts of one task, the same for the same seed.

    Args:
        task (`str`): "scene", "chart" or "text" of the demo world (held-out pictures); the name of a public set, or
            `name=SOURCE` to take its rows from a file, folder or another Hub id; or a `.jsonl`, `.json` or `.parquet`
            file of rows `{"messages": [...], "images": [...]}`, whose last answers are left out.
        num_prompts (`int`): How many; fewer where the set has fewer usable rows.
        seed (`int`): For shuffling, or for drawing the demo world's pictures.
        revision (`str`, *optional*): Revision of a set on the Hub.

    Raises:
        ValueError: An unknown task, or a source without a usable row.
    """
    if num_prompts < 1:
        raise ValueError(f"`num_prompts` ({num_prompts}) must be at least 1.")
    if task in DEMO_TASKS:
        rows: Sequence[Row] = make_rows(task, num_prompts, TRAIN_SEED_LIMIT + seed)
        return _take(task, RowSource(rows), range(num_prompts), num_prompts, _without_last_answer)
    name, _, source = task.partition("=")
    if name in PUBLIC_SETS:
        public = PUBLIC_SETS[name]
        opened = _open_public(name, source, revision)
        return _take(name, opened, _shuffled(len(opened.rows), seed), num_prompts, public.to_row)
    if Path(task).suffix in FILE_SUFFIXES:
        opened = open_rows(task, name="task")
        order = _shuffled(len(opened.rows), seed)
        return _take(Path(task).stem, opened, order, num_prompts, _without_last_answer)
    raise ValueError(
        f"`task` ({task!r}) is unknown: use {', '.join(map(repr, [*DEMO_TASKS, *PUBLIC_SETS]))}, or a file of rows "
        f"({', '.join(FILE_SUFFIXES)})."
    )


def _open_public(name: str, source: str, revision: str | None) -> RowSource:
    public = PUBLIC_SETS[name]
    if source and Path(source).suffix in FILE_SUFFIXES:
        return open_rows(source, name="task")
    if not source and public.hub_id is None:
        raise ValueError(f"`task` ({name!r}) has no known Hub id. {public.note} Then name it {name}=FILE.jsonl.")
    datasets = import_datasets(f"`task` ({name!r})")
    try:
        loaded = datasets.load_dataset(
            source or public.hub_id, split=public.split, revision=revision, data_files=None if source else public.files
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"`task` ({name!r}): {source or public.hub_id!r} cannot be loaded: {error}") from error
    return RowSource(loaded)


def _shuffled(num_rows: int, seed: int) -> list[int]:
    order = list(range(num_rows))
    random.Random(seed).shuffle(order)
    return order


def _take(
    task: str, source: RowSource, order: Sequence[int], num_prompts: int, to_row: Callable[[Row], Row | None]
) -> list[Prompt]:
    """The first usable rows in an order; a set's rows without pictures, for instance, are not."""
    prompts: list[Prompt] = []
    for index in order:
        raw: Any = None
        try:
            raw = source.rows[index]
            row = to_row(raw)
            if row is None:
                continue
            conversation = parse_row(row, source.folder)
        except KeyError as error:
            columns = f", only {sorted(raw)}" if isinstance(raw, Mapping) else ""
            raise ValueError(f"`task` ({task!r}): its rows have no column {error}{columns}.") from error
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"`task` ({task!r}): row {index} cannot be used: {error}") from error
        prompts.append(Prompt(task, index, conversation.messages, conversation.images))
        if len(prompts) == num_prompts:
            break
    if not prompts:
        raise ValueError(f"`task` ({task!r}) has no usable row among its {len(source.rows)}.")
    return prompts


def _without_last_answer(row: Row) -> Row | None:
    row = with_messages(row)
    messages = row["messages"]
    while messages and messages[-1].get("role") != "user":
        messages.pop()
    return row if messages else None
