"""Text that would be taken for a picture, or was meant to be one."""

from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .chat import Messages
from .sharegpt import PLACEHOLDER


def check_placeholders(messages: Messages, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
    """
    Refuse prompts that have a picture's placeholder in their text: another target's would be read as a word, its own as a
    picture that is not there.

    Raises:
        ValueError: There is one.
    """
    if not isinstance(processor, ProcessorMixin):
        return
    marks: set[str] = {PLACEHOLDER, getattr(processor, "image_token", None) or PLACEHOLDER}
    for message in messages:
        found = [mark for mark in marks if message["role"] != "assistant" and mark in _text(message)]
        if found:
            raise ValueError(
                f"the text of a {message['role']} message has {found[0]!r}, which is no picture there; write the part "
                '{"type": "image"} in its place, or give the row as `conversations`'
            )


def _text(message: dict[str, Any]) -> str:
    return "\n".join(part["text"] for part in message.get("content") or [] if part["type"] == "text")
