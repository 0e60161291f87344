"""What a forward over a tree saves by not repeating keys for the query heads that share them.

    python benchmarks/tree_attention.py
    python benchmarks/tree_attention.py --slots 8192 --dtypes bfloat16 --attention sdpa

Random weights of a Llama of few layers, 32 heads of queries and 8 of keys; a tree of 33 nodes behind as many verified tokens as
there are slots. Both ways run in turn, in one process; `difference` is the largest of any logit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from dream_hf.benchmark.measure import synchronize
from dream_hf.compat import CACHE
from dream_hf.runtime.kv_cache import slot_layers
from dream_hf.runtime.slots import Slots
from dream_hf.targets import grouped_attention
from dream_hf.targets.tree_masks import TreeScope, tree_masks_available, tree_scope

NUM_NODES, BRANCHES = 33, 4
HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_options(arguments)
    rows = [
        measure(slots, getattr(torch, dtype), attention, options)
        for slots in options.slots
        for dtype in options.dtypes
        for attention in options.attention
    ]
    for row in rows:
        print(
            f"{row['slots']:6d} slots, {row['dtype']:8s}, {row['attention']:5s}: repeated {row['repeated_ms']:7.1f} ms, "
            f"in groups {row['grouped_ms']:7.1f} ms, {row['speedup']:.2f} times as fast, difference {row['difference']:.1e}"
        )
    return rows


@torch.no_grad()
def measure(num_slots: int, dtype: torch.dtype, attention: str, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of both ways at one length."""
    target = make_target(dtype, attention, options)
    cache, slots = DynamicCache(config=target.config), Slots([num_slots])
    for layer in cache.layers:
        layer.update(*torch.randn(2, 1, KEY_HEADS, num_slots, HEAD_DIM, dtype=dtype, device=options.device))
    depths = torch.arange(NUM_NODES, device=options.device)[None] // BRANCHES
    ancestors = torch.ones(1, NUM_NODES, NUM_NODES, dtype=torch.bool, device=options.device).tril()
    scope = TreeScope(slots.tensor(depths.device), depths, ancestors)
    ids = torch.arange(NUM_NODES, device=options.device)[None]

    def forward() -> tuple[float, torch.Tensor]:
        synchronize(target.device)
        start = time.perf_counter()
        with tree_scope(scope):
            logits = target(ids, **{CACHE: cache}, position_ids=num_slots + depths).logits
        synchronize(target.device)
        slots.rollback()
        return time.perf_counter() - start, logits

    seconds: dict[str, list[float]] = {"grouped": [], "repeated": []}
    with slot_layers(cache, slots), tree_masks_available(target.model, target.config):
        for _ in range(options.repeats + 1):
            one, logits = forward()
            with patch.object(grouped_attention, "attend_in_groups", lambda attend: None):
                two, expected = forward()
            seconds["grouped"].append(one)
            seconds["repeated"].append(two)
    grouped, repeated = (1e3 * statistics.median(times[1:]) for times in seconds.values())  # the first warms up
    return {
        "slots": num_slots,
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
        "grouped_ms": grouped,
        "repeated_ms": repeated,
        "speedup": repeated / grouped,
        "difference": float((logits - expected).abs().max()),
    }


def make_target(dtype: torch.dtype, attention: str, options: argparse.Namespace) -> Any:
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=1000,
        max_position_embeddings=2**17,
        attn_implementation=attention,
    )
    with torch.device(options.device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--slots", nargs="+", type=int, default=[1024, 4096], help="verified tokens (1024 4096)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="(float32 bfloat16)")
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"], help="implementations (sdpa eager)")
    parser.add_argument("--layers", type=int, default=4, help="(4)")
    parser.add_argument("--width", type=int, default=1024, help="hidden size (1024)")
    parser.add_argument(
        "--repeats", type=int, default=10, help="timed forwards of each way, of which the median counts (10)"
    )
    parser.add_argument("--device", default=default_device, help=f"({default_device})")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
