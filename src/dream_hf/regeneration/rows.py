"""Rows whose answers are still to come: their prompts turn by turn, and their pictures as the source has them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.conversations import count_image_parts, parse_row, row_images, with_messages


@dataclass
class UnansweredRow:
    """
    A row on its way to its answers.

    Args:
        index (`int`): Which row of the source.
        messages (`list[dict]`): The conversation, parsed; old answers are replaced one by one.
        pictures (`list[PIL.Image]`): What the target is shown.
        values (`list`): The same pictures as the source has them: paths, bytes or PIL images.
        turns (`list[int]`): The assistant messages still to be answered.
        tools (`list`, *optional*): What the template is told of.
        is_finished (`bool`): No answer so far was cut at the length limit.
    """

    index: int
    messages: list[dict[str, Any]]
    pictures: list[Any]
    values: list[Any]
    turns: list[int]
    tools: list[Any] | None = None
    is_finished: bool = True

    def prompt(self) -> tuple[list[dict[str, Any]], list[Any]]:
        """The conversation up to the next answer, and the pictures it then has."""
        history = self.messages[: self.turns[0]]
        return history, self.pictures[: count_image_parts(history)]

    def answer(self, text: str, is_finished: bool) -> None:
        """Put the next answer in its place."""
        self.messages[self.turns.pop(0)]["content"] = [{"type": "text", "text": text}]
        self.is_finished = self.is_finished and is_finished


def read_row(index: int, raw: Any, folder: Path | None, prompt_suffix: str) -> UnansweredRow:
    """Row `index` of a source, with `prompt_suffix` on every question. Raises what [`parse_row`] raises."""
    row = with_messages(raw)
    conversation = parse_row(row, folder)
    messages = copy.deepcopy(conversation.messages)
    if any(message.get("tool_calls") for message in messages):
        raise ValueError(
            "an answer calls tools, and an answer made anew would be text with none of the results it got"
        )
    if messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": []})
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if prompt_suffix:
        for turn in turns:
            if turn and messages[turn - 1]["role"] == "user":
                _append_text(messages[turn - 1]["content"], prompt_suffix)
    values = [_resolved(value, folder) for value in row_images(row)]
    if len(values) != len(conversation.images):  # pictures that stand inside the messages
        values = list(conversation.images)
    return UnansweredRow(index, messages, conversation.images, values, turns, conversation.tools)


def _append_text(parts: list[dict[str, Any]], suffix: str) -> None:
    texts = [part for part in parts if part["type"] == "text"]
    if texts:
        texts[-1]["text"] = f"{texts[-1]['text']} {suffix}"
    else:
        parts.append({"type": "text", "text": suffix})


def _resolved(value: Any, folder: Path | None) -> Any:
    """A path, alone or in `datasets`' storage form, made absolute; other forms as they are."""
    if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path") is not None:
        value = value["path"]
    return ((folder or Path()) / Path(value).expanduser()).resolve() if isinstance(value, str | Path) else value


def undecoded(rows: Any) -> Any:
    """A `datasets.Dataset` whose pictures are handed out as they are stored, so that they can be written as they are."""
    for name, feature in getattr(rows, "features", {}).items():
        kind = type(feature).__name__
        if kind == "Image":
            rows = rows.cast_column(name, type(feature)(decode=False))
        elif kind in ("List", "Sequence") and type(feature.feature).__name__ == "Image":
            rows = rows.cast_column(name, type(feature)(type(feature.feature)(decode=False)))
    return rows
