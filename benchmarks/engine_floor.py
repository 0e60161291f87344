"""The least time a step can take: the bytes it has to read, at the speed at which this device copies memory."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dream_hf import DreamDrafter
from dream_hf.benchmark.measure import synchronize
from dream_hf.targets.target import Target, sliding_windows

COPY_BYTES = {"cuda": 2**31, "cpu": 2**27}
NUM_COPIES = 5  # timed together
NUM_TRIALS = 7


@dataclass(frozen=True)
class Bytes:
    """What lies in memory: the target's decoder without embedding, its head, the drafter, one sequence's cache slots."""

    decoder: int
    head: int
    drafter: int

    def plain_step(self) -> int:
        """Read by one step of plain decoding."""
        return self.decoder + self.head

    def tree_step(self, depth: int) -> int:
        """Read by one step with a tree.

        A level's tokens come out of the head and go through the drafter before the next level can be drafted; what was
        accepted goes through it once more.
        """
        return self.plain_step() + depth * (self.drafter + self.head)


def count_bytes(target: Any, drafter: DreamDrafter) -> Bytes:
    """Weight bytes of both models, by what reads them."""
    view = Target(target)
    lent = {id(weight) for part in (view.embedding, view.lm_head) for weight in part.parameters()}
    return Bytes(_weight_bytes(view.decoder, lent), _weight_bytes(view.lm_head), _weight_bytes(drafter))


def cache_bytes(target: Any, num_tokens: int, batch: int) -> int:
    """Keys and values that a step reads behind `num_tokens` tokens in each of `batch` rows."""
    config: Any = Target(target).text_config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_slot = 2 * config.num_key_value_heads * head_dim * target.dtype.itemsize
    slots = sum(min(num_tokens, window or num_tokens) for window in sliding_windows(config))
    return batch * slots * per_slot


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes, together."""
    num_bytes = COPY_BYTES.get(device.type, 2**28)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    seconds = []
    for _ in range(NUM_TRIALS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(NUM_COPIES):
            destination.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * num_bytes * NUM_COPIES / statistics.median(seconds)


def _weight_bytes(module: nn.Module, without: set[int] | None = None) -> int:
    weights = (weight for weight in module.parameters() if id(weight) not in (without or ()))
    return sum(weight.numel() * weight.element_size() for weight in weights)
