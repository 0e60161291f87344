"""What retrieval would have gained on answers that some model has written: no model is needed.

    python benchmarks/replay.py ANSWERS.jsonl --tokenizer TOKENIZER --json

ANSWERS has one conversation a line, {"turns": [{"question": ..., "answer": ...}, ...]}. Each answer is written again token by
token as the file has it; drafts are made from the text so far alone (`own`), or with all earlier answers of the file in a store
(`store`). The first token of an answer comes with the prompt, as in `generate()`, and its end is a token. Of the prompt only
the question is there, and what the target found likely is not known, so that real gains are higher.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dream_hf.decoding.settings import DraftSettings
from dream_hf.drafters.best_first import Nodes
from dream_hf.drafters.retrieval.drafter import DEFAULTS
from dream_hf.drafters.retrieval.mixture import Mixture
from dream_hf.drafters.retrieval.store import RetrievalStore
from dream_hf.drafters.retrieval.text import GrowingText, Limits

Encode = Callable[[str], list[int]]


@dataclass
class Turn:
    """A question, what stands for the template behind it, and an answer with its end."""

    question: list[int]
    answer: list[int]


@dataclass
class Counts:
    """What the steps of a replay came to."""

    num_steps: int = 0
    num_tokens: int = 0
    num_nodes: int = 0
    seconds: float = 0.0

    def summary(self) -> dict[str, float]:
        """Means over all steps."""
        steps = max(self.num_steps, 1)
        return {
            "tokens_per_step": round(self.num_tokens / steps, 4),
            "nodes_per_step": round(self.num_nodes / steps, 2),
            "draft_microseconds": round(1e6 * self.seconds / steps, 1),
            "steps": self.num_steps,
        }


def replay(
    conversations: Iterable[Sequence[Turn]],
    limits: Limits,
    settings: DraftSettings,
    store: RetrievalStore | None = None,
) -> Counts:
    """Write all answers again, one conversation after the other; a store learns each when it is finished."""
    counts, mixture = Counts(), Mixture()
    for turns in conversations:
        text = GrowingText(mixture, limits, store)
        for turn in turns:
            text.read_prompt(turn.question)
            text.read(turn.answer[:1])
            _write(text, turn.answer, settings, counts)
            if store is not None:
                store.add(text.answer)
    return counts


def _write(text: GrowingText, answer: list[int], settings: DraftSettings, counts: Counts) -> None:
    """Write all of an answer but its first token."""
    place = 1
    while place < len(answer):
        start = time.thread_time()
        nodes = text.draft(settings, settings.tree_depth)
        counts.seconds += time.thread_time() - start
        gain = min(_num_accepted(nodes, answer[place:]) + 1, len(answer) - place)
        text.read(answer[place : place + gain])
        place += gain
        counts.num_steps += 1
        counts.num_tokens += gain
        counts.num_nodes += len(nodes.tokens)


def _num_accepted(nodes: Nodes, truth: Sequence[int]) -> int:
    """How many of the next tokens lie on a path from the root."""
    children = {edge: node for node, edge in enumerate(zip(nodes.parents, nodes.tokens, strict=True), 1)}
    node = accepted = 0
    for token in truth:
        if (node, token) not in children:
            break
        node = children[node, token]
        accepted += 1
    return accepted


def load_tokenizer(name: str) -> tuple[Encode, int]:
    """How to encode text, and the number of tokens: of a tokenizer's JSON file, or of a folder or model on the Hub.

    `bpe-openai:cl100k_base` is an encoding of the package `bpe-openai`.
    """
    if name.startswith("bpe-openai:"):
        import bpe_openai

        encoding: Any = bpe_openai.get_encoding(name.partition(":")[2])
        return encoding.encode, 300_000  # more than any of them has
    files = [file for file in (Path(name), Path(name, "tokenizer.json")) if file.is_file()]
    if files:
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(files[0]))
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, _num_ids(tokenizer)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], _num_ids(tokenizer)


def _num_ids(tokenizer: Any) -> int:
    """One more than the highest token id."""
    return max(tokenizer.get_vocab().values()) + 1


def read_conversations(path: Path, encode: Encode, end: int, boundary: int) -> list[list[Turn]]:
    """All conversations of a file, as tokens."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["turns"] for line in lines if line.strip()]
    return [
        [Turn([*encode(turn["question"]), boundary], [*encode(turn["answer"]), end]) for turn in turns]
        for turns in rows
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("answers", type=Path, metavar="ANSWERS.jsonl", help="conversations, one a line")
    parser.add_argument("--tokenizer", required=True, help="a tokenizer's JSON file, a folder, or a name on the Hub")
    parser.add_argument("--part", choices=("all", "even", "odd"), default="all", help="which lines, counted from 0")
    parser.add_argument("--depth", type=int, default=DEFAULTS.tree_depth)
    parser.add_argument("--size", type=int, default=DEFAULTS.tree_size, help="most nodes")
    parser.add_argument("--min-node-probability", type=float, default=DEFAULTS.tree_min_node_probability)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    encode, num_tokens = load_tokenizer(args.tokenizer)
    end, boundary = num_tokens, num_tokens + 1
    limits = Limits(num_tokens=num_tokens + 1, end_ids=frozenset([end]))
    settings = DEFAULTS.changed(
        tree_depth=args.depth, tree_size=args.size, tree_min_node_probability=args.min_node_probability
    )
    conversations = read_conversations(args.answers, encode, end, boundary)
    if args.part != "all":
        conversations = conversations[args.part == "odd" :: 2]
    results = {
        "own": replay(conversations, limits, settings).summary(),
        "store": replay(conversations, limits, settings, RetrievalStore()).summary(),
    }
    if args.json:
        print(json.dumps(results))
        return
    for name, result in results.items():
        print(f"{name:6}" + "".join(f"  {key.replace('_', ' ')} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
