"""What a tree step costs on targets whose layers keep a state, beside a stock forward of as many tokens in a row.

    python benchmarks/recurrent_step.py
    python benchmarks/recurrent_step.py --kinds delta --nodes 9 33 65 --dtypes bfloat16

Random weights of a few layers, every second of which attends. A tree step is the forward over all nodes, noting what they
would do to the states, and keeping a path of four; the stock forward reads a chain of as many tokens, which moves the states.
`attention` is the same tree step on a target of the same width all of whose layers attend. All of a row run in turn, in one
process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers as hf
from transformers import DynamicCache

from dream_hf import PromptLookupDrafter
from dream_hf.benchmark.measure import synchronize
from dream_hf.compat import CACHE
from dream_hf.decoding.target_forward import TargetForward, make_target_forward
from dream_hf.decoding.tree import DraftTree
from dream_hf.targets.target import Target

BRANCHES, PROMPT, PATH = 4, 100, 4
DELTA, ATTENTION = "linear_attention", "full_attention"


def config_of(kind: str, width: int, num_layers: int) -> Any:
    """A text model of which every second layer attends, or all do."""
    text: dict[str, Any] = {
        "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": num_layers, "vocab_size": 1000,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 256, "head_dim": 64,
        "max_position_embeddings": 4096, "pad_token_id": 0,
    }  # fmt: skip
    mixed = [DELTA, ATTENTION] * (num_layers // 2)
    heads = width // 128
    if kind == "delta":
        linear = {"linear_num_key_heads": heads, "linear_num_value_heads": 2 * heads}
        return hf.Qwen3_5TextConfig(**text, **linear, layer_types=mixed)
    if kind == "convolution":
        kinds = ["conv" if each == DELTA else each for each in mixed]
        return hf.Lfm2Config(**text, layer_types=kinds, block_auto_adjust_ff_dim=False)
    if kind == "mamba2":
        mamba = {"mamba_n_heads": 2 * width // 64, "mamba_d_head": 64, "mamba_d_state": 128}
        places = [index for index, each in enumerate(mixed) if each == ATTENTION]
        return hf.BambaConfig(**text, **mamba, attn_layer_indices=places)
    return hf.Qwen3Config(**text)


KINDS = ("delta", "convolution", "mamba2", "attention")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    options = parse_options(arguments)
    rows = []
    for kind in options.kinds:
        for dtype in options.dtypes:
            with torch.device(options.device):
                config = config_of(kind, options.width, options.layers)
                target = hf.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
            for num_nodes in options.nodes:
                rows.append({"kind": kind, "dtype": dtype, **measure(target, num_nodes, options.repeats)})
                print(describe(rows[-1]))
    return rows


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['kind']:11s} {row['dtype']:8s} {row['nodes']:3d} nodes: tree {row['tree_ms']:7.1f} ms (keeping a path "
        f"{row['keep_ms']:.1f}), stock chain {row['chain_ms']:7.1f} ms, {row['ratio']:.2f} of it; one token "
        f"{row['token_ms']:.1f} ms; {row['kilobytes']:.0f} KB noted for a node and layer"
    )


@torch.no_grad()
def measure(target: Any, num_nodes: int, repeats: int) -> dict[str, Any]:
    """Medians, in milliseconds, of a tree step, of its end, of a chain and of a single token."""
    prompt = torch.randint(3, 900, (1, PROMPT), device=target.device)
    tokens = torch.randint(3, 900, (1, num_nodes), device=target.device)
    steps = torch.arange(num_nodes, device=target.device)
    tree = DraftTree.from_parents(tokens, (steps - BRANCHES).clamp(min=0)[None], -(-num_nodes // BRANCHES))
    path = torch.arange(0, PATH * BRANCHES, BRANCHES, device=target.device)[None]
    view = Target(target)
    with view.recording((), False) as record, view.taking_trees():
        forward = make_target_forward(view, PromptLookupDrafter(), None, 1, record)
        seconds: dict[str, list[float]] = {"tree": [], "keep": [], "chain": [], "token": []}
        for _ in range(repeats + 1):
            cache = read(target, prompt)
            forward.begin(cache, {"position_ids": torch.arange(PROMPT, device=target.device)[None]}, None)
            with forward.using(cache, True):
                seconds["tree"].append(clock(target, lambda: forward(tree)))
                kilobytes = noted_bytes(forward) / num_nodes / 1e3
                seconds["keep"].append(clock(target, lambda: forward.commit(path, [PATH])))
            for name, ids in (("chain", tokens), ("token", tokens[:, :1])):
                cache = read(target, prompt)
                places = {"position_ids": PROMPT + steps[None, : ids.shape[1]], CACHE: cache}
                seconds[name].append(clock(target, lambda: target(ids, **places)))  # noqa: B023 (called at once)
    figures = {
        f"{name}_ms": 1e3 * statistics.median(times[1:]) for name, times in seconds.items()
    }  # the first warms up
    whole = figures["tree_ms"] + figures["keep_ms"]
    return {
        "nodes": num_nodes,
        **figures,
        "tree_ms": whole,
        "ratio": whole / figures["chain_ms"],
        "kilobytes": kilobytes,
    }


def read(target: Any, prompt: torch.Tensor) -> DynamicCache:
    """A cache that holds the prompt."""
    cache = DynamicCache(config=target.config)
    target(prompt, **{CACHE: cache})
    return cache


def noted_bytes(forward: TargetForward) -> float:
    """Bytes that the layers with state have noted of a tree, on average."""
    sizes = []
    for layer in forward.states.layers:
        parts = [layer.new_inputs, *(part for _, record in layer.records for part in vars(record).values())]
        sizes.append(sum(part.untyped_storage().nbytes() for part in parts if part is not None))
    return sum(sizes) / max(len(sizes), 1)


def clock(target: Any, run: Callable[[], Any]) -> float:
    synchronize(target.device)
    start = time.perf_counter()
    run()
    synchronize(target.device)
    return time.perf_counter() - start


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND",
                        help=f"of layers, out of {', '.join(KINDS)} (all)")  # fmt: skip
    parser.add_argument("--nodes", nargs="+", type=int, default=[33], help="nodes of a tree, 16 at least (33)")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="(float32)")
    parser.add_argument("--layers", type=int, default=4, help="(4)")
    parser.add_argument("--width", type=int, default=1024, help="hidden size, a multiple of 256 (1024)")
    parser.add_argument("--repeats", type=int, default=15, help="runs of each, of which the median counts (15)")
    parser.add_argument("--device", default=default_device, help=f"({default_device})")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
