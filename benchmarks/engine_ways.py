"""The ways of decoding that are compared, each run and timed: plainly and with trees, eager and compiled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import engine_planting
import torch
from torch import Tensor
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList

from dream_hf import DreamDrafter
from dream_hf.benchmark.measure import peak_memory, synchronize
from dream_hf.benchmark.phases import PhaseClock, find_function
from dream_hf.runtime.compilation import Settings as Compiler
from dream_hf.runtime.compilation import compiled_function, missing_compiler, run_model, uncompilable

NUM_SKIPPED = 3  # forwards before the clock starts: graphs are recorded, and buffers made, in the first ones

# Where a step's time goes. What runs inside another part counts for itself only.
PARTS = {
    "generation:_Decoding.step": "rest",
    "generation:_Decoding._forward": "target",
    "generation:grow_tree": "drafter",
    "drafting:DrafterState.read_on": "drafter",
}


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


def run_dream(target: Any, drafter: DreamDrafter, texts: Tensor, prompt_length: int, plan: Tensor) -> Run:
    """Generate `texts` (B, length) anew with drafted trees, accepted as in `plan` (B, steps)."""
    prompt = texts[:, :prompt_length]
    planting = engine_planting.Planting(texts, prompt_length, plan, drafter.config.tree_depth, NUM_SKIPPED)
    with peak_memory(target.device) as peak, planting.at_work():
        synchronize(target.device)
        start = time.perf_counter()
        output = target.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=texts.shape[1] - prompt_length,
            do_sample=False,
            assistant_model=drafter,
            return_dict_in_generate=True,
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


def split_step(
    target: Any, drafter: DreamDrafter, texts: Tensor, prompt_length: int, plan: Tensor
) -> dict[str, float]:
    """Shares of a step: the target, drafting, planting (which only this benchmark does) and the rest.

    The device is waited for at every border.
    """
    with _parts_clocked(target.device) as clock:
        run_dream(target, drafter, texts, prompt_length, plan)
    total = sum(clock.seconds.values())
    return {part: clock.seconds[part] / total for part in ("target", "drafter", "rest", "planting")}


@contextmanager
def compiled_decoding(drafter: DreamDrafter) -> Iterator[None]:
    """Switch compiled decoding on while in the block."""
    drafter.config.compile = True
    try:
        yield
    finally:
        drafter.config.compile = False


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


@contextmanager
def _parts_clocked(device: torch.device) -> Iterator[PhaseClock]:
    clock = PhaseClock(device)
    with ExitStack() as stack:
        functions = [(*find_function(address), part) for address, part in PARTS.items()]
        for owner, name, part in [*functions, (engine_planting, "plant", "planting")]:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, clock.timed(getattr(owner, name), part))
        yield clock
