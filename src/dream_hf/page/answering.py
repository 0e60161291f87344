"""A question to two answers, as states of a page one after the other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..benchmark.comparison import Comparison, compare, encode
from ..data.chat import tokenizer_of
from ..data.images import load_image
from ..load_models import Models
from .streamed_text import StreamedText
from .watching import Step, WatchedDrafter

logger = logging.getLogger(__name__)

THREAD = "dream-hf page"
NO_PICTURE = "There is no picture: upload one, or choose one of the examples."
NO_QUESTION = "There is no question: write what you want to know."


@dataclass(frozen=True)
class PageState:
    """
    What the page shows at one moment.

    Args:
        plain (`tuple[str, ...]`): The answer of plain decoding so far, as one piece.
        speculative (`tuple[str, ...]`): The answer with the drafter so far, in pieces that came at once.
        doing (`str`): What is going on; empty when nothing is.
        texts (`tuple[str, ...]`): What each node of the last step's tree says, the root first.
        step (`Step`, *optional*): The last step.
        report (`dict`, *optional*): The figures, as [`Comparison.report`] names them, when all is over.
        error (`str`): Why there is no answer, in one line.
    """

    plain: tuple[str, ...] = ()
    speculative: tuple[str, ...] = ()
    doing: str = ""
    texts: tuple[str, ...] = ()
    step: Step | None = None
    report: dict[str, Any] | None = None
    error: str = ""


def answer(
    models: Models, picture: Any, question: str | None, max_new_tokens: int = 256, repeats: int = 1
) -> Iterator[PageState]:
    """Decode with and without the drafter, first streaming, then timed, both ways in turns.

    States come as fast as they are taken; closing the iterator ends the decoding with the token that is at hand.

    Args:
        models (`Models`): A target, its processor and a drafter.
        picture: What [`load_image`] takes: a path above all. None where nothing was chosen, or for a text-only target.
        question (`str`): What to ask.
        max_new_tokens (`int`): Longest answer.
        repeats (`int`): Timed runs of each; medians count.
    """
    yield PageState(doing="reading the question")
    try:
        run = _Run(models, _inputs(models, picture, question), max_new_tokens, repeats)
    except (ValueError, TypeError, OSError, ImportError) as error:
        yield PageState(error=_in_one_line(error))
        return
    try:
        yield from run.states()
    finally:
        run.stop()


def takes_pictures(models: Models) -> bool:
    """Whether the target is one that pictures are shown to."""
    return getattr(models.processor, "image_processor", None) is not None


def _inputs(models: Models, picture: Any, question: str | None) -> Any:
    """The question as inputs of `generate()`."""
    if picture is None and takes_pictures(models):
        raise ValueError(NO_PICTURE)
    if question is None or not question.strip():
        raise ValueError(NO_QUESTION)
    return encode(models.processor, question.strip(), None if picture is None else _load(picture))


def _load(picture: Any) -> Any:
    try:
        return load_image(picture)
    except (OSError, TypeError) as error:
        reason = getattr(error, "strerror", None) or _reason(error)
        raise ValueError(f"The picture cannot be read: {reason}") from error


def _reason(error: Exception) -> str:
    """What is wrong with a picture, without the name of a file that the user has never seen."""
    return "it is no picture of a format that is known." if "cannot identify" in str(error) else str(error)


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class StoppedError(Exception):
    """Nobody waits for the answer any more."""


class _Run:
    """Both ways of decoding in a thread of their own, and what of them can be seen from outside."""

    def __init__(self, models: Models, inputs: Any, max_new_tokens: int, repeats: int):
        self.tokenizer = tokenizer_of(models.processor)
        self.is_stopped, self.is_over = False, False
        self.has_news = threading.Event()
        self.num_steps = 0
        self.step: Step | None = None
        self.doing, self.error = "warming up", ""
        self.result: Comparison | None = None
        self.plain = _Pieces(self, "decoding plainly")
        self.speculative = _Pieces(self, "decoding with the drafter")
        self.compare = partial(
            compare,
            models.target,
            WatchedDrafter(models.drafter, self.note),
            models.processor,
            inputs,
            max_new_tokens,
            repeats,
            (self.plain, self.speculative),
            _Pulse(self),
        )
        self.thread = threading.Thread(target=self._work, name=THREAD, daemon=True)

    def states(self) -> Iterator[PageState]:
        """The state whenever there is news, to the last."""
        self.thread.start()
        while not self.is_over:
            self.has_news.wait()
            self.has_news.clear()
            yield self.state()
        yield self.state()

    def stop(self) -> None:
        """End the decoding, and wait until it has ended."""
        self.is_stopped = True
        if self.thread.is_alive():
            self.thread.join()

    def state(self) -> PageState:
        """What is to be seen now."""
        step = self.step
        texts = () if step is None else tuple(str(self.tokenizer.decode([token])) for token in step.tokens)
        report = None if self.result is None else self.result.report()
        return PageState(
            tuple(self.plain.pieces), tuple(self.speculative.pieces), self.doing, texts, step, report, self.error
        )

    def note(self, step: Step) -> None:
        """Take note of a step, in the thread that decodes."""
        self.check()
        if self.speculative.has_prompt:  # and not while warming up
            self.num_steps += 1
            self.step = step

    def tell(self, doing: str) -> None:
        """Let it be known that there is news."""
        self.check()
        self.doing = doing
        self.has_news.set()

    def check(self) -> None:
        """Raise where nobody waits any more."""
        if self.is_stopped:
            raise StoppedError

    def _work(self) -> None:
        try:
            self.result = self.compare()
        except StoppedError:
            pass
        except Exception as error:
            logger.exception("no answer")
            self.error = _in_one_line(error)
        self.doing, self.is_over = "", True
        self.has_news.set()


class _Pieces(StreamedText):
    """An answer in pieces that came in one step each."""

    def __init__(self, run: _Run, doing: str):
        super().__init__(run.tokenizer)
        self.run, self.doing = run, doing
        self.pieces: list[str] = []
        self.num_steps = -1

    def begin(self) -> None:
        self.run.tell(self.doing)

    def write(self, text: str) -> None:
        if self.pieces and self.num_steps == self.run.num_steps:
            self.pieces[-1] += text
        else:
            self.pieces.append(text)
        self.num_steps = self.run.num_steps
        self.run.tell(self.doing)

    def end(self) -> None:
        super().end()
        self.run.tell(self.doing)


class _Pulse(BaseStreamer):
    """Looks, with each token of the timed runs, whether anybody still waits; that is little beside a token."""

    def __init__(self, run: _Run):
        self.run = run

    def put(self, value: torch.Tensor) -> None:
        self.run.check()
        if self.run.doing != "timing both":
            self.run.tell("timing both")

    def end(self) -> None:
        pass
