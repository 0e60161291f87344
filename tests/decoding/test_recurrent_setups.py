"""Targets with state in everything that other targets can do: chats, caches of the caller's, streams, stops, samples."""

from __future__ import annotations

import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hybrid_configs
import pytest
import torch
import transformers as hf
from distributions import NUM_TOKENS, _flat_target, draw, exact_joint, p_value, tiny_prompt
from double import TIGHT
from families import Family, family
from fuzz import FuzzDrafter
from lossless import SMALL_TREE, assert_lossless, generate, make_drafter, stop_tokens, untrained
from nodes import drive, random_tree, sequential_logits, texts_of, verify_tree
from states import plain_states, states_in, watching_states
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import dream_hf
from dream_hf import CombinedDrafter, LayerSkipDrafter, PromptLookupDrafter
from dream_hf.compat import CACHE, cache_of

SOME = ["qwen3_5", "lfm2_vl", "nemotron_h"]
some_families = pytest.mark.parametrize("name", SOME)


@functools.cache
def made(name: str) -> tuple[Family, Any]:
    return family(name), family(name).make_target()


@pytest.mark.parametrize("name", [*SOME, "falcon_h1"])
def test_all_nodes_of_a_tree_say_what_they_say_one_by_one(name):
    each, target = made(name)
    inputs = each.make_inputs(target, 2)
    tree = random_tree(2, 13, torch.Generator().manual_seed(0))

    def act(decoding):
        tree.tokens[:, 0] = decoding.roots[:, 0]
        return verify_tree(decoding, tree), texts_of(decoding)

    logits, texts = drive(target, inputs, untrained(target, **SMALL_TREE), act)
    for node in range(13):
        wanted = sequential_logits(target, inputs, texts, tree, node)
        torch.testing.assert_close(logits[:, node], wanted, **TIGHT)


@pytest.mark.parametrize("name", [*SOME, "falcon_h1", "jamba"])
def test_chats_go_on_from_the_returned_cache(name):
    """Jamba's plain decoding loses its state when a second turn is read; whatever it does then is to be done."""
    _, target = made(name)
    ids = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    drafters = [untrained(target, **SMALL_TREE), FuzzDrafter(range(3, 90)), PromptLookupDrafter()]
    caches = [DynamicCache(config=target.config) for _ in range(len(drafters) + 1)]
    for turn in range(3):
        expected = generate(target, {"input_ids": ids}, past_key_values=caches[0], max_new_tokens=12)
        for cache, drafter in zip(caches[1:], drafters, strict=True):
            with torch.inference_mode(turn == 1):
                settings = {"past_key_values": cache, "assistant_model": drafter}
                out = generate(target, {"input_ids": ids}, **settings, max_new_tokens=12)
            assert torch.equal(out.sequences, expected.sequences) and cache_of(out) is cache
            for ours, theirs in zip(states_in(cache), states_in(caches[0]), strict=True):
                for part, wanted in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(part, wanted, **TIGHT)
        ids = torch.cat([expected.sequences, ids[:, 1:6]], dim=1)


@some_families
def test_rows_that_end_early_leave_the_cache_that_plain_decoding_leaves(name):
    each, target = made(name)
    inputs = each.make_inputs(target, 3)
    ends = stop_tokens(generate(target, inputs).sequences)
    expected, states = plain_states(target, inputs, eos_token_id=ends)
    drafter = make_drafter("tree", target, inputs, expected.sequences, {})
    out = generate(target, inputs, assistant_model=drafter, eos_token_id=ends)
    assert torch.equal(out.sequences, expected.sequences)
    for ours, theirs in zip(states_in(cache_of(out)), states[-1], strict=True):
        for part, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(part, wanted, **TIGHT)


def test_a_cache_that_records_its_past():
    """As transformers' own assisted decoding leaves it: with more inputs than a convolution needs."""
    _, target = made("lfm2_vl")
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    caches = [DynamicCache(config=target.config) for _ in range(2)]
    caches[1].activate_past_recording()
    for cache in caches:
        target(input_ids=ids[:, :8], **{CACHE: cache})
    assert caches[1].layers[0].conv_states[0].shape[2] > caches[0].layers[0].conv_states[0].shape[2]
    expected = generate(target, {"input_ids": ids}, past_key_values=caches[0])
    drafter = untrained(target, **SMALL_TREE)
    out = generate(target, {"input_ids": ids}, past_key_values=caches[1], assistant_model=drafter)
    assert torch.equal(out.sequences, expected.sequences)


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens: list[int] = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append(-1)


@some_families
def test_outputs(name):
    """Attentions are those of layers that attend; hidden states are of all."""
    each = family(name)
    target = each.make_target(attn_implementation="eager")
    inputs, wanted = each.make_inputs(target, 3), {"output_attentions": True, "output_hidden_states": True}
    expected = generate(target, inputs, **wanted, max_new_tokens=12)
    drafter = make_drafter("tree", target, inputs, generate(target, inputs).sequences, {})
    out = generate(target, inputs, assistant_model=drafter, **wanted, max_new_tokens=12)
    for kind in ("attentions", "hidden_states"):
        for ours, theirs in zip(getattr(out, kind), getattr(expected, kind), strict=True):
            for part, plain in zip(ours, theirs, strict=True):
                torch.testing.assert_close(part, plain, **TIGHT)


@some_families
def test_streams(name):
    each, target = made(name)
    inputs, streams = each.make_inputs(target), [Recorder(), Recorder()]
    expected = generate(target, inputs, streamer=streams[0])
    drafter = make_drafter("tree", target, inputs, expected.sequences, {})
    generate(target, inputs, streamer=streams[1], assistant_model=drafter)
    assert streams[0].tokens == streams[1].tokens and len(streams[0].tokens) > 64


SETTINGS = {
    "ends": {"eos_token_id": list(range(3, 12))},
    "a short limit": {"max_new_tokens": 3},
    "processors": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
    "prompts in chunks": {"prefill_chunk_size": 7},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@some_families
def test_settings(name, settings):
    each, target = made(name)
    inputs = each.make_inputs(target, 3, images=0 if "prefill_chunk_size" in settings else 1)
    assert_lossless(target, inputs, lambda: dict(settings), lambda: {"max_new_tokens": 64}, ["tree", "fuzz"])


def test_criteria_that_let_no_row_run_ahead():
    """Rows that go on beyond their end until all have met a criterion: a state could not be taken back there."""
    each, target = made("qwen3_5")
    inputs = each.make_inputs(target, 3)
    wanted = generate(target, inputs).sequences[:, -20:]

    class Written(hf.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor(
                [bool((row == token).any()) for row, token in zip(input_ids, wanted[:, 0], strict=True)]
            )

    assert_lossless(
        target, inputs, lambda: {"stopping_criteria": hf.StoppingCriteriaList([Written()])}, drafts=["tree"]
    )


def test_samples_have_the_targets_distribution():
    text = {"vocab_size": NUM_TOKENS, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    config = hf.Qwen3NextConfig(**hybrid_configs.MIXED | hybrid_configs.DELTA | hybrid_configs.EXPERTS | text)
    target = _flat_target(config, hf.Qwen3NextForCausalLM)
    inputs, settings = tiny_prompt(target), {"temperature": 0.9, "top_k": 4}
    joint = exact_joint(target, inputs, 3, **settings)
    torch.manual_seed(0)
    draws = draw(target, inputs, 2048, 3, 512, assistant_model=FuzzDrafter(range(NUM_TOKENS)), **settings)
    assert p_value(draws, joint) >= 1e-3


def test_threads_do_not_mix_up_their_states():
    each, target = made("qwen3_5")
    inputs = [each.make_inputs(target, seed=seed) for seed in range(4)]
    expected = [generate(target, each_inputs).sequences for each_inputs in inputs]
    drafter = FuzzDrafter(range(3, 90))
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda each_inputs: generate(target, each_inputs, assistant_model=drafter).sequences, inputs)
        assert all(torch.equal(*pair) for pair in zip(runs, expected, strict=True))


def test_nothing_is_left_behind():
    each, target = made("qwen3_5")
    module = sys.modules[type(target.model.language_model.layers[0].linear_attn).__module__]
    names = ("causal_conv1d_fn", "torch_chunk_gated_delta_rule")
    before, inputs = [getattr(module, name) for name in names], each.make_inputs(target)

    class Stopping(FuzzDrafter):
        def start(self, prefill, settings):
            raise KeyboardInterrupt

    generate(target, inputs, assistant_model=FuzzDrafter(range(3, 90)))
    with pytest.raises(KeyboardInterrupt):
        generate(target, inputs, assistant_model=Stopping(range(3, 90)))
    assert [getattr(module, name) for name in names] == before
    assert dream_hf.runtime.recurrent.layers.current_layer() is None


@some_families
def test_a_call_that_breaks_off_leaves_whole_tokens_in_the_cache(name):
    """States, like keys, are those of some verified text."""
    _, target = made(name)
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    _, states = plain_states(target, {"input_ids": ids})

    class Breaking(BaseStreamer):
        num_puts = 0

        def put(self, value):
            self.num_puts += 1
            if self.num_puts == 5:
                raise KeyboardInterrupt

        def end(self):
            raise AssertionError

    cache = DynamicCache(config=target.config)
    with pytest.raises(KeyboardInterrupt), watching_states(states) as seen:
        drafter = make_drafter(
            "tree",
            target,
            {"attention_mask": torch.ones_like(ids)},
            generate(target, {"input_ids": ids}).sequences,
            {},
        )
        generate(target, {"input_ids": ids}, past_key_values=cache, assistant_model=drafter, streamer=Breaking())
    read = cache.get_seq_length() - ids.shape[1]
    assert read == seen[-1]
    for ours, theirs in zip(states_in(cache), states[read], strict=True):
        for part, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(part, wanted, **TIGHT)


def test_drafters_that_need_the_targets_own_cache_are_refused():
    each, target = made("qwen3_5")
    skip = LayerSkipDrafter(target)
    for drafter in (skip, CombinedDrafter([PromptLookupDrafter(), skip])):
        with pytest.raises(ValueError, match=r"keeps a state.*target's own cache.*another drafter"):
            generate(target, each.make_inputs(target), assistant_model=drafter)


def test_chains_in_transformers_own_loop_are_refused_where_it_cannot_take_them_back():
    each, target = made("qwen3_5")
    with pytest.raises(ValueError, match=r"cannot take back.*custom_generate=dream_generate"):
        generate(
            target,
            each.make_inputs(target),
            custom_generate=dream_hf.dream_chain_generate,
            drafter=untrained(target, **SMALL_TREE),
        )


REFUSED = {
    "mamba": "no layer attends",
    "minimax": "no module is known to keep the state",
    "recurrent_gemma": "no module is known to keep the state",
    "rwkv": "it is not in the cache",
    "xlstm": "it is not in the cache",
    "zaya": "calls no `causal_conv1d_fn`",
    "inkling_text": "more than one state",
}


@pytest.mark.parametrize(("model_type", "reason"), REFUSED.items(), ids=list(REFUSED))
def test_states_that_cannot_follow_a_tree_are_named(model_type, reason):
    if model_type not in hf.CONFIG_MAPPING:
        pytest.skip("this transformers has no such family")
    config = hf.AutoConfig.for_model(model_type)
    with torch.device("meta"):  # of full size, and never run
        target = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=rf"`{type(target).__name__}` keeps .*{reason}.*without `assistant_model`"):
        target.generate(input_ids=torch.tensor([[5, 6]]), assistant_model=PromptLookupDrafter(), max_new_tokens=2)


def test_a_kernel_in_place_of_a_layer_is_refused():
    _, target = made("qwen3_5")
    layer = target.model.language_model.layers[0].linear_attn

    def forward(*args, **kwargs):
        raise AssertionError

    layer.forward = forward
    try:
        with pytest.raises(
            ValueError, match=r"a kernel runs in place of `Qwen3_5GatedDeltaNet`.*without `use_kernels`"
        ):
            target.generate(input_ids=torch.tensor([[5, 6]]), assistant_model=PromptLookupDrafter(), max_new_tokens=2)
    finally:
        del layer.forward


def test_a_layer_that_does_not_go_down_the_tree_is_an_error(monkeypatch):
    """A model that calls a function of another module, say."""
    each, target = made("qwen3_5")
    monkeypatch.setattr("dream_hf.targets.recurrence.RECURRENCES", {})
    with pytest.raises(ValueError, match=r"calls none of"):
        generate(target, each.make_inputs(target), assistant_model=PromptLookupDrafter())
    monkeypatch.undo()
    monkeypatch.setattr(
        "dream_hf.targets.recurrence.tree_convolution", lambda layer, states, *_, **__: states[..., ::4]
    )
    monkeypatch.setattr("dream_hf.runtime.recurrent.layers.StateLayer.note", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"2 layers with state of `Qwen3_5\w+` were not seen"):
        generate(target, each.make_inputs(target), assistant_model=PromptLookupDrafter())
