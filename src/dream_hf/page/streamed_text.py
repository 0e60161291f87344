"""An answer's text as its tokens come."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


class StreamedText(BaseStreamer):
    """
    Hands an answer on in whole characters; what becomes of them is up to subclasses.

    Args:
        tokenizer: Decodes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.token_ids: list[int] = []
        self.shown = ""
        self.has_prompt = False

    def begin(self) -> None:
        """The prompt has come, and the answer will."""

    def write(self, text: str) -> None:
        """What the last tokens have added."""
        raise NotImplementedError

    def put(self, value: torch.Tensor) -> None:
        if not self.has_prompt:
            self.has_prompt = True
            self.begin()
            return
        self.token_ids += value.flatten().tolist()
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the rest of a character is still to come
            self._show(text)

    def end(self) -> None:
        self._show(self._text())

    def _text(self) -> str:
        return self.tokenizer.decode(self.token_ids, skip_special_tokens=True)

    def _show(self, text: str) -> None:
        new = text[len(self.shown) :]
        if new:
            self.write(new)
            self.shown = text
