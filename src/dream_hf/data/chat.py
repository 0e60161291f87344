"""A target's chat template: conversations -> text, and where in the text the answers are."""

import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

Messages = list[dict[str, Any]]
Tools = list[Any] | None
Span = tuple[int, int]  # first character, one past the last

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ChatFormat:
    """
    How a target's prompts are written.

    Args:
        template (`str`): The Jinja chat template.
        variables (`dict`): The special tokens that templates refer to by name.
        is_content_parts (`bool`): Whether the template takes lists of parts or plain strings.
        keeps_no_content (`bool`): Whether `apply_chat_template` shows the template a content of `None`, as transformers did
            before it left such contents out.
    """

    template: str
    variables: dict[str, Any]
    is_content_parts: bool = True
    keeps_no_content: bool = False

    def render(self, messages: Messages, tools: Tools = None, add_generation_prompt: bool = False) -> str:
        """The text of `messages`, whose template is told of `tools`."""
        return self._render(messages, tools=tools, add_generation_prompt=add_generation_prompt)[0][0]

    def answer_spans(self, messages: Messages, text: str, tools: Tools = None) -> list[Span]:
        """
        Where the answers are in `text`, the rendering of `messages` with `tools`: from the template's own generation
        markers where it has them, else by rendering each turn's prefix. The end-of-turn token belongs to the answer;
        whitespace after it, which no target generates, does not.

        Raises:
            ValueError: There are no markers and the template writes a prefix of the conversation differently.
        """
        if GENERATION_MARKER.search(self.template):
            spans = [
                tuple(span) for span in self._render(messages, tools=tools, return_assistant_tokens_mask=True)[1][0]
            ]
        else:
            spans = self._prefix_spans(messages, text, tools)
        trimmed = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
        return [(start, end) for start, end in trimmed if end > start]

    def _prefix_spans(self, messages: Messages, text: str, tools: Tools) -> list[Span]:
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            history, through = self.render(messages[:turn], tools), self.render(messages[: turn + 1], tools)
            if not (text.startswith(history) and text.startswith(through)):
                raise ValueError(
                    f"the chat template writes turn {turn} differently once later turns follow, so its answer cannot "
                    "be located; add {% generation %} markers to the template, or end each row with that turn"
                )
            # A generation prompt may end in something (an opened thinking block) that a finished turn does not have.
            prompt = self.render(messages[:turn], tools, add_generation_prompt=True)
            spans.append((_shared_length(prompt, text), len(through)))
        return spans

    def _render(self, messages: Messages, **options: Any) -> Any:
        if not self.is_content_parts:
            messages = [_with_plain_text(message) for message in messages]
        if not self.keeps_no_content:
            messages = [_without_no_content(message) for message in messages]
        return render_jinja_template([messages], chat_template=self.template, **options, **self.variables)


def tokenizer_of(processor: ProcessorMixin | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer of `processor`, which is one itself for a text-only target."""
    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


def find_chat_format(processor: ProcessorMixin | PreTrainedTokenizerBase) -> ChatFormat:
    """
    The chat format of `processor`, tried out on a conversation of two words.

    Raises:
        ValueError: There is no chat template, or it loses the words.
    """
    tokenizer = tokenizer_of(processor)
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        raise ValueError(
            f"`processing_class` ({type(processor).__name__}) has no chat template, so conversations cannot be "
            "written as its target reads them. "
            "Set `processor.chat_template`, usually to that of the instruction-tuned target."
        )
    keeps_no_content = _keeps_no_content(tokenizer)
    # Templates that take both forms write a text-only target's messages (tool results, say) as their strings.
    for is_content_parts in (False, True) if tokenizer is processor else (True, False):
        chat_format = ChatFormat(template, dict(tokenizer.special_tokens_map), is_content_parts, keeps_no_content)
        try:
            text = chat_format.render(probe_messages())
        except (TypeError, ValueError, KeyError, AttributeError):
            continue  # a template for strings, given parts: the other form is tried next
        if "Ping?" in text and "Pong!" in text and "'type'" not in text:
            return chat_format
    raise ValueError(
        f"The chat template of `processing_class` ({type(processor).__name__}) does not write the text of a user and "
        f"an assistant message, neither as parts nor as strings: {template[:200]!r}"
    )


def probe_messages() -> Messages:
    """The shortest conversation there is."""
    words = (("user", "Ping?"), ("assistant", "Pong!"))
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in words]


def _keeps_no_content(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this version of transformers shows templates a content of `None`."""
    template = "{{ 'kept' if 'content' in messages[0] else 'left out' }}"
    messages: list[Any] = [{"role": "assistant", "content": None}]
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False) == "kept"


def _without_no_content(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "content" or value is not None}


def _shared_length(text: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    pairs = zip(text, other, strict=False)
    return next((place for place, (one, two) in enumerate(pairs) if one != two), min(len(text), len(other)))


def _with_plain_text(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with a string for its parts; an answer that only calls tools has none."""
    if message.get("content") is None:
        return message
    return {**message, "content": "\n".join(part["text"] for part in message["content"] if part["type"] == "text")}
