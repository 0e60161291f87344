"""What the drafter adds to the memory of a long prompt, beside the target's own prefill.

    python benchmarks/prompt_memory.py --output prompt_memory.json

For each length: peak bytes of all tensors that are made while the target reads a prompt, while the drafter reads the same
prompt, while it reads as long a second turn, while visual tokens are ranked by novelty, and while three rollout steps are
trained on a text whose last half is answer. Weights and the inputs of each part are not counted. `growth` is how many times
more than at the length before, over how many times longer: 1 is linear.

Weights are random and the shape is small: what may not grow with the square of the text does not depend on the width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from engine_report import aligned, describe_source
from tqdm.auto import tqdm
from training_cost import allocated_bytes

from dream_hf import DreamDrafter
from dream_hf.drafters.dream.compression import DrafterText, compress_text, novelty
from dream_hf.drafters.dream.state import DrafterState
from dream_hf.training.rollout import roll_out
from dream_hf.training.target_features import DrafterBatch

Figures = dict[str, Any]
PARTS = ("target_prefill", "drafter_prompt", "drafter_second_turn", "novelty", "training")


def main(arguments: Sequence[str] | None = None) -> Figures:
    options = parse_options(arguments)
    torch.manual_seed(0)
    target = make_target(options)
    drafter = DreamDrafter.for_target(target)
    rows: list[Figures] = []
    for context in tqdm(options.contexts, unit="length"):
        rows.append(measure(target, drafter, context, context <= options.longest_training))
        add_growth(rows)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    result = {**describe_source(torch.device("cpu")), "settings": settings, "rows": rows}
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    return result


def make_target(options: argparse.Namespace) -> Any:
    """A small Llama whose heads share keys."""
    config = hf.LlamaConfig(
        hidden_size=options.width,
        intermediate_size=8 * options.width // 3,
        num_hidden_layers=2,
        num_attention_heads=options.width // 32,
        num_key_value_heads=options.width // 64,
        vocab_size=1024,
        max_position_embeddings=max(options.contexts) + 1,
    )
    return hf.LlamaForCausalLM(config).eval().requires_grad_(False)


def measure(target: Any, drafter: DreamDrafter, context: int, with_training: bool) -> Figures:
    """Peak bytes of each part."""
    ids = torch.randint(0, 1024, (1, context))
    embeds, features = torch.randn(2, 1, context, target.config.hidden_size).unbind()
    parts: dict[str, Callable[[], Any]] = {
        "target_prefill": lambda: target(input_ids=ids, use_cache=True, logits_to_keep=1),
        "drafter_prompt": lambda: read_prompt(drafter, embeds, features),
        "drafter_second_turn": lambda: read_second_turn(drafter, embeds, features),
        "novelty": lambda: novelty(features, torch.ones(1, context, dtype=torch.bool)),
    }
    with torch.no_grad():
        figures: Figures = {f"{name}_bytes": allocated_bytes(run) for name, run in parts.items()}
    if with_training:
        figures["training_bytes"] = allocated_bytes(lambda: train(drafter, embeds, features))
        drafter.zero_grad()
    ratio = figures["drafter_prompt_bytes"] / figures["target_prefill_bytes"]
    return {"context": context, **figures, "prompt_over_prefill": ratio, "limit": 2.0}


def read_prompt(drafter: DreamDrafter, embeds: torch.Tensor, features: torch.Tensor) -> DrafterState:
    """What follows the prefill of a text prompt: embeds and features (1, T, H) of it."""
    real = torch.ones(embeds.shape[:2], dtype=torch.bool)
    text = compress_text(embeds, features, real, ~real, 1.0, "attention")
    state = DrafterState(drafter, 1)
    state.read_prompt(text, embeds[:, :1], torch.tensor([[embeds.shape[1]]]))
    return state


def read_second_turn(drafter: DreamDrafter, embeds: torch.Tensor, features: torch.Tensor) -> DrafterState:
    """T more tokens behind a short text that has been read."""
    state = DrafterState(drafter, 1)
    state.read(embeds[:, :8], features[:, :7], torch.arange(8)[None], [8])
    state.read_on(embeds, features, [embeds.shape[1]])
    return state


def train(drafter: DreamDrafter, embeds: torch.Tensor, features: torch.Tensor) -> None:
    """Three rollout steps and their gradients, chains below every position of the last half."""
    order = torch.arange(embeds.shape[1])[None]
    text = DrafterText(embeds, features, order, order, torch.tensor([embeds.shape[1]]))
    predicts = (order >= embeds.shape[1] // 2) & (order < embeds.shape[1] - 1)
    steps = roll_out(drafter, DrafterBatch(text, order, predicts, None), features, 3)
    sum(step.hidden.square().sum() for step in steps).backward()  # type: ignore[union-attr]


def add_growth(rows: list[Figures]) -> None:
    """Note in the last row how its bytes have grown over how its length has."""
    if len(rows) < 2:
        return
    before, now = rows[-2:]
    times = now["context"] / before["context"]
    now["growth"] = {
        part: now[f"{part}_bytes"] / before[f"{part}_bytes"] / times for part in PARTS if f"{part}_bytes" in now
    }


def table(rows: Sequence[Figures]) -> str:
    """MB of each part, and its growth in brackets."""
    head = ["context", *(part.replace("_", " ") + " MB" for part in PARTS), "prompt / prefill"]
    lines = [
        [str(row["context"]), *(cell(row, part) for part in PARTS), f"{row['prompt_over_prefill']:.2f}"]
        for row in rows
    ]
    return "\n".join(aligned([head, *lines]))


def cell(row: Figures, part: str) -> str:
    if f"{part}_bytes" not in row:
        return "-"
    growth = f" ({row['growth'][part]:.2f})" if "growth" in row else ""
    return f"{row[f'{part}_bytes'] / 1e6:.1f}{growth}"


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 8192, 32768], help="prompt lengths")
    parser.add_argument("--longest_training", type=int, default=8192, help="longest text that is trained on")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
