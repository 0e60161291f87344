"""Text on a terminal as it comes, the tokens of one accepted path in one colour."""

from __future__ import annotations

import os
import sys
from typing import Any

from ..page.streamed_text import StreamedText

COLORS = (36, 33, 32, 35, 34)  # cyan, yellow, green, magenta, blue: readable on light and dark
SEPARATOR = "|"


def wants_color(choice: str) -> bool:
    """`--color` as a yes or no: "auto" is yes on a terminal, unless NO_COLOR is set."""
    if choice == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return choice == "always"


class StepStreamer(StreamedText):
    """
    Prints an answer token by token.

    Args:
        tokenizer: Decodes.
        title (`str`): Printed first.
        target (`PreTrainedModel`, *optional*): Whose forwards tell the steps apart; without it steps are not shown.
        is_colored (`bool`): Show steps as colours; otherwise as bars between them.
    """

    def __init__(self, tokenizer: Any, title: str, target: Any = None, is_colored: bool = False) -> None:
        super().__init__(tokenizer)
        self.title, self.is_colored = title, is_colored
        self.step = self.shown_step = 0
        self.shows_steps = target is not None
        self.hook = None if target is None else target.register_forward_hook(self._next_step)

    def begin(self) -> None:
        print(self.title, end="", flush=True)

    def write(self, text: str) -> None:
        print(self._marked(text), end="", flush=True)

    def end(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        super().end()
        print("\n", flush=True)

    def _next_step(self, *_: Any) -> None:
        self.step += 1

    def _marked(self, text: str) -> str:
        if not self.shows_steps:
            return text
        is_new_step, self.shown_step = self.step != self.shown_step and self.shown != "", self.step
        if self.is_colored:
            return f"\x1b[{COLORS[self.step % len(COLORS)]}m{text}\x1b[0m"
        return f"{SEPARATOR}{text}" if is_new_step else text
