"""Earlier answers, for later ones to resemble: in memory, and in a file if asked."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from filelock import FileLock
from transformers.utils import logging

from ..private_files import write_private
from .likeliest import LikeliestTokens
from .ngrams import LONGEST, NgramIndex

logger = logging.get_logger(__name__)

SEPARATOR = -1
ANSWERS_PER_SAVE = 16


class RetrievalStore:
    """Token sequences of earlier answers, which drafts are made from.

    Nothing is shared but by passing the same store, or the same file, on purpose: whoever drafts from a store can learn from
    what is drafted, and from how fast, what is in it. Keep one for each tokenizer, and for each user or group of users who may
    see each other's answers.

    Args:
        path (`str` or `Path`, *optional*): A file to keep the answers in, read when the store is made, readable by its owner
            alone. It is written after every 16 answers, by `save()` and at the end of a `with` block, as a whole and never in
            part; several processes may use one file, and find each other's answers whenever they save.
        max_tokens (`int`): Tokens that are kept, in memory and in the file; the oldest answers go first. About 0.3 kB each.

    Raises:
        ValueError: `max_tokens` is below 1, or the file is no store.
    """

    def __init__(self, path: str | Path | None = None, max_tokens: int = 200_000):
        if max_tokens < 1:
            raise ValueError(f"`max_tokens` ({max_tokens}) must be at least 1.")
        self.path = None if path is None else Path(path)
        self.max_tokens = max_tokens
        self.index = NgramIndex(LONGEST)
        self.likeliest = LikeliestTokens()
        self.lock = threading.RLock()
        self._answers: dict[str, list[int]] = {}  # by names that are never given twice, oldest first
        self._num_tokens = 0
        self._unsaved: set[str] = set()
        if self.path is not None and self.path.is_file():
            with self.lock:
                self._take_in(_read(self.path))

    def __len__(self) -> int:
        """Answers that are kept."""
        return len(self._answers)

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return self._num_tokens

    def add(self, token_ids: Sequence[int]) -> None:
        """Keep an answer, or any other text, as `token_ids`; a negative one stands for something unknown."""
        with self.lock:
            name = uuid.uuid4().hex[:16]
            self._take_in({name: [int(token) for token in token_ids]})
            if self.path is not None and name in self._answers:
                self._unsaved.add(name)
                if len(self._unsaved) % ANSWERS_PER_SAVE == 0:
                    self._try_to_save()

    def save(self) -> None:
        """Write what was added to the file, if there is one, and take in what others have written since."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock, FileLock(f"{self.path}.lock"):
            written = _read(self.path) if self.path.is_file() else {}
            added = {name: self._answers[name] for name in self._answers if name in self._unsaved}
            _write(self.path, _last({**written, **added}, self.max_tokens))
            self._take_in({name: answer for name, answer in written.items() if name not in self._answers})
            self._unsaved.clear()

    def _try_to_save(self) -> None:
        """Save, unless the disk does not let us: nobody should lose an answer for that."""
        try:
            self.save()
        except (OSError, ValueError) as error:
            logger.warning(f"{len(self._unsaved)} answers were not saved and are tried again later: {error}")

    def __enter__(self) -> RetrievalStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.save()

    def _take_in(self, answers: dict[str, list[int]]) -> None:
        """Index answers, and forget the oldest beyond `max_tokens`."""
        for name, tokens in answers.items():
            answer = tokens[-self.max_tokens :]
            if not answer:
                continue
            self.index.extend(answer)
            self.index.append(SEPARATOR)
            self._answers[name] = answer
            self._num_tokens += len(answer)
        while self._num_tokens > self.max_tokens:
            name = next(iter(self._answers))
            answer = self._answers.pop(name)
            self._unsaved.discard(name)
            self._num_tokens -= len(answer)
            self.index.forget(len(answer) + 1)


def _last(answers: dict[str, list[int]], max_tokens: int) -> dict[str, list[int]]:
    """The last of `answers` that have no more than `max_tokens` together."""
    kept: list[str] = []
    for name in reversed(answers):
        max_tokens -= len(answers[name])
        if max_tokens < 0:
            break
        kept.append(name)
    return {name: answers[name] for name in reversed(kept)}


def _read(path: Path) -> dict[str, list[int]]:
    """The answers in a file, by their names."""
    answers: dict[str, list[int]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            name, tokens = json.loads(line)
            answers[str(name)] = [int(token) for token in tokens]
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"`path` ({path.name!r}) is no store of answers: line {number} is {line[:40]!r}. Name another file."
            ) from error
    return answers


def _write(path: Path, answers: dict[str, list[int]]) -> None:
    write_private(path, (json.dumps(entry, separators=(",", ":")) + "\n" for entry in answers.items()))
