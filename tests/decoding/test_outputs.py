"""What `return_dict_in_generate=True` returns equals what plain `generate()` returns, and the gains add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from double import tolerance
from families import FAMILIES, family
from lossless import CHAIN, assert_same_tokens, gains, generate, oracle, stop_tokens, untrained
from torch import Tensor

NUM_NEW = 20
WANTED = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True}
PENALISED = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}

each_batch = pytest.mark.parametrize("batch", [1, 3])
some_families = pytest.mark.parametrize("name", ["llava_clip_llama", "gemma3", "qwen2_vl"])


def row_of(value: Tensor, row: int) -> Tensor:
    return value[row].nan_to_num(neginf=-1e9)


def assert_same_steps(expected: tuple, actual: tuple, lengths: list[int]) -> None:
    """Entries of `scores` and the like, or tuples of layers, for the tokens that each row has."""
    assert len(expected) == len(actual)
    for step, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        wanted_layers = wanted if isinstance(wanted, tuple) else (wanted,)
        got_layers = got if isinstance(got, tuple) else (got,)
        assert len(wanted_layers) == len(got_layers)
        for one, other in zip(wanted_layers, got_layers, strict=True):
            assert other.shape == one.shape and other.dtype == one.dtype, step
            for row, length in enumerate(lengths):
                if step < length:
                    torch.testing.assert_close(row_of(other, row), row_of(one, row), **tolerance(one))


def assert_same_outputs(expected: Any, actual: Any, lengths: list[int]) -> None:
    assert_same_tokens(expected, actual)
    for name in ("scores", "logits", "hidden_states", "attentions"):
        wanted, got = getattr(expected, name), getattr(actual, name)
        assert (wanted is None) == (got is None), name
        if wanted is not None:
            assert_same_steps(wanted, got, lengths)


@each_batch
@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_everything_there_is(family, batch):
    target = family.make_target(attn_implementation="eager")
    inputs = family.make_inputs(target, batch)
    expected = generate(target, inputs, max_new_tokens=NUM_NEW, **WANTED)
    assert expected.attentions[-1][0] is not None
    drafter, _ = oracle(target, inputs, expected.sequences)
    out = generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW, **WANTED)
    assert_same_outputs(expected, out, [NUM_NEW] * batch)


@some_families
def test_attention_that_is_not_shown_is_as_blank_as_in_plain_decoding(name):
    target = family(name).make_target(attn_implementation="sdpa")
    inputs = family(name).make_inputs(target, 2)
    settings = {"max_new_tokens": 8, "output_attentions": True}
    expected = generate(target, inputs, **settings)
    out = generate(target, inputs, assistant_model=untrained(target), **settings)
    assert_same_tokens(expected, out)
    assert out.attentions == expected.attentions


@some_families
@each_batch
def test_scores_are_processed_and_logits_are_not(name, batch):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch)
    wanted = {"output_scores": True, "output_logits": True, "max_new_tokens": NUM_NEW} | PENALISED
    expected = generate(target, inputs, **wanted)
    assert not torch.equal(expected.scores[-1], expected.logits[-1])
    for drafter in (oracle(target, inputs, expected.sequences)[0], untrained(target)):
        out = generate(target, inputs, assistant_model=drafter, **wanted)
        assert_same_outputs(expected, out, [NUM_NEW] * batch)


@some_families
def test_rows_that_end_early(name):
    target = family(name).make_target(attn_implementation="eager")
    inputs = family(name).make_inputs(target, 3)
    endless = generate(target, inputs, max_new_tokens=40).sequences
    settings = {"max_new_tokens": 40, "eos_token_id": stop_tokens(endless, 40, (7, 15, 23))} | WANTED
    expected = generate(target, inputs, **settings)
    drafter, _ = oracle(target, inputs, endless)
    out = generate(target, inputs, assistant_model=drafter, **settings)
    is_new = expected.sequences[:, inputs["input_ids"].shape[1] :] != 0
    lengths = is_new.sum(1).tolist()
    assert len(set(lengths)) == 3
    assert_same_outputs(expected, out, lengths)
    assert [sum(row) for row in gains(out)] == [length - 1 for length in lengths]


@some_families
def test_one_kind_alone(name):
    target = family(name).make_target(attn_implementation="eager")
    inputs = family(name).make_inputs(target)
    for kind in WANTED:
        settings = {"max_new_tokens": 8, kind: True}
        expected = generate(target, inputs, **settings)
        drafter, _ = oracle(target, inputs, expected.sequences)
        assert_same_outputs(expected, generate(target, inputs, assistant_model=drafter, **settings), [8])


def test_plain_sequences_without_a_dict():
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    out = target.generate(**inputs, max_new_tokens=5, do_sample=False, assistant_model=untrained(target), **WANTED)
    assert isinstance(out, torch.Tensor)


# --- gains ---


@each_batch
@pytest.mark.parametrize("config", [{}, CHAIN, {"tree_depth": 2, "tree_top_k": 2, "tree_size": 60}], ids=str)
def test_gains_and_drafts(config, batch):
    """One entry for each verification; a tree cannot draft more nodes than it has expanded, nor levels than can be used."""
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target, batch)
    expected = generate(target, inputs)
    drafter, _ = oracle(target, inputs, expected.sequences, **config)
    forwards = []
    handle = target.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    out = generate(target, inputs, assistant_model=drafter)
    handle.remove()
    assert_same_tokens(expected, out)
    assert out.accepted_lengths.dtype == torch.long
    assert out.accepted_lengths.shape == out.drafted_lengths.shape == (batch, len(forwards) - 1)
    depth, top_k, size = (
        config.get(f"tree_{name}", value) for name, value in (("depth", 6), ("top_k", 4), ("size", 32))
    )
    num_new = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    for step in range(out.drafted_lengths.shape[1]):
        shortest = min(1 + sum(got[:step]) for got in gains(out))
        levels = min(depth, num_new - shortest - 1)  # the target adds a token
        expanded = top_k + (levels - 1) * top_k**2 if levels else 0
        assert set(out.drafted_lengths[:, step].tolist()) - {-1} == {min(size, expanded)}
    assert [sum(row) for row in gains(out)] == [num_new - 1] * batch
    assert (out.accepted_lengths <= depth + 1).all()
    # Rows that are done are padded with -1 at the end, and nowhere else.
    for row, got in zip(out.accepted_lengths.tolist(), gains(out), strict=True):
        assert row[: len(got)] == got and set(row[len(got) :]) <= {-1}
        assert min(got) >= 1


def test_a_single_token_takes_no_verification():
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target, 3)
    out = generate(target, inputs, assistant_model=untrained(target), max_new_tokens=1)
    assert out.accepted_lengths.shape == out.drafted_lengths.shape == (3, 0)


def test_tokens_cut_by_a_stop_do_not_count():
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    endless = generate(target, inputs)
    drafter, _ = oracle(target, inputs, endless.sequences)
    whole = gains(generate(target, inputs, assistant_model=drafter))[0]
    step = next(index for index, gain in enumerate(whole) if index > 2 and gain > 3)
    length = 1 + sum(whole[:step]) + 2
    out = generate(target, inputs, assistant_model=drafter, max_new_tokens=length)
    assert gains(out)[0] == [*whole[:step], 2]
