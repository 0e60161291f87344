"""How a step's time grows with the context, and memory with the generated text, against plain decoding.

    python benchmarks/context_growth.py --output context_growth.json
    python benchmarks/context_growth.py --shape llava-1.6-7b --device cuda --dtype bfloat16 --compiled

Time: a step's, behind prompts of 500 to 8,000 tokens. Memory: bytes of all tensors that are alive before a step, as the text
gets longer. They are sorted into the target's cache, the drafter's cache and everything else; the caches grow with the
text, and nothing else should.

Weights are random and acceptance is simulated, as in engine.py.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from engine_planting import make_plan
from engine_report import aligned, describe_source
from engine_rows import parse_tree
from engine_shapes import SHAPES, Shape, make_drafter, make_prompt, make_target
from engine_ways import Run, run_dream, run_plain
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache

from dream_hf import DreamDrafter
from dream_hf.compat import CACHE
from dream_hf.decoding.drafter import DrafterAround, DraftSession, Prefill, Verified
from dream_hf.decoding.settings import DraftSettings
from dream_hf.decoding.tree import DraftTree

TAU = 3.0
SMALL = Shape(
    "small",
    hf.LlamaForCausalLM,
    lambda: hf.LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=8192,
        max_position_embeddings=16384,
    ),
)
Figures = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> Figures:
    options = parse_options(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    shape = SMALL if options.shape == SMALL.name else SHAPES[options.shape]
    target = make_target(shape, device, dtype)
    drafter = make_drafter(target, *options.tree)
    with tqdm(total=len(options.contexts) + 1, unit="part") as progress:
        times = []
        for context in options.contexts:
            progress.set_description(f"context {context}")
            times.append(measure_time(target, drafter, context, options))
            progress.update()
        progress.set_description(f"{options.generated} generated tokens")
        memory = measure_memory(target, drafter, options)
        progress.update()
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "device")}
    result = {
        "note": "simulated acceptance",
        **describe_source(device),
        "settings": settings,
        "time": times,
        "memory": memory,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(time_table(times), memory_table(memory), sep="\n\n")
    return result


def measure_time(target: Any, drafter: DreamDrafter, context: int, options: argparse.Namespace) -> Figures:
    """Milliseconds per step behind a prompt of `context` tokens: plain, with trees, and their ratio."""
    num_tokens = round(TAU * options.steps)
    prompt = make_prompt(target, context, options.batch)
    plan = make_plan(TAU, drafter.config.tree_depth, num_tokens, options.batch)
    plain = fastest(lambda: run_plain(target, prompt, num_tokens, options.compiled), options.repeats)
    drafting = drafter.with_settings(compile=options.compiled)
    dream = fastest(lambda: run_dream(target, drafting, plain.sequences, context, plan), options.repeats)
    is_as_planned = dream.gains is not None and torch.equal(dream.gains.cpu(), plan + 1)
    figures: Figures = {
        "context": context,
        "plain_ms": 1e3 * plain.forward_seconds,
        "step_ms": 1e3 * dream.forward_seconds,
        "step_ratio": dream.forward_seconds / plain.forward_seconds,
        "is_as_planned": is_as_planned,
    }
    if target.device.type == "cuda":  # elsewhere peaks are those of the process, too coarse to compare
        assert plain.peak_bytes is not None and dream.peak_bytes is not None
        figures["peak_bytes_above_plain"] = dream.peak_bytes - plain.peak_bytes
    return figures


def fastest(measure: Callable[[], Run], repeats: int) -> Run:
    """The fastest of some runs; one before them warms up."""
    measure()
    return min((measure() for _ in range(repeats)), key=lambda run: run.decode_seconds)


def measure_memory(target: Any, drafter: DreamDrafter, options: argparse.Namespace) -> Figures:
    """Bytes alive before the steps of one long generation, and what each generated token adds."""
    context, num_tokens = options.contexts[0], options.generated
    prompt = make_prompt(target, context, options.batch)
    texts = run_plain(target, prompt, num_tokens).sequences
    plan = make_plan(TAU, drafter.config.tree_depth, num_tokens, options.batch)
    gc.collect()  # what earlier measurements left in cycles
    before = live_bytes()
    cache = DynamicCache(config=target.config)
    sampling = SamplingDrafter(drafter, cache, max(plan.shape[1] // options.samples, 1))
    run_dream(target, sampling, texts, context, plan, **{CACHE: cache})
    samples = sampling.samples
    for sample in samples:
        sample["other_bytes"] = (
            sample.pop("live_bytes") - before - sample["target_cache_bytes"] - sample["drafter_cache_bytes"]
        )
    first, last = samples[min(1, len(samples) - 1)], samples[-1]  # by the second one, what is made once has been made
    num_between = last["generated"] - first["generated"]
    return {
        "context": context,
        "drafter_weight_bytes": sum(weight.numel() * weight.element_size() for weight in drafter.parameters()),
        "plain_cache_bytes_per_token": plain_cache_bytes(target, options.batch),
        "tree_slots": drafter.config.tree_size + 1,
        "samples": samples,
        "other_bytes_per_generated_token": (last["other_bytes"] - first["other_bytes"]) / max(num_between, 1),
    }


class SamplingDrafter(DrafterAround):
    """Notes what is alive before every so many drafts of one call of `generate()`.

    Args:
        drafter (`DreamDrafter`): Drafts.
        target_cache (`Cache`): The target's in that call.
        every (`int`): Drafts from one sample to the next.
    """

    def __init__(self, drafter: DreamDrafter, target_cache: Cache, every: int):
        super().__init__(drafter)
        self.target_cache, self.every = target_cache, every
        self.samples: list[Figures] = []

    def start(self, prefill: Prefill, settings: DraftSettings) -> DraftSession:
        return _SamplingSession(self, super().start(prefill, settings))


class _SamplingSession(DraftSession):
    """A session of a [`SamplingDrafter`], around a drafter's own."""

    def __init__(self, sampling: SamplingDrafter, inner: Any):
        self.sampling, self.inner = sampling, inner
        self.num_drafts = 0
        self.generated: list[int] = []  # by row, but for the first token

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        if self.num_drafts % self.sampling.every == 0:
            self.inner.levels()  # reads what the last step gained, which waits outside the cache until then
            self.sampling.samples.append(
                {
                    "generated": 1 + max(self.generated, default=0),
                    "live_bytes": live_bytes(),
                    "target_cache_bytes": buffer_bytes(self.sampling.target_cache),
                    "drafter_cache_bytes": buffer_bytes(self.inner.state.cache),
                }
            )
        self.num_drafts += 1
        return self.inner.draft(root_tokens, max_depth)

    def read(self, verified: Verified) -> None:
        self.generated = [sum(pair) for pair in zip_longest(self.generated, verified.counts, fillvalue=0)]
        self.inner.read(verified)


def live_bytes() -> int:
    """Bytes of all tensors that Python holds, each storage once; tensors without memory of their own are of other types."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    held = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def buffer_bytes(cache: Any) -> int:
    """Bytes of a cache's buffers, spare room included."""
    buffers = [buffer for layer in cache.layers for buffer in (layer.keys, layer.values) if buffer is not None]
    return sum({buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in buffers}.values())


def plain_cache_bytes(target: Any, batch: int) -> int:
    """What one more token adds to a plain cache, sliding windows aside."""
    cache = DynamicCache(config=target.config)
    target(input_ids=make_prompt(target, 1, batch), **{CACHE: cache})
    return buffer_bytes(cache)


def time_table(times: Sequence[Figures]) -> str:
    """Steps by context; growth is against the first line."""
    first = times[0]
    head = ["context", "plain ms", "growth", "tree step ms", "growth", "x plain step", "acceptance"]
    lines = [
        [
            str(row["context"]),
            f"{row['plain_ms']:.2f}",
            f"{row['plain_ms'] / first['plain_ms']:.2f}",
            f"{row['step_ms']:.2f}",
            f"{row['step_ms'] / first['step_ms']:.2f}",
            f"{row['step_ratio']:.2f}",
            "as planned" if row["is_as_planned"] else "NOT as planned",
        ]
        for row in times
    ]
    return "\n".join(aligned([head, *lines]))


def memory_table(memory: Figures) -> str:
    """Bytes alive by generated tokens."""
    columns = ("target_cache_bytes", "drafter_cache_bytes", "other_bytes")
    head = ["generated", "target cache MB", "drafter cache MB", "other MB"]
    lines = [[str(row["generated"]), *(f"{row[name] / 1e6:.3f}" for name in columns)] for row in memory["samples"]]
    return "\n".join(
        (
            *aligned([head, *lines]),
            "",
            f"A token of plain decoding adds {memory['plain_cache_bytes_per_token']:,} bytes to its cache.",
            f"Other than the caches, a generated token adds {memory['other_bytes_per_generated_token']:,.1f} bytes.",
        )
    )


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default=SMALL.name, choices=[SMALL.name, *SHAPES])
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=[500, 1000, 2000, 4000, 8000], help="prompt lengths"
    )
    parser.add_argument("--generated", type=int, default=1000, help="tokens whose memory is watched")
    parser.add_argument("--samples", type=int, default=8, help="times at which it is looked at")
    parser.add_argument("--tree", type=parse_tree, default=(6, 4, 32), help="depth/top_k/size (6/4/32)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="steps at each context")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, of which the fastest counts")
    parser.add_argument("--compiled", action="store_true", help="compile both ways of decoding")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
