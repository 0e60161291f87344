"""The seam between the loop and what drafts: any legal tree is lossless, and settings belong to a call."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from distributions import NUM_TOKENS, tiny_llama
from families import family
from fuzz import FuzzDrafter
from lossless import assert_same_tokens, generate, untrained
from test_sampling import LIMIT, p_values

import dream_hf
from dream_hf import DreamDrafter, RetrievalDrafter
from dream_hf.decoding.drafter import DrafterWithSettings
from dream_hf.decoding.settings import DraftSettings
from dream_hf.decoding.tree import DraftTree
from dream_hf.drafters.retrieval.lookup import PromptLookupDrafter

# --- trees from anywhere ---


@pytest.mark.parametrize("seed", range(3))
def test_trees_are_cut_at_a_depth(seed):
    generator = torch.Generator().manual_seed(seed)
    parents = torch.stack([torch.tensor([0] + [int(torch.randint(n, (1,), generator=generator)) for n in range(1, 12)])
                           for _ in range(3)])  # fmt: skip
    tree = DraftTree.from_parents(torch.randint(50, (3, 12), generator=generator), parents, 11)
    for depth in range(7):
        cut = tree.cut(depth)
        assert int(cut.depths.max()) <= max(depth, 1 if depth else 0) and cut.max_depth == min(depth, 11)
        for row in range(3):
            kept = (tree.depths[row] <= depth).nonzero().flatten()
            paths = [tree.tokens[row, tree.ancestors[row, node]].tolist() for node in kept]
            found = [cut.tokens[row, cut.ancestors[row, node]].tolist() for node in range(cut.num_nodes)]
            assert found[: len(kept)] == paths  # the same nodes with the same ancestors, in the same order
            assert all(
                path == [int(tree.tokens[row, 0])] * len(path) for path in found[len(kept) :]
            )  # and copies of the root
    assert tree.cut(11) is tree


def test_chains_of_different_lengths_make_a_tree():
    tree = DraftTree.from_chains(torch.tensor([[7], [8]]), [[1, 2, 3], [4]])
    assert tree.tokens.tolist() == [[7, 1, 2, 3], [8, 4, 8, 8]]
    assert tree.parents.tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]] and tree.depths.tolist() == [
        [0, 1, 2, 3],
        [0, 1, 1, 1],
    ]
    assert DraftTree.from_chains(torch.tensor([[7], [8]]), [[], []]).num_nodes == 1
    assert tree.without(torch.tensor([2, 4])).tokens.tolist() == [[7, 1, 7, 3], [8, 8, 8, 8]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_vl", "gemma4_shared"])
def test_random_trees_with_ends_in_the_middle(name, seed):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, 3)
    known = generate(target, inputs).sequences
    drafter = FuzzDrafter(range(3, 90), known, favourites=range(3, 12), seed=seed)
    for settings in ({"eos_token_id": list(range(3, 12))}, {"repetition_penalty": 1.5}, {"max_new_tokens": 5}):
        assert_same_tokens(
            generate(target, inputs, **settings), generate(target, inputs, assistant_model=drafter, **settings)
        )
    assert drafter.num_drafts > 10


@pytest.mark.parametrize("batch", [1, 3])
def test_chats_go_on_with_any_drafter(batch):
    target = family("llama").make_target()
    first = {"input_ids": family("llama").make_inputs(target, 1)["input_ids"].expand(batch, -1)}
    for drafter in (FuzzDrafter(range(3, 90), seed=5), PromptLookupDrafter(), RetrievalDrafter(), untrained(target)):
        plain, ours = (
            generate(target, first, max_new_tokens=20, **more) for more in ({}, {"assistant_model": drafter})
        )
        turn = {"input_ids": torch.cat([plain.sequences, first["input_ids"][:, 2:7]], dim=1)}
        expected = generate(target, turn, max_new_tokens=20)
        out = target.generate(**turn, max_new_tokens=20, do_sample=False, assistant_model=drafter,
                              past_key_values=dream_hf.compat.cache_of(ours), return_dict_in_generate=True)  # fmt: skip
        assert_same_tokens(expected, out)


def test_samples_of_random_trees_have_the_target_s_distribution():
    drafter = FuzzDrafter(range(NUM_TOKENS), seed=11, settings=DraftSettings(tree_depth=3, tree_size=6))
    assert min(p_values(tiny_llama(), drafter, temperature=1.0)) > LIMIT
    assert min(p_values(tiny_llama(), drafter, temperature=0.7, repetition_penalty=1.3)) > LIMIT


# --- prompt lookup ---


def test_prompt_lookup_drafts_what_followed_before():
    target = family("llama").make_target()
    text = torch.tensor([[1, 20, 21, 22, 23, 24, 30, 31, 20, 21]])
    drafter = PromptLookupDrafter(max_match=2)
    seen = []

    class Watching(PromptLookupDrafter):
        def start(self, prefill, settings):
            session = super().start(prefill, settings)
            session.rows = text.tolist()
            seen.append(session.draft(torch.tensor([[21]]), 3))
            session.rows = [[*text[0].tolist(), 99]]
            seen.append(session.draft(torch.tensor([[99]])))
            return super().start(prefill, settings)

    expected = target.generate(text, max_new_tokens=12, do_sample=False)
    assert torch.equal(
        target.generate(text, max_new_tokens=12, do_sample=False, assistant_model=Watching(2)), expected
    )
    assert torch.equal(target.generate(text, max_new_tokens=12, do_sample=False, assistant_model=drafter), expected)
    assert seen[0].tokens.tolist() == [[21, 22, 23, 24]] and seen[1].num_nodes == 1
    with pytest.raises(ValueError, match=r"`max_match` \(0\)"):
        PromptLookupDrafter(max_match=0)


def test_prompt_lookup_gains_in_a_text_that_repeats():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    once = generate(target, inputs, max_new_tokens=30)
    again = {
        "input_ids": torch.cat([inputs["input_ids"], once.sequences[:, -30:], inputs["input_ids"][:, -6:]], dim=1)
    }
    expected = generate(target, again)
    assert_same_tokens(expected, generate(target, again, assistant_model=PromptLookupDrafter()))


# --- settings ---


def test_two_threads_with_one_drafter_and_settings_of_their_own():
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target, 2)
    drafter = untrained(target)
    ways = [{"tree_depth": 2, "tree_top_k": 3, "tree_size": 5}, {"tree_depth": 5, "tree_top_k": 1, "tree_size": 5}]
    alone = [generate(target, inputs, assistant_model=drafter.with_settings(**way)) for way in ways]
    assert not torch.equal(alone[0].drafted_lengths, alone[1].drafted_lengths)
    before, barrier = drafter.config.to_dict(), threading.Barrier(2, timeout=60)

    def run(index):
        outs = []
        for _ in range(3):
            barrier.wait()
            outs.append(generate(target, inputs, assistant_model=drafter.with_settings(**ways[index])))
        return outs

    with ThreadPoolExecutor(2) as pool:
        for expected, outs in zip(alone, pool.map(run, range(2)), strict=True):
            for out in outs:
                assert torch.equal(out.sequences, expected.sequences)
                assert torch.equal(out.accepted_lengths, expected.accepted_lengths)
                assert torch.equal(out.drafted_lengths, expected.drafted_lengths)
    assert drafter.config.to_dict() == before


def test_settings_are_checked_and_kept():
    drafter = DreamDrafter.for_target(family("llama").make_target(), tree_depth=3)
    assert drafter.settings == DraftSettings(tree_depth=3, pause_below=drafter.config.pause_below)
    chain = drafter.with_settings(tree_top_k=1)
    assert isinstance(chain, DrafterWithSettings) and chain.settings.tree_depth == 3 and chain.plain is drafter
    assert chain.with_settings(tree_depth=2).settings == chain.settings.changed(tree_depth=2)
    assert chain.with_settings(tree_depth=2).plain is drafter
    with pytest.raises(ValueError, match=r"`tree_deepth` is no setting of decoding. Did you mean `tree_depth`\?"):
        drafter.with_settings(tree_deepth=2)
    with pytest.raises(ValueError, match=r"`tree_depth` \(0\) must be an integer of at least 1"):
        drafter.with_settings(tree_depth=0)
    drafter.config.tree_depth = 8
    assert drafter.settings.tree_depth == 8 and chain.settings.tree_depth == 3


def test_settings_beyond_a_vocabulary_are_refused():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    with pytest.raises(ValueError, match=r"`tree_top_k` .* must not exceed `vocab_size`"):
        generate(target, inputs, assistant_model=DreamDrafter.for_target(target).with_settings(tree_top_k=10**6))


def test_a_drafter_that_drafts_nothing_in_particular_is_refused():
    target = family("llama").make_target()
    with pytest.raises(TypeError, match="`drafter` is a `object`; pass a drafter"):
        target.generate(
            **family("llama").make_inputs(target), custom_generate=dream_hf.dream_generate, drafter=object()
        )
