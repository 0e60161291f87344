"""Items of a dataset -> padded batches, whatever is wrong with some of them."""

from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .chat import probe_messages
from .conversations import Conversation, count_image_parts
from .dataset import Item
from .encoding import ConversationEncoder, EncodedRows, RenderedRow


@dataclass(frozen=True)
class Candidate:
    """A row on its way into a batch."""

    item: Item
    row: RenderedRow

    def report(self, cause: str) -> None:
        """Record that the row is left out."""
        self.item.bad_rows.report(self.item.index, cause)


class ConversationCollator:
    """
    Turn items of a [`ConversationDataset`] into a batch: the processor's tensors, right-padded, and `answer_mask`.

    `answer_mask[b, t]` says that token t of row b is part of an answer (its end-of-turn token included), so it is what
    the prediction at t - 1 is judged by. Rows that cannot be used are reported to their dataset and left out; a batch
    with none left is one short conversation without answer tokens, so that every process still takes part in the step.

    Args:
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): The target's own, with its chat template.
        max_length (`int`, *optional*):
            Longest row in tokens. A longer one loses the end of its last answer; where nothing would be left of that
            answer, the row loses its last question, images and answer instead, and a row of one turn is reported. No
            image is ever cut, because images stand in questions.

    Raises:
        ValueError: No chat template, no padding token, or a tokenizer without character offsets.
    """

    def __init__(self, processor: ProcessorMixin | PreTrainedTokenizerBase, *, max_length: int | None = None) -> None:
        self.encoder = ConversationEncoder(processor)
        self.max_length = max_length

    def __call__(self, items: list[Item]) -> dict[str, Tensor]:
        """The batch of `items`."""
        encoded = self._encode_usable([row for item in items if (row := self._render(item)) is not None])
        if encoded is None:
            encoded = self.encoder.encode([self.encoder.render(Conversation(probe_messages(), []))])
            encoded.answer_mask.zero_()
        return {**encoded.inputs, "answer_mask": encoded.answer_mask}

    def _render(self, item: Item) -> Candidate | None:
        """`item` as text, or `None` after a report; an item without a conversation is reported already."""
        if item.conversation is None:
            return None
        # Templates raise whatever they like (jinja errors, their own `raise_exception`).
        try:
            return Candidate(item, self.encoder.render(_through_answer(item.conversation, -1)))
        except Exception as error:
            item.bad_rows.report(item.index, f"{type(error).__name__}: {error}")
            return None

    def _encode_usable(self, candidates: list[Candidate]) -> EncodedRows | None:
        """Encode `candidates`, dropping and shortening until the rest can be processed and fits."""
        while candidates:
            # Processors report a bad picture or a stray placeholder with many exception types.
            try:
                encoded = self.encoder.encode([candidate.row for candidate in candidates])
            except Exception as error:
                candidates = self._without_failing(candidates, error)
                continue
            fitting = [self._fit(candidate, encoded, place) for place, candidate in enumerate(candidates)]
            if fitting == candidates:
                return self._cut(encoded)
            candidates = [candidate for candidate in fitting if candidate is not None]
        return None

    def _without_failing(self, candidates: list[Candidate], error: Exception) -> list[Candidate]:
        """Those that can be processed on their own; where all can, the fault is the batch's: raise `error`."""
        usable = []
        for candidate in candidates:
            try:
                self.encoder.encode([candidate.row])
                usable.append(candidate)
            except Exception as cause:
                candidate.report(f"{type(cause).__name__}: {cause}")
        if len(usable) == len(candidates):
            raise error
        return usable

    def _fit(self, candidate: Candidate, encoded: EncodedRows, place: int) -> Candidate | None:
        """`candidate` itself where some of its last answer lies within the limit, else what is left of it."""
        mask, length = encoded.answer_mask[place], int(encoded.lengths[place])
        if not mask.any():
            candidate.report("its answers have no tokens of their own")
            return None
        is_start = mask.clone()
        is_start[1:] &= ~mask[:-1]
        if self.max_length is None or length <= self.max_length or is_start.nonzero()[-1] < self.max_length:
            return candidate
        row = candidate.row
        if len(row.answer_spans) < 2:
            candidate.report(f"it has {length} tokens and `max_length` ({self.max_length}) falls before its answer")
            return None
        shorter = _through_answer(Conversation(row.messages, row.images, row.tools), -2)
        return Candidate(candidate.item, self.encoder.render(shorter))

    def _cut(self, encoded: EncodedRows) -> EncodedRows:
        """Take away tokens beyond `max_length`: with padding on the right, a slice of every per-token tensor."""
        if self.max_length is None or int(encoded.lengths.max()) <= self.max_length:
            return encoded
        shape, kept = encoded.inputs["input_ids"].shape, slice(0, self.max_length)
        inputs = {key: value[:, kept] if value.shape == shape else value for key, value in encoded.inputs.items()}
        return EncodedRows(inputs, encoded.answer_mask[:, kept], encoded.lengths.clamp(max=self.max_length))


def _through_answer(conversation: Conversation, answer: int) -> Conversation:
    """The conversation up to and with one of its answers (-1 the last), and the images it then has."""
    messages = conversation.messages
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("the row has no answer: no assistant message")
    messages = messages[: turns[answer] + 1]
    return replace(conversation, messages=messages, images=conversation.images[: count_image_parts(messages)])
