"""Conversations of several turns: the drafter goes on from what it has read."""

import pytest
import torch
from double import TIGHT
from families import family

import dream_hf  # noqa: F401
from dream_hf import DreamDrafter
from dream_hf.drafters.dream.state import DrafterState

NEW_TOKENS = 24


def generate(target, drafter, ids, cache=None):
    return target.generate(
        input_ids=ids,
        assistant_model=drafter,
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
    )


@pytest.fixture
def pair():
    target = family("llama").make_target()
    return target, DreamDrafter.for_target(target)


def first_turn(target, drafter):
    ids = family("llama").make_inputs(target)["input_ids"]
    result = generate(target, drafter, ids)
    following = torch.cat([result.sequences, ids[:, 1:6]], dim=1)
    return result, following


def states_read(monkeypatch, run):
    """The drafter states that read something while `run` runs, and how many tokens each had read before."""
    seen = []
    read = DrafterState.read

    def watched(self, *args):
        seen.append((self, self.tokens.longest))
        return read(self, *args)

    monkeypatch.setattr(DrafterState, "read", watched)
    result = run()
    monkeypatch.setattr(DrafterState, "read", read)
    return result, seen


def test_second_turn_continues_the_drafter(pair, monkeypatch):
    target, drafter = pair
    result, following = first_turn(target, drafter)
    expected = target.generate(input_ids=following, max_new_tokens=NEW_TOKENS, do_sample=False)
    second, reads = states_read(monkeypatch, lambda: generate(target, drafter, following, result.past_key_values))
    assert torch.equal(second.sequences, expected)
    assert reads[1][1] == result.sequences.shape[1]  # it reads the end of the first turn when the second begins

    # What it has read in two turns is what it reads in one.
    _, afresh = states_read(monkeypatch, lambda: generate(target, drafter, following))
    continued, fresh = reads[0][0], afresh[0][0]
    assert continued.tokens.lengths == fresh.tokens.lengths
    assert continued.features.lengths == fresh.features.lengths
    for ours, theirs in zip(continued.cache.layers, fresh.cache.layers, strict=True):
        end = ours.slots.longest
        torch.testing.assert_close(ours.keys[:, :, :end], theirs.keys[:, :, :end], **TIGHT)
        torch.testing.assert_close(ours.values[:, :, :end], theirs.values[:, :, :end], **TIGHT)


def test_the_last_step_is_not_read_before_it_is_needed(pair, monkeypatch):
    (result, _), reads = states_read(monkeypatch, lambda: first_turn(*pair))
    num_steps = int((result.accepted_lengths[0] >= 0).sum())
    assert num_steps > 1 and len(reads) == num_steps  # the prompt, and every step but the last


@pytest.mark.parametrize("change", ["cropped cache", "another drafter", "another token"])
def test_a_changed_conversation_starts_afresh(pair, monkeypatch, change):
    target, drafter = pair
    result, following = first_turn(target, drafter)
    cache = result.past_key_values
    if change == "cropped cache":
        cache.crop(-3)
    elif change == "another drafter":
        drafter = DreamDrafter.for_target(target)
    else:
        last = result.sequences.shape[1] - 1
        following[:, last] = (following[:, last] + 1) % 90 + 5
    expected = target.generate(input_ids=following, max_new_tokens=NEW_TOKENS, do_sample=False)
    second, reads = states_read(monkeypatch, lambda: generate(target, drafter, following, cache))
    assert torch.equal(second.sequences, expected)
    assert reads[0][1] == 0


@pytest.mark.parametrize("modes", [(True, False), (False, True), (True, True, False, True, False)], ids=str)
def test_turns_inside_and_outside_inference_mode(pair, modes):
    target, drafter = pair
    ids, cache = family("llama").make_inputs(target)["input_ids"], None
    for mode in modes:
        expected = target.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        with torch.inference_mode(mode):
            result = generate(target, drafter, ids, cache)
        assert torch.equal(result.sequences, expected)
        ids, cache = torch.cat([result.sequences, ids[:, 1:6]], dim=1), result.past_key_values
