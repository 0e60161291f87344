"""Whole drafts as one graph: what an accelerator runs, here with a CPU that is taken for one whose reads wait."""

from __future__ import annotations

import pytest
import torch
from families import family
from left_behind import left_by_calls
from lossless import assert_same_tokens, generate, stop_tokens, untrained
from transformers import CompileConfig

from dream_hf.decoding.target_forward import CompiledTargetForward
from dream_hf.drafters.dream.compiled import WholeDraft
from dream_hf.runtime import crossings, few_queries

KEEPS_DOUBLE = False  # what traces cannot look at callers
TRACED = CompileConfig(backend="eager", fullgraph=True)
NUM_NEW = 40
NAMES = ["llama", "gemma3", "qwen2_vl"]  # plain positions, sliding windows, M-RoPE
WHOLE_TREE = {"tree_min_level_probability": 0.0, "tree_min_node_probability": 0.0}
SMALL = {"tree_depth": 3, "tree_top_k": 2, "tree_size": 6, **WHOLE_TREE}


@pytest.fixture(autouse=True)
def waiting(monkeypatch):
    """Reads wait, and nothing is compiled yet."""
    torch._dynamo.reset()
    monkeypatch.setattr(crossings, "reads_wait", lambda device: True)


def counted(monkeypatch, owner: type, *names: str) -> dict[str, int]:
    """How often methods of a class are called from now on."""
    counts = dict.fromkeys(names, 0)

    def counting(name):
        own = getattr(owner, name)

        def count(self, *args):
            counts[name] += 1
            return own(self, *args)

        return count

    for name in names:
        monkeypatch.setattr(owner, name, counting(name))
    return counts


@pytest.fixture
def drafts(monkeypatch) -> dict[str, int]:
    """How many whole drafts were asked for, begun, and begun ahead."""
    return counted(monkeypatch, WholeDraft, "__call__", "begin", "look_ahead")


@pytest.fixture
def forwards(monkeypatch) -> dict[str, int]:
    """How many of the target's forwards over trees were run, and how many of them were begun ahead."""
    return counted(monkeypatch, CompiledTargetForward, "_run", "look_ahead")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_trees(name, batch, drafts, forwards):
    """As many tokens gained in each step as with eager drafts, level by level; each is begun before anybody waits."""
    target = family(name).make_target(dtype=torch.float32)
    inputs = family(name).make_inputs(target, batch, text_len=40)
    drafter = untrained(target, tree_depth=4, tree_top_k=3, tree_size=12, **WHOLE_TREE)
    expected = generate(target, inputs, max_new_tokens=NUM_NEW)
    eager = generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW)
    out = generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW, compile_config=TRACED)
    assert_same_tokens(expected, out)
    assert torch.equal(eager.accepted_lengths, out.accepted_lengths)
    assert int(out.accepted_lengths.max()) > 1
    assert drafts["__call__"] > 10 and drafts["look_ahead"] > drafts["__call__"] * 0.7  # but for rows that rest
    assert forwards["look_ahead"] > drafts["__call__"] * 0.4  # but for the last steps, which may not be as deep
    if batch == 1:  # all but the first were there when they were asked for
        assert drafts["begin"] == drafts["look_ahead"] + 1
        assert forwards["_run"] == out.accepted_lengths.shape[1]


@pytest.mark.parametrize("shape", [(5, 1, 5), (1, 4, 4), (2, 3, 60)], ids=["chain", "one level", "all there are"])
def test_shapes_of_trees(shape):
    target = family("llama").make_target(dtype=torch.float32)
    inputs = family("llama").make_inputs(target, 2, text_len=40)
    drafter = untrained(
        target, **dict(zip(("tree_depth", "tree_top_k", "tree_size"), shape, strict=True)), **WHOLE_TREE
    )
    expected = generate(target, inputs, max_new_tokens=NUM_NEW)
    eager = generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW)
    out = generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW, compile_config=TRACED)
    assert_same_tokens(expected, out)
    assert torch.equal(eager.accepted_lengths, out.accepted_lengths)


@pytest.mark.parametrize("batch", [1, 3])
def test_what_began_for_nothing(batch, drafts, forwards):
    """Where texts end within what was gained, where rows rest, and where drafting pauses, steps begin anew or not at all."""
    target = family("llama").make_target(dtype=torch.float32)
    inputs = family("llama").make_inputs(target, batch, text_len=40)
    stops = {"eos_token_id": stop_tokens(generate(target, inputs, max_new_tokens=NUM_NEW).sequences)}
    for pause, settings in ((0.0, stops), (3.0, {})):
        drafter = untrained(target, **SMALL, pause_below=pause)
        expected = generate(target, inputs, max_new_tokens=NUM_NEW, **settings)
        out = generate(
            target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW, compile_config=TRACED, **settings
        )
        assert_same_tokens(expected, out)
    assert drafts["begin"] > drafts["look_ahead"]
    assert 0 < forwards["look_ahead"] < forwards["_run"]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_second_turn_goes_on(batch, drafts, forwards):
    """The first turn ends with a step that has begun; the second reads on behind what was kept."""
    target = family("llama").make_target(dtype=torch.float32)
    inputs = family("llama").make_inputs(target, batch, text_len=40)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    drafter = untrained(target, **SMALL)
    more, outs = torch.full((batch, 5), 7), []
    stops = {"eos_token_id": stop_tokens(generate(target, inputs, max_new_tokens=40).sequences)[:1]}
    for extra in ({}, {"assistant_model": drafter}, {"assistant_model": drafter, "compile_config": TRACED}):
        first = generate(target, inputs, max_new_tokens=40, **stops, **extra)
        ids = torch.cat([first.sequences, more], dim=1)
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        outs.append(generate(target, again, max_new_tokens=17, **extra))
    plain, eager, out = outs
    assert_same_tokens(plain, out)
    assert torch.equal(eager.accepted_lengths, out.accepted_lengths)
    assert drafts["__call__"] > 4 and forwards["look_ahead"]


def test_what_is_looked_at_is_there(drafts):
    """Scores and hidden states are those of the step, so that no draft may begin before they have been read."""
    target = family("llama").make_target(dtype=torch.float32)
    inputs = family("llama").make_inputs(target, text_len=40)
    drafter = untrained(target, **SMALL)
    wanted = {"output_scores": True, "output_hidden_states": True}
    eager = generate(target, inputs, assistant_model=drafter, max_new_tokens=12, **wanted)
    out = generate(target, inputs, assistant_model=drafter, max_new_tokens=12, compile_config=TRACED, **wanted)
    assert_same_tokens(eager, out)
    for ours, theirs in zip(out.scores, eager.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert drafts["__call__"] > 3 and not drafts["look_ahead"]


def test_calls_find_everything_where_it_was():
    """Two graphs serve all steps of all calls, in buffers of the first one."""
    target = family("llama").make_target(dtype=torch.float32)
    drafter = untrained(target, **SMALL)
    seen = left_by_calls(target, drafter, 6, max_new_tokens=16, compile_config=TRACED)
    assert seen[1][1] == 2  # drafts, and the target
    assert all(each == seen[1] for each in seen[2:])


# --- attention by products ---


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("is_additive", [False, True])
def test_products_compute_attention(heads, is_additive):
    num_heads, num_groups = heads
    query = torch.randn(2, num_heads, 5, 8, dtype=torch.float64)
    key, value = (torch.randn(2, num_groups, 11, 8, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 1, 5, 11) < 0.5
    mask[..., 0] = True
    given = mask.double().log() if is_additive else mask
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=given, scale=0.3, enable_gqa=True
    )
    found = few_queries.attend_by_products(query, key, value, given, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # scores are of float32 at least


@pytest.mark.parametrize("name", NAMES)
def test_decoding_with_products(name, monkeypatch):
    target = family(name).make_target(dtype=torch.float32)
    inputs = family(name).make_inputs(target, 2, text_len=40)
    expected = generate(target, inputs, max_new_tokens=NUM_NEW)
    served, own = [], few_queries._is_for_accelerator

    def serve(query):
        served.append(query.shape[2])
        return True

    assert not own(torch.zeros(1, 1, 1, 1))  # as things are here, none is served
    monkeypatch.setattr(few_queries, "_is_for_accelerator", serve)
    drafter = untrained(target, **SMALL)
    assert_same_tokens(expected, generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW))
    assert 7 in served and 2 in served  # a tree, and a level


def test_many_blocks_are_left_to_fused_kernels(monkeypatch):
    monkeypatch.setattr(few_queries, "_is_for_accelerator", lambda query: True)
    for batch, heads, num_groups, num_queries, pays in (
        (1, 32, 32, 33, True),  # LLaVA-7B's tree
        (4, 32, 32, 33, False),  # and a batch of it
        (1, 28, 4, 33, True),  # Qwen2.5-VL-7B
        (1, 32, 32, 1500, False),
    ):
        query, key = torch.empty(batch, heads, num_queries, 1), torch.empty(batch, num_groups, 1, 1)
        assert few_queries.products_pay(query, key) is pays
