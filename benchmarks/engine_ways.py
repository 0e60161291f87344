"""The ways of decoding that are compared, each run and timed: plainly and with trees, eager and compiled."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from engine_planting import PLANTING, PlantingDrafter
from torch import Tensor
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList

from dream_hf.benchmark.clocks import clocked
from dream_hf.benchmark.measure import peak_memory, synchronize
from dream_hf.decoding.drafter import Drafter
from dream_hf.runtime.compilation import Settings as Compiler
from dream_hf.runtime.compilation import compiled_function, missing_compiler, run_model, uncompilable
from dream_hf.runtime.phases import DRAFTER, GROWTH, STEP, TARGET

NUM_SKIPPED = 3  # forwards before the clock starts: graphs are recorded, and buffers made, in the first ones

# Where a step's time goes, by its own phases. Reading on and growing a tree are both the drafter's.
PARTS = {TARGET: "target", GROWTH: "drafter", DRAFTER: "drafter", PLANTING: "planting"}


@dataclass(frozen=True)
class Run:
    """
    One `generate()` call.

    Args:
        sequences (`torch.LongTensor` of shape `(B, length)`): What came out.
        start_seconds (`float`): For the prompt and the first `NUM_SKIPPED` forwards after it.
        decode_seconds (`float`): From there to the end.
        num_forwards (`int`): Forwards of the target in `decode_seconds`.
        peak_bytes (`int`, *optional*): Most memory in use meanwhile, None where the system does not tell.
        gains (`torch.LongTensor` of shape `(B, steps)`, *optional*): Tokens gained by each verification.
    """

    sequences: Tensor
    start_seconds: float
    decode_seconds: float
    num_forwards: int
    peak_bytes: int | None
    gains: Tensor | None = None

    @property
    def forward_seconds(self) -> float:
        return self.decode_seconds / self.num_forwards


class StartClock(LogitsProcessor):
    """Notes when the prompt and the first `NUM_SKIPPED` tokens have been through the target, and changes nothing."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.started_at = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.num_calls == NUM_SKIPPED:
            synchronize(scores.device)
            self.started_at = time.perf_counter()
        self.num_calls += 1
        return scores


def run_plain(target: Any, prompt: Tensor, num_tokens: int, is_compiled: bool = False) -> Run:
    """Plain greedy `generate()` of `1 + num_tokens` tokens; compiled, with transformers' static cache."""
    clock = StartClock()
    arguments: dict[str, Any] = {}
    if is_compiled:
        arguments = {"cache_implementation": "static", "compile_config": _compile_config(target.device)}
    with peak_memory(target.device) as peak:
        synchronize(target.device)
        start = time.perf_counter()
        sequences = target.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=1 + num_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([clock]),
            **arguments,
        )
        synchronize(target.device)
        end = time.perf_counter()
    return Run(
        sequences=sequences,
        start_seconds=clock.started_at - start,
        decode_seconds=end - clock.started_at,
        num_forwards=clock.num_calls - 1 - NUM_SKIPPED,
        peak_bytes=peak[0] if peak else None,
    )


def run_dream(target: Any, drafter: Drafter, texts: Tensor, prompt_length: int, plan: Tensor, **options: Any) -> Run:
    """Generate `texts` (B, length) anew with drafted trees, accepted as in `plan` (B, steps).

    `options` are further arguments of `generate()`.
    """
    prompt = texts[:, :prompt_length]
    planting = PlantingDrafter(drafter, texts, prompt_length, plan, NUM_SKIPPED)
    with peak_memory(target.device) as peak:
        synchronize(target.device)
        start = time.perf_counter()
        output = target.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=texts.shape[1] - prompt_length,
            do_sample=False,
            assistant_model=planting,
            return_dict_in_generate=True,
            **options,
        )
        synchronize(target.device)
        end = time.perf_counter()
    return Run(
        sequences=output.sequences,
        start_seconds=planting.started_at - start,
        decode_seconds=end - planting.started_at,
        num_forwards=planting.num_steps - NUM_SKIPPED,
        peak_bytes=peak[0] if peak else None,
        gains=output.accepted_lengths,
    )


def split_step(target: Any, drafter: Drafter, texts: Tensor, prompt_length: int, plan: Tensor) -> dict[str, float]:
    """Shares of a step: the target, drafting, planting (which only this benchmark does) and the rest.

    The device is waited for at every border.
    """
    with clocked(target, drafter) as clock:
        run_dream(target, drafter, texts, prompt_length, plan)
    seconds = dict.fromkeys(("target", "drafter", "rest", "planting"), 0.0)
    for path, spent in clock.seconds.items():
        if path[0] == STEP:
            seconds[next((PARTS[name] for name in path if name in PARTS), "rest")] += spent
    total = sum(seconds.values())
    return {part: spent / total for part, spent in seconds.items()}


def why_not_compiled(target: Any) -> str | None:
    """Why decoding with trees runs uncompiled although the switch is on, or None where it is compiled."""
    reason = missing_compiler(Compiler(), target.device) or uncompilable(target)
    if reason is None and compiled_function(target, run_model, Compiler()).is_broken:
        return "the compiler failed"
    return reason


def _compile_config(device: torch.device) -> CompileConfig:
    """transformers' own settings; on a CPU, where it does not compile by itself, the same compiler without graphs."""
    if device.type != "cpu":
        return CompileConfig()
    config = CompileConfig(mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]
    return config
