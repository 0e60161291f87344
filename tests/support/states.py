"""What layers with state hold after every step, in plain and in speculative decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from double import TIGHT
from families import Inputs, Target
from lossless import assert_same_tokens, generate
from torch import Tensor
from transformers.cache_utils import Cache

from dream_hf.compat import cache_of
from dream_hf.decoding.target_forward import TargetForward
from dream_hf.runtime.recurrent.layers import stateful

States = list[list[Tensor]]  # by layer: the convolution's inputs, and the recurrence's state where there is one


def states_in(cache: Cache) -> States:
    """Copies of the states of a cache."""
    found = []
    for layer in stateful(cache.layers).values():
        parts = [layer.conv_states[0][..., -layer.conv_kernel_size[0] :], layer.recurrent_states[0]]
        found.append([part.clone() for part in parts if part is not None])
    return found


def plain_states(target: Target, inputs: Inputs, **settings: Any) -> tuple[Any, list[States]]:
    """Plain decoding's output, and its states after the prompt and after every token that it read."""
    states: list[States] = []
    handle = target.register_forward_hook(lambda module, args, outputs: states.append(states_in(cache_of(outputs))))
    try:
        return generate(target, inputs, output_logits=True, **settings), states
    finally:
        handle.remove()


@contextmanager
def watching_states(expected: list[States]) -> Iterator[list[int]]:
    """After every step in the block each row's states are those of plain decoding where it stands; yields how far they were."""
    commit = TargetForward.commit
    seen: list[int] = []

    def commit_and_compare(self: TargetForward, *arguments: Any) -> None:
        commit(self, *arguments)
        for row, length in enumerate(self.slots.lengths):
            plain = expected[min(length - self.prompt_slots, len(expected) - 1)]
            for layer, parts in zip(self.states.layers, plain, strict=True):
                held = [layer.inputs] if layer.state is None else [layer.inputs, layer.state]
                for part, wanted in zip(held, parts, strict=True):
                    torch.testing.assert_close(part[row], wanted[row], **TIGHT)
            seen.append(length - self.prompt_slots)

    with mock.patch.object(TargetForward, "commit", commit_and_compare):
        yield seen


def assert_states_follow(target: Target, inputs: Inputs, drafter: Any, expected: Any, states: list[States]) -> None:
    """The same tokens as in plain decoding, and the same states after every step; and in the cache that is returned."""
    with watching_states(states) as seen:
        out = generate(target, inputs, assistant_model=drafter)
    assert_same_tokens(expected, out)
    assert max(seen) >= len(states) - 1 and len(set(seen)) > 3
    for ours, theirs in zip(states_in(cache_of(out)), states[-1], strict=True):
        for part, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(part, wanted, **TIGHT)
