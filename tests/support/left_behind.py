"""What calls of compiled decoding leave behind for later ones."""

from __future__ import annotations

import gc
from typing import Any

import torch
from families import Target, family
from lossless import generate

from dream_hf.runtime.leases import idle_leases


def left_by_calls(target: Target, drafter: Any, num_calls: int, **settings: Any) -> list[tuple[list[int], int, int]]:
    """After each of some calls with other prompts: addresses of idle buffers, graphs so far, tensors that are alive."""
    torch._dynamo.utils.counters.clear()
    seen = []
    for call in range(num_calls):
        inputs = family("llama").make_inputs(target, seed=call)
        generate(target, inputs, assistant_model=drafter, **settings)
        gc.collect()
        leases = [*idle_leases(target), *idle_leases(drafter)]
        addresses = sorted(buffer.data_ptr() for lease in leases for buffer in lease.buffers.values())
        num_tensors = sum(type(each) is torch.Tensor for each in gc.get_objects())
        seen.append((addresses, torch._dynamo.utils.counters["stats"]["unique_graphs"], num_tensors))
    return seen
