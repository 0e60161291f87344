"""One `generate()` call, timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ..data.prompts import on_model
from ..targets.target import end_ids


@dataclass(frozen=True)
class Measurement:
    """
    What one `generate()` call did.

    Args:
        rows (`list[list[int]]`): New tokens of each row of the batch, up to its end-of-sequence token.
        seconds (`float`): From the call to its return, encoding of the pictures included.
        first_token_seconds (`float`): From the call until the first token could be shown.
        num_first_tokens (`int`): Tokens that came at that moment; assisted generation verifies a first draft before it
            shows anything.
        gains (`list[int]`): Tokens that each row gained by each forward of the target after the prefill, bonus included.
        peak_bytes (`int`, *optional*): Most memory in use meanwhile, on the accelerator or else of the process; None
            where the system does not tell.
    """

    rows: list[list[int]]
    seconds: float
    first_token_seconds: float
    num_first_tokens: int
    gains: list[int]
    peak_bytes: int | None = None

    @property
    def tokens(self) -> list[int]:
        """New tokens of the first row."""
        return self.rows[0]

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return sum(map(len, self.rows))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Clock(BaseStreamer):
    """
    Notes when tokens come, and hands them on.

    Args:
        listener (`BaseStreamer`, *optional*): Gets everything that the clock gets.
    """

    def __init__(self, listener: BaseStreamer | None = None) -> None:
        self.listener = listener
        self.times: list[float] = []
        self.sizes: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.sizes.append(value.numel())
        if self.listener is not None:
            self.listener.put(value)

    def end(self) -> None:
        if self.listener is not None:
            self.listener.end()


def measure(
    target: Any, inputs: Mapping[str, Any], arguments: Mapping[str, Any], listener: BaseStreamer | None = None
) -> Measurement:
    """Run `target.generate(**inputs, **arguments)` for one batch.

    Args:
        target (`PreTrainedModel`): The target.
        inputs (`Mapping`): A processor's output; moved to the target before the clock starts.
        arguments (`Mapping`): How to decode; with `return_dict_in_generate` where the output is a
            [`DreamGenerateOutput`].
        listener (`BaseStreamer`, *optional*): Gets the tokens as they come.
    """
    inputs = on_model(inputs, target)
    clock = Clock(listener)
    with peak_memory(target.device) as peak:
        synchronize(target.device)
        start = time.perf_counter()
        output = target.generate(**inputs, **arguments, streamer=clock)
        synchronize(target.device)
        seconds = time.perf_counter() - start
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    rows = _rows(sequences[:, inputs["input_ids"].shape[1] :], end_ids(target.generation_config))
    return Measurement(
        rows=rows,
        seconds=seconds,
        first_token_seconds=clock.times[1] - start,
        num_first_tokens=clock.sizes[1],
        gains=_gains(output, rows, clock.sizes[1:]),  # the first entry is the prompt
        peak_bytes=peak[0] if peak else None,
    )


def _rows(tokens: torch.Tensor, ends: frozenset[int]) -> list[list[int]]:
    """Rows of tokens (B, T) without the padding behind their ends."""
    rows = []
    for row in tokens.tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:end])
    return rows


def _gains(output: Any, rows: list[list[int]], sizes: list[int]) -> list[int]:
    """Tokens gained by each forward: as a drafter's output says, else as they came (one row) or one by one (several)."""
    accepted = getattr(output, "accepted_lengths", None)
    if accepted is not None:
        return [gain for row in accepted.tolist() for gain in row if gain > 0]
    if len(rows) > 1:
        return [1] * sum(len(row) - 1 for row in rows)
    return sizes[1:] if sizes[0] == 1 else sizes


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Peak memory of the block in bytes, as the one entry of the list; empty where it cannot be had."""
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device))
        return
    is_known = device.type == "cpu" and _reset_peak_resident()
    yield peak
    if is_known:
        peak.extend(_peak_resident())


def _reset_peak_resident() -> bool:
    """Let Linux count the process's peak memory anew; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_resident() -> list[int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
