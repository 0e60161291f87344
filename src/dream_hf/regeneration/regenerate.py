"""`regenerate`: replace the answers of a dataset by the target's own, which is what its drafter has to predict (paper 4.1)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.bad_rows import BadRows
from ..data.prompts import PromptEncoder
from ..data.rows import RowSource, open_rows
from ..decoding.drafter import Drafter
from .answering import Answerer
from .rows import UnansweredRow, read_row, undecoded
from .store import AnswerStore

BATCHES_PER_WINDOW = 16  # rows are read, sorted by length and batched in windows of this many batches


@dataclass(frozen=True)
class RegenerationReport:
    """
    What `regenerate` made.

    Args:
        output (`Path`): The file of rows.
        num_rows (`int`): Rows in it.
        num_unfinished (`int`): Rows of which an answer was cut at `max_new_tokens`; their `finished` is false.
        num_bad (`int`): Rows of the source left out because they cannot be used.
    """

    output: Path
    num_rows: int
    num_unfinished: int
    num_bad: int

    def __str__(self) -> str:
        left_out = f", {self.num_bad} left out" if self.num_bad else ""
        return f"{self.output}: {self.num_rows} rows, {self.num_unfinished} cut at the length limit{left_out}"


def regenerate(
    target: Any,
    processor: Any,
    rows: Any,
    output: str | Path,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    prompt_suffix: str = "",
    drafter: Drafter | None = None,
    seed: int = 42,
    max_rows: int | None = None,
    max_bad_rows: int = 100,
    split: str = "train",
) -> RegenerationReport:
    """Write `rows` with every answer replaced by the target's own.

    Turns are answered in order, each after the answers already regenerated; a row that ends with a user message gets an
    answer behind it. A stopped run goes on where it was when it is started again, and a complete one where the rows have
    become more: those there were keep their answers. Processes (`accelerate launch`, any number) share out the rows.

    Args:
        target (`PreTrainedModel`): The target.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): Its processor, with a chat template.
        rows, split: As in [`~dream_hf.data.open_rows`].
        output (`str` or `Path`): A `.jsonl` file; pictures that are no files yet go to `<output>_files/` beside it.
        batch_size (`int`): Prompts decoded together.
        max_new_tokens (`int`): Longest answer. Rows cut there are kept and marked `"finished": false`.
        temperature (`float`): 0 for greedy decoding.
        prompt_suffix (`str`): Appended to every user message that is answered ("Answer in detail."), and kept in the row.
        drafter (`Drafter`, *optional*): Decode with it: the same answers (sampled: of the same distribution) sooner.
        seed (`int`): For sampling.
        max_rows (`int`, *optional*): Take only the first rows.
        max_bad_rows (`int`): How many rows may be left out because they cannot be used.

    Raises:
        ValueError: An argument out of range, unusable rows, or an `output` begun with other settings.
    """
    _check(batch_size=batch_size, max_new_tokens=max_new_tokens, max_rows=max_rows, temperature=temperature)
    source, num_rows = _open(rows, split, max_rows)
    settings = {
        **_identity(target, source.rows),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "prompt_suffix": prompt_suffix,
        "seed": seed,
    }
    state = PartialState(cpu=target.device.type == "cpu")
    with state.main_process_first():
        store = AnswerStore(output, settings, partial(_digest_of, source.rows), num_rows, state.process_index)
    if store.is_complete:
        in_file, num_unfinished = store.counts()
        return RegenerationReport(store.output, in_file, num_unfinished, num_rows - in_file)

    answerer = Answerer(target, PromptEncoder(processor), drafter, max_new_tokens, temperature)
    bad_rows = BadRows(num_rows, max_bad_rows, "rows")
    with tqdm(desc="regenerate", unit="row", disable=not state.is_local_main_process) as progress:
        _answer_share(_Run(source, prompt_suffix, answerer, store, bad_rows, progress, batch_size, seed), state)
    return _finish(store, bad_rows, state)


def _open(rows: Any, split: str, max_rows: int | None) -> tuple[RowSource, int]:
    """The rows, pictures undecoded, and how many of them to answer."""
    source = open_rows(rows, split=split, name="rows")
    source = RowSource(undecoded(source.rows), source.folder)
    num_rows = len(source.rows) if max_rows is None else min(max_rows, len(source.rows))
    if num_rows == 0:
        raise ValueError("`rows` is empty. It needs at least one row with `messages`.")
    return source, num_rows


def _identity(target: Any, rows: Any) -> dict[str, str]:
    """What tells whose answers to which rows an output holds."""
    return {
        "target": getattr(target.config, "_name_or_path", "") or type(target).__name__,
        "dtype": str(target.dtype),
        "first_row": _digest(rows[0]),
    }


def _answer_share(run: _Run, state: PartialState) -> None:
    """Answer this process's share of the rows that are not there yet."""
    done = run.store.done()
    state.wait_for_everyone()  # nobody adds rows before everybody has seen what there is
    missing = [index for index in range(len(run.bad_rows.seen)) if index not in done]
    mine = missing[state.process_index :: state.num_processes]
    run.progress.reset(total=len(mine))
    for start in range(0, len(mine), window := run.batch_size * BATCHES_PER_WINDOW):
        _answer_window(run.rows(mine[start : start + window]), run)


def _finish(store: AnswerStore, bad_rows: BadRows, state: PartialState) -> RegenerationReport:
    """Merge what all processes have made."""
    num_bad = sum(gather_object([len(bad_rows)]))
    if num_bad > bad_rows.max_bad_rows:
        raise ValueError(
            f"{num_bad} of {bad_rows.num_rows} `rows` cannot be used, more than `max_bad_rows` ({bad_rows.max_bad_rows})."
        )
    state.wait_for_everyone()
    num_unfinished = store.merge() if state.is_main_process else 0
    state.wait_for_everyone()
    return RegenerationReport(store.output, bad_rows.num_rows - num_bad, num_unfinished, num_bad)


@dataclass(frozen=True)
class _Run:
    """What the rows of one process go through."""

    source: RowSource
    prompt_suffix: str
    answerer: Answerer
    store: AnswerStore
    bad_rows: BadRows
    progress: Any
    batch_size: int
    seed: int

    def leave_out(self, index: int, cause: str) -> None:
        """Report a row that cannot be used; an error once there are too many."""
        self.bad_rows.report(index, cause)
        self.progress.update()

    def rows(self, indices: Sequence[int]) -> list[UnansweredRow]:
        """Rows of the source; those that cannot be read are left out."""
        read = []
        for index in indices:
            # Broken JSON, a truncated picture, a decoder's own exception types: all are reasons to leave that row out.
            try:
                read.append(read_row(index, self.source.rows[index], self.source.folder, self.prompt_suffix))
            except Exception as error:
                self.leave_out(index, f"{type(error).__name__}: {error}")
        return read


def _answer_window(rows: list[UnansweredRow], run: _Run) -> None:
    """Answer all turns of `rows`, one round of turns after the other, and store each row as soon as it is complete."""
    while rows:
        waiting: list[UnansweredRow] = []
        for batch in _batches(rows, run.batch_size):
            for row in _answer_batch(batch, run):
                if row.turns:
                    waiting.append(row)
                else:
                    run.store.add(row.index, row.messages, row.values, row.is_finished, row.tools)
                    run.progress.update()
        rows = waiting


def _batches(rows: list[UnansweredRow], batch_size: int) -> Iterator[list[UnansweredRow]]:
    """Rows of similar length together: by number and size of pictures, then by text."""

    def length(row: UnansweredRow) -> tuple[int, int, int]:
        history, pictures = row.prompt()
        text = sum(len(part.get("text", "")) for message in history for part in message["content"])
        return len(pictures), sum(picture.width * picture.height for picture in pictures) // 2**16, text

    ordered = sorted(rows, key=length)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def _answer_batch(batch: list[UnansweredRow], run: _Run) -> list[UnansweredRow]:
    """Answer the next turn of a batch; returns it without the rows that had to be left out."""
    encoder = run.answerer.encoder
    # Processors and templates report what they cannot take with many exception types.
    try:
        prompts = encoder.encode([row.prompt() for row in batch], [row.tools for row in batch])
    except Exception as error:
        usable = [row for row in batch if _is_usable(row, run)]
        if len(usable) == len(batch):  # each can be processed on its own: the fault is the batch's
            raise error
        return _answer_batch(usable, run) if usable else []
    answered = []
    for row, answer in zip(batch, run.answerer.answer(prompts, run.seed + batch[0].index), strict=True):
        if answer.text:
            row.answer(answer.text, answer.is_finished)
            answered.append(row)
        else:
            run.leave_out(row.index, "the target answers with nothing")
    return answered


def _is_usable(row: UnansweredRow, run: _Run) -> bool:
    try:
        run.answerer.encoder.encode([row.prompt()], [row.tools])
    except Exception as error:
        run.leave_out(row.index, f"{type(error).__name__}: {error}")
        return False
    return True


def _digest(row: Any) -> str:
    messages = row.get("messages", row.get("conversations")) if isinstance(row, dict) else row
    return hashlib.sha256(json.dumps(messages, default=repr, sort_keys=True).encode()).hexdigest()[:16]


def _digest_of(rows: Any, count: int) -> str:
    """Digest of the conversations of the first `count` rows."""
    if hasattr(rows, "select_columns"):  # a `datasets.Dataset`, whose pictures need not be read for that
        rows = rows.select_columns([name for name in rows.column_names if name in ("messages", "conversations")])
    whole = hashlib.sha256()
    for index in range(count):
        try:
            whole.update(_digest(rows[index]).encode())
        except ValueError:  # broken JSON: a row that is left out
            whole.update(b"unreadable")
    return whole.hexdigest()[:16]


def _check(batch_size: int, max_new_tokens: int, max_rows: int | None, temperature: float) -> None:
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens), ("max_rows", max_rows)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` ({value}) must be at least 1.")
    if temperature < 0:
        raise ValueError(f"`temperature` ({temperature}) must be 0 (greedy) or more.")
