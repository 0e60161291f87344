"""One row -> one conversation: messages in parts, pictures, tools, or the reason why not."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .images import load_image
from .plain import as_python
from .sharegpt import is_turn, to_message, to_messages


@dataclass(frozen=True)
class Conversation:
    """
    A row, read.

    `messages` have lists of parts as their content, `{"type": "image"}` or `{"type": "text", "text": ...}`, or none beside
    `tool_calls`; there are as many image parts as `images`, in the same order. `tools` is what the template is told of.
    """

    messages: list[dict[str, Any]]
    images: list[Image.Image]
    tools: list[Any] | None = None


def parse_row(row: Any, folder: Path | None = None) -> Conversation:
    """
    Read a row of trl's vision fine-tuning convention: `messages`, and `images` (or one `image`) where there are any, and
    `tools`; or of LLaVA's and ShareGPT's: `conversations` of `from` and `value`, with `<image>` where a picture belongs.

    Pictures may also stand inside the messages, as `{"type": "image", "image": ...}`. Where there are pictures and no
    image part at all, they are put at the start of the first user message.

    Raises:
        ValueError: The row does not follow the convention, or its pictures and image parts do not match.
        OSError: A picture cannot be read.
    """
    row = with_messages(row)
    messages, values = _parse(row)
    return Conversation(messages, [load_image(value, folder) for value in values], _tools(row))


def parse_text(row: Any) -> Conversation:
    """The messages and tools of [`parse_row`], without loading a picture. Raises the same `ValueError`s."""
    row = with_messages(row)
    return Conversation(_parse(row)[0], [], _tools(row))


def with_messages(row: Any) -> dict[str, Any]:
    """`row` with `messages` of `role` and `content`, whatever convention it follows; what is in them is not looked at."""
    if not isinstance(row, Mapping):
        raise ValueError(f"a row must be a dict with `messages`, not a {type(row).__name__}")
    row = as_python(row)
    messages = row.get("messages")
    if messages is None and isinstance(row.get("conversations"), list):
        messages = to_messages(row["conversations"], row.get("system"))
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`messages` must be a list of messages, not {_shown(messages)}; the row has {sorted(row)}")
    return {**row, "messages": [to_message(message) if is_turn(message) else message for message in messages]}


def _parse(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """A row's messages, and its pictures as they are stored."""
    inline_images: list[Any] = []
    messages = [_parse_message(message, inline_images) for message in row["messages"]]
    values = row_images(row)
    if inline_images and values:
        raise ValueError("the row has pictures both in `images` and inside its messages; keep one of them")
    if any(message["role"] == "assistant" and count_image_parts([message]) for message in messages):
        raise ValueError("an assistant message has an image part, and targets answer in text")
    values = values or inline_images
    if values and count_image_parts(messages) == 0:
        _place_images(messages, len(values))
    if count_image_parts(messages) != len(values):
        raise ValueError(
            f"the messages have {count_image_parts(messages)} image parts and the row has {len(values)} pictures"
        )
    return messages, values


def count_image_parts(messages: list[dict[str, Any]]) -> int:
    """The number of image parts in parsed `messages`."""
    return sum(part["type"] == "image" for message in messages for part in message.get("content") or [])


def _parse_message(message: Any, inline_images: list[Any]) -> dict[str, Any]:
    """`message` with a list of parts; pictures found inside them go to the end of `inline_images`."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"a message must be a dict with `role` and `content`, not {_shown(message)}")
    content = message.get("content")
    # Tables give every dict the keys of all others, with None in them, which templates take for values.
    rest = {key: value for key, value in message.items() if value is not None and key != "content"}
    if content is None and rest.get("tool_calls"):  # an answer that only calls
        return {**rest, "content": None} if "content" in message else rest
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise ValueError(f"the content of a message must be a string or a list of parts, not {_shown(content)}")
    return {**rest, "content": [_parse_part(part, inline_images) for part in content]}


def _parse_part(part: Any, inline_images: list[Any]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        inline_images += [part[key] for key in ("image", "path", "url") if part.get(key) is not None]
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise ValueError(f"a part must be {{'type': 'image'}} or {{'type': 'text', 'text': ...}}, not {_shown(part)}")


def row_images(row: Mapping[str, Any]) -> list[Any]:
    """A row's pictures as they are stored: its `images`, or its `image`; those inside its messages left out."""
    values = row.get("image") if row.get("images") is None else row["images"]
    if values is None:
        return []
    return list(values) if isinstance(values, list | tuple) else [values]


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools that a row's template is told of: a list of schemas, as such or as JSON."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"`tools` ({_shown(tools)}) must be a list of tools, or one as JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"`tools` must be a list of tools, or one as JSON, not {_shown(tools)}")
    return tools


def _place_images(messages: list[dict[str, Any]], num_images: int) -> None:
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is None:
        raise ValueError(f"the row has {num_images} pictures and no user message to put them in")
    first["content"] = [{"type": "image"} for _ in range(num_images)] + first["content"]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
