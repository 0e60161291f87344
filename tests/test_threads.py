"""Drafting on few CPU threads leaves the number of threads as it was."""

import pytest
import torch
from families import family
from lossless import generate

from dream_hf import DreamConfig, DreamDrafter
from dream_hf.drafter_state import DrafterState
from dream_hf.threads import cpu_threads


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_the_number_holds_in_the_block_only(three_threads):
    with pytest.raises(KeyError), cpu_threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 3
    with cpu_threads(None):
        assert torch.get_num_threads() == 3


def test_the_drafter_runs_on_draft_threads_and_the_target_does_not(three_threads, monkeypatch):
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target, 1)
    seen = {"prompt": set(), "drafter": set(), "target": set()}
    forward = DrafterState._forward

    def watched(state, *args, **kwargs):
        seen["drafter" if state.features.longest else "prompt"].add(torch.get_num_threads())
        return forward(state, *args, **kwargs)

    monkeypatch.setattr(DrafterState, "_forward", watched)
    target.model.register_forward_hook(lambda *_: seen["target"].add(torch.get_num_threads()))
    drafter = DreamDrafter.for_target(target, draft_threads=1)
    generate(target, inputs, assistant_model=drafter, max_new_tokens=8)
    assert seen == {"prompt": {3}, "drafter": {1}, "target": {3}}
    assert torch.get_num_threads() == 3


def test_a_number_below_one_is_refused():
    with pytest.raises(ValueError, match=r"`draft_threads` \(0\)"):
        DreamConfig(draft_threads=0)
