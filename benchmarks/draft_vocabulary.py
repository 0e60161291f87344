"""What a draft level pays for the target's head: all of its rows, and those of a reduced draft vocabulary.

    python benchmarks/draft_vocabulary.py --output benchmarks/results/draft_vocabulary.json

By default the head of Gemma3-12B (262,208 x 3,840) with 32,768 tokens that may be drafted, for one level of a tree (4
beams). A head's time is that of logits, the likeliest tokens and their log-probabilities, as drafting computes them.
Beside it stand the drafter's own three blocks on the same 4 tokens, and the copy of the rows that every `generate()`
begins with. Weights are random, which changes no time. Parts are timed in turns, and medians are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from platforms import describe_platform
from torch import Tensor, nn

from dream_hf import DreamConfig, DreamDrafter
from dream_hf.benchmark.measure import synchronize
from dream_hf.targets.reduced_head import reduced_head


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "settings": vars(options) | {"output": None},
        "platform": describe_platform(options.device),
    }
    for name in options.dtypes:
        result[name] = measure(getattr(torch, name), options)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n")


@torch.no_grad()
def measure(dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each part in one dtype, and what the rows take."""
    head = random_head(dtype, options)
    drafter = random_drafter(dtype, options)
    reduced = reduced_head(head, drafter.draft_token_ids, drafter)
    hidden = torch.randn(1, options.beams, options.width, device=options.device, dtype=dtype)
    ids = drafter.draft_token_ids

    def whole_level() -> Any:
        return likeliest(head(hidden), options.beams)

    def reduced_level() -> Any:
        scores, tokens = likeliest(reduced(hidden), options.beams)
        return scores, ids[tokens]

    parts = {
        "head": whole_level,
        "reduced_head": reduced_level,
        "drafter_blocks": lambda: drafter(hidden, hidden[:, :-1]),
        "taking_rows": lambda: reduced_head(head, drafter.draft_token_ids, drafter),
    }
    milliseconds = time_in_turns(parts, options)
    level = milliseconds["head"] + milliseconds["drafter_blocks"]
    reduced_level_time = milliseconds["reduced_head"] + milliseconds["drafter_blocks"]
    return {
        "milliseconds": milliseconds,
        "head_ratio": milliseconds["head"] / milliseconds["reduced_head"],
        "level_ratio": level / reduced_level_time,
        "head_megabytes": head.weight.nbytes / 1e6,
        "rows_megabytes": options.rows * options.width * head.weight.itemsize / 1e6,
    }


def likeliest(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities and places of the likeliest tokens: (1, n, V) -> (1, n, k) each."""
    logits = logits.float()
    scores, tokens = logits.topk(top_k, dim=-1)
    return scores - logits.logsumexp(-1, keepdim=True), tokens


def random_head(dtype: torch.dtype, options: argparse.Namespace) -> nn.Linear:
    with torch.device("meta"):
        head = nn.Linear(options.width, options.vocab_size, bias=False, dtype=dtype).requires_grad_(False)
    return fill(head.to_empty(device=options.device))


def random_drafter(dtype: torch.dtype, options: argparse.Namespace) -> Any:
    config = DreamConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.width,
        intermediate_size=options.mlp_width,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_value_heads,
        head_dim=options.head_dim,
    )
    with torch.device("meta"):
        drafter: Any = DreamDrafter(config).to(dtype)
    drafter = fill(drafter.to_empty(device=options.device))
    drafter.set_draft_vocabulary(torch.randperm(options.vocab_size)[: options.rows])
    return drafter.eval()


def fill(module: Any) -> Any:
    """Give a module random weights; a short row of random numbers, repeated, takes no time to make."""
    for tensor in (*module.parameters(), *module.buffers()):
        numbers = (torch.rand(min(tensor.numel(), 65_521), device=tensor.device) - 0.5) / 32.0
        tensor.copy_(numbers.repeat(-(-tensor.numel() // len(numbers)))[: tensor.numel()].view(tensor.shape))
    return module


def time_in_turns(parts: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each part; turns alternate, so that all meet the same disturbances."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(options.repeats + 2):
        for name, part in parts.items():
            synchronize(torch.device(options.device))
            start = time.perf_counter()
            part()
            synchronize(torch.device(options.device))
            if turn > 1:  # the first turns warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: round(1000 * statistics.median(values), 4) for name, values in seconds.items()}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", help="file to write the result to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--vocab_size", type=int, default=262_208)
    parser.add_argument("--rows", type=int, default=32_768, help="tokens that may be drafted")
    parser.add_argument("--width", type=int, default=3840)
    parser.add_argument("--mlp_width", type=int, default=15_360)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key_value_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=256)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args()


if __name__ == "__main__":
    main()
