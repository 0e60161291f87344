"""Plain and speculative decoding of one prompt, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from ..data.prompts import PromptEncoder
from .measure import Measurement, measure
from .methods import Method, drafted

WARMUP_TOKENS = 8


@dataclass(frozen=True)
class Comparison:
    """
    What both did, run by run.

    Args:
        plain (`list[Measurement]`): Runs of plain decoding.
        dream (`list[Measurement]`): Runs with the drafter, each right after a plain one.
        pieces (`list[str]`): The answer cut into what came at once: the first token, then each accepted path.
    """

    plain: list[Measurement]
    dream: list[Measurement]
    pieces: list[str]

    def report(self) -> dict[str, Any]:
        """The figures by name, as `dream-hf demo --json` prints them."""
        gains, num_tokens = self.dream[0].gains, self.dream[0].num_tokens
        plain_seconds = median(run.seconds for run in self.plain)
        dream_seconds = median(run.seconds for run in self.dream)
        return {
            "identical": all(run.tokens == self.plain[0].tokens for run in [*self.plain, *self.dream]),
            "speedup": plain_seconds / dream_seconds,
            "tau": sum(gains) / len(gains) if gains else None,
            "plain_seconds": plain_seconds,
            "dream_seconds": dream_seconds,
            "plain_tokens_per_second": self.plain[0].num_tokens / plain_seconds,
            "dream_tokens_per_second": num_tokens / dream_seconds,
            "accepted_lengths": gains,
            "num_tokens": num_tokens,
            "repeats": len(self.plain),
            "text": "".join(self.pieces).strip(),
        }


def encode(processor: Any, prompt: str, image: Any = None) -> Any:
    """One question, about one picture if there is one, as inputs of `generate()`."""
    images = [] if image is None else [image]
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    return PromptEncoder(processor).encode([([{"role": "user", "content": content}], images)])


def compare(
    target: Any,
    drafter: Any,
    processor: Any,
    inputs: Any,
    max_new_tokens: int,
    repeats: int,
    streams: tuple[Any, Any] = (None, None),
    pulse: Any = None,
) -> Comparison:
    """Decode greedily with and without the drafter.

    Args:
        target, drafter, processor: The models.
        inputs: From [`encode`].
        max_new_tokens (`int`): Longest answer.
        repeats (`int`): Timed runs of each, one after the other in turns.
        streams (`tuple`): Streamers of one further run of each, before the timed ones.
        pulse (`BaseStreamer`, *optional*): Streamer of the timed runs; what it raises ends them.
    """
    methods = [Method("plain"), Method("drafted", drafted(drafter))]
    for method in methods:
        measure(target, inputs, method.ready(0.0, WARMUP_TOKENS))
    runs: list[list[Measurement]] = [[], []]
    for turn in range(-1 if any(streams) else 0, repeats):
        for method, stream, own in zip(methods, streams, runs, strict=True):
            run = measure(target, inputs, method.ready(0.0, max_new_tokens), stream if turn < 0 else pulse)
            if turn >= 0:
                own.append(run)
    plain, dream = runs
    return Comparison(plain, dream, split_by_step(PromptEncoder(processor), dream[0]))


def split_by_step(encoder: PromptEncoder, run: Measurement) -> list[str]:
    """The text of an answer by the step that its tokens came in."""
    ends = [1]
    for gain in run.gains:
        ends.append(ends[-1] + gain)
    tokenizer: Any = encoder.tokenizer
    texts = [tokenizer.decode(run.tokens[:end], skip_special_tokens=True) for end in ends]
    starts = [0, *(len(text) for text in texts)]
    return [text[start:] for text, start in zip(texts, starts, strict=False)]
