"""Where the time of decoding goes: shares of target, drafter and the rest, and one step taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from ..data.prompts import PromptEncoder
from ..runtime.phases import ACCEPTANCE, CACHE_WORK, DRAFTER, GROWTH, MASK, PREFILL, STEP, TARGET
from .clocks import clocked, count_syncs
from .measure import measure
from .methods import Method
from .tasks import Prompt

REST = "rest"
PHASES = (TARGET, DRAFTER, GROWTH, ACCEPTANCE, CACHE_WORK, MASK, REST)


def time_shares(
    target: Any, encoder: PromptEncoder, method: Method, prompts: Sequence[Prompt], max_new_tokens: int
) -> dict[str, float]:
    """Shares of the greedy decoding time of `prompts`; of runs of their own, because clocking every forward costs time."""
    arguments = method.ready(0.0, max_new_tokens)
    total, spent = 0.0, {"target": 0.0, "drafter": 0.0}
    for prompt in prompts:
        inputs = encoder.encode([(prompt.messages, prompt.images)])
        with clocked(target, arguments.get("assistant_model")) as clock:
            total += measure(target, inputs, arguments).seconds
        for owner, seconds in clock.by_owner().items():
            spent[owner] += seconds
    shares = {owner: seconds / total for owner, seconds in spent.items()}
    return {**shares, "rest": 1.0 - sum(shares.values())}


def profile_steps(
    target: Any,
    encoder: PromptEncoder,
    method: Method,
    prompt: Prompt,
    max_new_tokens: int,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Split a method's decoding step, and write a `torch.profiler` trace that names the phases.

    Args:
        target (`PreTrainedModel`): The target.
        encoder (`PromptEncoder`): Writes its prompts.
        method (`Method`): A method with a drafter.
        prompt (`Prompt`): What to decode, greedily.
        max_new_tokens (`int`): How far.
        trace (`Path`, *optional*): File for the trace, in Chrome's format.

    Returns:
        `dict`: `milliseconds_per_step` and `share_of_step` by phase, `num_steps`, `prefill_milliseconds`, and
        `host_device_syncs`, `mean` and `most` of a step, which is None where host and device are one.
    """
    inputs, arguments = encoder.encode([(prompt.messages, prompt.images)]), method.ready(0.0, max_new_tokens)
    measure(target, inputs, arguments)
    with clocked(target, arguments["assistant_model"]) as clock:
        run = measure(target, inputs, arguments)
    syncs = count_syncs(lambda: measure(target, inputs, arguments)) if target.device.type == "cuda" else None
    if trace is not None:
        _write_trace(target, inputs, arguments, trace)
    step = clock.by_innermost(STEP)
    step[REST] = 0.0
    decoding = max(run.seconds - run.first_token_seconds, 1e-9)
    step[REST] = max(decoding - sum(step[name] for name in PHASES), 0.0)
    total, num_steps = sum(step[name] for name in PHASES), max(len(run.gains), 1)
    return {
        "num_steps": len(run.gains),
        "prefill_milliseconds": 1e3 * sum(clock.by_innermost(PREFILL).values()),
        "milliseconds_per_step": {name: 1e3 * step[name] / num_steps for name in PHASES},
        "share_of_step": {name: step[name] / total for name in PHASES},
        "host_device_syncs": syncs,
    }


def _write_trace(target: Any, inputs: Any, arguments: Any, trace: Path) -> None:
    activities = [ProfilerActivity.CPU]
    if target.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with clocked(target, arguments["assistant_model"]), profile(activities=activities) as profiler:
        measure(target, inputs, arguments)
    profiler.export_chrome_trace(str(trace))
