"""Rows as LLaVA and ShareGPT publish them -> messages: `conversations` of `from` and `value`, pictures as `<image>`."""

import re
from collections.abc import Mapping
from typing import Any

PLACEHOLDER = "<image>"

_ROLES = {
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model"),
    "system": ("system",),
    "tool": ("tool", "observation"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
# A line break beside a placeholder separates it from the text; how it is written is the template's business.
_MARK = re.compile(rf"\n?{re.escape(PLACEHOLDER)}\n?")


def to_messages(turns: list[Any], system: Any = None) -> list[dict[str, Any]]:
    """Turns of a `conversations` column as messages.

    Args:
        turns (`list[dict]`): With `from` and `value`, or `role` and `content`; every `<image>` becomes an image part.
        system (`str`, *optional*): A system prompt that stands in a column of its own.

    Raises:
        ValueError: A turn of another form, or of an unknown speaker.
    """
    messages = [to_message(turn) for turn in turns]
    if isinstance(system, str) and system and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def to_message(turn: Any) -> dict[str, Any]:
    """One turn as a message."""
    if not isinstance(turn, Mapping):
        raise ValueError(
            f"a turn of `conversations` must be a dict with `from` and `value`, not a {type(turn).__name__}"
        )
    if is_turn(turn):
        speaker, content = turn["from"], turn["value"]
        rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    else:
        speaker, content = turn.get("role"), turn.get("content")
        rest = {key: value for key, value in turn.items() if key not in ("role", "content")}
    if speaker not in _ROLE_OF:
        raise ValueError(f"a turn of `conversations` is from {speaker!r}, which is none of {sorted(_ROLE_OF)}")
    return {**rest, "role": _ROLE_OF[speaker], "content": split_placeholders(content)}


def is_turn(message: Any) -> bool:
    """Whether a message has `from` and `value` in place of `role` and `content`."""
    return isinstance(message, Mapping) and message.get("from") is not None and message.get("value") is not None


def split_placeholders(content: Any) -> Any:
    """Text with `<image>` in it as a list of parts; any other content as it is."""
    if not isinstance(content, str) or PLACEHOLDER not in content:
        return content
    parts: list[dict[str, Any]] = []
    for place, text in enumerate(_MARK.split(content)):
        parts += [{"type": "image"}] if place else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts
