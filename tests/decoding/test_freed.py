"""After `generate()` nothing of it is alive but what the caller holds: no reference cycle waits for the collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import family
from test_robustness import BreakingProcessor, BreakingStreamer, Broken
from transformers import DynamicCache, LogitsProcessorList

from dream_hf import DreamDrafter, dream_chain_generate, dream_generate
from dream_hf.decoding import loop as generation
from dream_hf.drafters import growth
from dream_hf.drafters.dream.session import DreamSession
from dream_hf.drafters.dream.state import DrafterState


@pytest.fixture(scope="module")
def target():
    return family("llama").make_target()


@pytest.fixture(scope="module")
def drafter(target):
    return DreamDrafter.for_target(target)


@pytest.fixture
def alive(monkeypatch):
    """What of a call is alive; the collector is off."""
    found: weakref.WeakSet[Any] = weakref.WeakSet()
    for kind in (generation._Decoding, DreamSession, DrafterState, DynamicCache):

        def watched(self, *args, init=kind.__init__, **kwargs):
            found.add(self)
            init(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", watched)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


def failing(kind: type[BaseException], at_call: int) -> Callable[[], None]:
    """Raises at its n-th call, an error that it does not hold."""
    calls: list[int] = []

    def act() -> None:
        calls.append(1)
        if len(calls) == at_call:
            raise kind

    return act


def num_tensors() -> int:
    growth.candidate_places.cache_clear()  # bounded; which shapes of trees occur is up to chance
    return sum(type(each) is torch.Tensor for each in gc.get_objects())


def generate(target, batch: int = 1, **arguments: Any) -> Any:
    inputs = family("llama").make_inputs(target, batch)
    return target.generate(**inputs, **{"max_new_tokens": 10, "do_sample": False} | arguments)


WAYS: dict[str, Callable[..., Any]] = {
    "hook": lambda drafter: {"assistant_model": drafter},
    "custom": lambda drafter: {"custom_generate": dream_generate, "drafter": drafter},
    "chain": lambda drafter: {"custom_generate": dream_chain_generate, "drafter": drafter},
    "batch": lambda drafter: {"assistant_model": drafter, "batch": 3, "repetition_penalty": 1.2},
    "everything returned": lambda drafter: {
        "assistant_model": drafter,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_hidden_states": True,
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_dropped_is_freed(target, drafter, alive, way):
    arguments = WAYS[way](drafter)
    for _ in range(3):
        generate(target, **arguments)
        assert not alive
    out = generate(target, **{"return_dict_in_generate": True} | arguments)
    kinds = sorted(type(each).__name__ for each in alive)
    assert kinds.count("DynamicCache") == 1 and "_Decoding" not in kinds  # the cache that is returned
    del out
    assert not alive


@pytest.mark.parametrize("way", ["hook", "chain"])
@pytest.mark.parametrize("at_call", [1, 6])
def test_a_call_that_raises_is_freed(target, drafter, alive, way, at_call):
    processors = LogitsProcessorList([BreakingProcessor(failing(Broken, at_call))])
    with pytest.raises(Broken):
        generate(target, **WAYS[way](drafter), logits_processor=processors)
    assert not alive
    if way == "chain":  # `custom_generate` is given no streamer
        return
    with pytest.raises(KeyboardInterrupt):
        generate(target, **WAYS[way](drafter), streamer=BreakingStreamer(failing(KeyboardInterrupt, at_call)))
    assert not alive


def test_sixty_requests_leave_nothing(target, drafter, alive):
    for batch in (1, 3):
        generate(target, batch, assistant_model=drafter)
    counts = []
    for request in range(60):
        generate(target, 1 + 2 * (request % 2), assistant_model=drafter, do_sample=bool(request % 3))
        counts.append(num_tensors())
    assert len(set(counts[2:])) == 1, counts
    assert not alive
