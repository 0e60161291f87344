"""What a training step costs over the target's plain forward, in time and in memory.

    python benchmarks/training_cost.py --output benchmarks/results/training_cost.json

Time: features, loss and backward of one step, against the target's plain forward (logits of one position) plus the
drafter's own forward and backward, all on the same batch; the parts are timed in turns and their medians compared. Memory:
peak bytes held by tensors during the target's forward with and without entropy selection, weights included and not.
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
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dream_hf import DreamDrafter
from dream_hf.benchmark.measure import synchronize
from dream_hf.targets.target import Target
from dream_hf.training.objective import Objective
from dream_hf.training.target_features import FeatureExtractor, LayerSelection


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=8 * options.width // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        vocab_size=options.vocab_size,
        max_position_embeddings=options.tokens,
    )
    dtype = getattr(torch, options.dtype)
    target = LlamaForCausalLM(config).to(options.device, dtype).eval().requires_grad_(False)
    drafter = DreamDrafter.for_target(target).float().train()
    ids = torch.randint(3, options.vocab_size, (options.rows, options.tokens), device=options.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, -options.answer_tokens :] = True
    result = {"settings": vars(options) | {"output": None}, "platform": describe_platform(options.device)}
    result["time"] = measure_time(target, drafter, ids, mask, options)
    result["memory"] = measure_memory(target, ids, mask)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n")


def measure_time(target: Any, drafter: Any, ids: Tensor, mask: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step and of what it cannot do without."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    extractor = FeatureExtractor(Target(target), selection("token", target), 1.0)
    objective = Objective(rollout_steps=options.rollout_steps)
    batch = extractor.drafter_batch(inputs, mask)
    features = batch.text.features.float()
    embeds = batch.text.embeds.float()

    def plain_forward() -> None:
        with torch.no_grad():
            target(**inputs, logits_to_keep=1, use_cache=False)

    def drafter_alone() -> None:
        drafter.zero_grad()
        drafter(embeds, features[:, :-1]).last_hidden_state.sum().backward()

    def step() -> None:
        drafter.zero_grad()
        batch = extractor.drafter_batch(inputs, mask)
        objective(drafter, batch, batch.text.features.float(), extractor.target.logits).total.backward()

    seconds = time_in_turns({"plain_forward": plain_forward, "drafter": drafter_alone, "step": step}, options)
    ratio = (seconds["step"] - seconds["drafter"]) / seconds["plain_forward"]
    return {**seconds, "overhead_ratio": ratio, "limit": 1.6}


def time_in_turns(parts: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each part; turns alternate, so that all meet the same disturbances."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(options.repeats + 1):
        for name, part in parts.items():
            synchronize(torch.device(options.device))
            start = time.perf_counter()
            part()
            synchronize(torch.device(options.device))
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_memory(target: Any, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """Peak bytes of one forward: without a selection, and with selection by entropy."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    weights = sum(parameter.numel() * parameter.element_size() for parameter in target.parameters())
    peaks = {}
    for mode in ("none", "token", "sample"):
        extractor = FeatureExtractor(Target(target), selection(mode, target), 1.0)
        peaks[mode] = peak_bytes(lambda extractor=extractor: extractor.run(inputs, mask))
    return {
        "weights_bytes": weights,
        "forward_bytes": peaks["none"],
        "token_bytes": peaks["token"],
        "sample_bytes": peaks["sample"],
        "token_ratio_with_weights": (peaks["token"] + weights) / (peaks["none"] + weights),
        "token_ratio_activations_only": peaks["token"] / peaks["none"],
        "limit": 1.25,
    }


def selection(mode: str, target: Any) -> LayerSelection:
    return LayerSelection.make(mode, target.config.num_hidden_layers)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that tensors made by `run` held at once, when all is warm."""
    run()
    return allocated_bytes(run)


def allocated_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that tensors made by `run` held at once, from the profiler's record of every allocation."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", help="file to write the result to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", help="of the target")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--answer_tokens", type=int, default=512)
    parser.add_argument("--rollout_steps", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
