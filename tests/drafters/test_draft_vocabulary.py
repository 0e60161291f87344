"""Drafts from a part of the vocabulary: which tokens, with which rows of the head, and what that may not change."""

import gc
import weakref

import pytest
import torch
from answered import answer
from distributions import draw, exact_joint, p_value, tiny_llama, tiny_prompt
from double import doubles
from families import family
from grown import grow
from lossless import CHAIN, assert_counts_add_up, assert_same_tokens, gains, generate, oracle, untrained
from test_metrics import batch_of, imitate
from torch import nn

from dream_hf import DreamDrafter, choose_draft_vocabulary
from dream_hf.decoding.assisted import dream_chain_generate
from dream_hf.drafters import growth
from dream_hf.drafters.dream.state import DrafterState
from dream_hf.drafters.levels import TargetHead
from dream_hf.targets import reduced_head
from dream_hf.targets.target import LogitRule, Target
from dream_hf.training.acceptance_metrics import AcceptanceCounts, count_chain_hits, replay_decoding

TREE = {"tree_depth": 4, "tree_top_k": 3, "tree_size": 12}
NAMES = ["llava_clip_llama", "qwen2_5_vl", "gemma3", "gemma2", "cohere"]  # gemma2 caps its logits, cohere scales them


def every_third(drafter: DreamDrafter) -> list[int]:
    return list(range(0, drafter.config.vocab_size, 3))


def head_of(target, drafter) -> TargetHead:
    view = Target(target)
    return TargetHead(view.embed, view.draft_logits(drafter), drafter.draft_token_ids)


# --- choosing ---


def test_the_most_frequent_tokens_are_chosen_and_ties_go_to_the_lower_id():
    counts = torch.tensor([2, 7, 0, 7, 2, 9, 0, 2])
    assert choose_draft_vocabulary(counts, 3).tolist() == [1, 3, 5]
    assert choose_draft_vocabulary(counts, 5).tolist() == [0, 1, 3, 4, 5]
    assert choose_draft_vocabulary(counts, 7).tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert choose_draft_vocabulary(counts, 8).tolist() == list(range(8))


def test_required_tokens_are_chosen_whatever_their_counts():
    counts = torch.tensor([2, 7, 0, 7, 2, 9, 0, 2])
    assert choose_draft_vocabulary(counts, 3, [6, 1]).tolist() == [1, 5, 6]
    assert choose_draft_vocabulary(counts, 2, [6, 6, 2]).tolist() == [2, 6]


@pytest.mark.parametrize(
    ("size", "required", "message"),
    [(0, [], r"`size` \(0\)"), (9, [], r"`size` \(9\)"), (1, [2, 3], "2 `required_ids`"), (3, [8], r"`required_ids`")],
)
def test_a_choice_that_cannot_be_made_is_refused(size, required, message):
    with pytest.raises(ValueError, match=message):
        choose_draft_vocabulary(torch.ones(8), size, required)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "non-empty"),
        ([1, 2, 2], "without repeats"),
        ([-3, 1], "from -3 to 1"),
        ([1, 10**6], "to 1000000"),
        ([0.5, 1.0], "whole numbers"),
        (torch.tensor([True, False]), "whole numbers"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(token_ids, message):
    drafter = untrained(family("llama").make_target())
    with pytest.raises(ValueError, match=message):
        drafter.set_draft_vocabulary(token_ids)
    assert drafter.draft_token_ids is None and drafter.config.draft_vocab_size is None  # nothing has changed


def test_a_drafter_that_lacks_its_tokens_does_not_draft():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    drafter = untrained(target, draft_vocab_size=20)
    with pytest.raises(ValueError, match="never set"):
        generate(target, inputs, assistant_model=drafter)
    drafter.set_draft_vocabulary(range(20))
    drafter.config.draft_vocab_size = 21
    with pytest.raises(ValueError, match=r"`draft_vocab_size` \(21\)"):
        generate(target, inputs, assistant_model=drafter)
    drafter.set_draft_vocabulary(range(2))
    with pytest.raises(ValueError, match=r"`tree_top_k` \(4\) must not exceed `draft_vocab_size` \(2\)"):
        generate(target, inputs, assistant_model=drafter)
    with pytest.raises(ValueError, match=r"`draft_vocab_size` \(1000000\)"):
        untrained(target, draft_vocab_size=10**6)


# --- the head ---


def wrapped(head: nn.Linear) -> nn.Module:
    """The same head as no plain linear layer: as an adapter, a quantised or a hooked one would be."""

    class Other(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) + 1.0

    other = Other(head.in_features, head.out_features, bias=head.bias is not None)
    other = other.to(head.weight.dtype)
    other.load_state_dict(head.state_dict())
    return other


@pytest.mark.parametrize("kind", ["plain", "bias", "hooked", "other"])
@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(scale=0.25), LogitRule(softcap=3.0)])
def test_reduced_logits_are_the_targets_own(kind, rule):
    target = family("llama").make_target()
    drafter = untrained(target)
    view = Target(target)
    if kind == "bias":
        view.lm_head = nn.Linear(view.lm_head.in_features, view.lm_head.out_features).double()
    elif kind == "hooked":
        view.lm_head.register_forward_hook(lambda module, args, output: output * 2.0)
    elif kind == "other":
        view.lm_head = wrapped(view.lm_head)
    drafter.set_draft_vocabulary(every_third(drafter))
    features = doubles(2, 3, drafter.config.hidden_size)
    with torch.no_grad():
        logits = view.draft_logits(drafter)
        view.logit_rule = rule  # learnt in the prefill, after the head has been asked for
        torch.testing.assert_close(logits(features), view.logits(features)[..., ::3])
    has_copies = view.lm_head in reduced_head._rows.get(drafter, {})
    assert has_copies == (kind in ("plain", "bias"))


def test_rows_follow_the_weights_and_stay_where_they_are():
    target = family("llama").make_target()
    drafter = untrained(target)
    drafter.set_draft_vocabulary(every_third(drafter))
    view, features = Target(target), doubles(1, drafter.config.hidden_size)
    with torch.inference_mode():
        view.draft_logits(drafter)
    place = reduced_head._rows[drafter][view.lm_head].weight.data_ptr()
    with torch.no_grad():
        view.lm_head.weight.data.mul_(-2.0)
        torch.testing.assert_close(view.draft_logits(drafter)(features), view.logits(features)[..., ::3])
        assert reduced_head._rows[drafter][view.lm_head].weight.data_ptr() == place
        target.to(torch.bfloat16)
        logits = view.draft_logits(drafter)(features.bfloat16())
        torch.testing.assert_close(logits, view.logits(features.bfloat16())[..., ::3])
    assert place  # a fresh one would have been elsewhere


def test_rows_go_with_the_drafter_and_with_the_target():
    target = family("llama").make_target()
    drafters = [untrained(target) for _ in range(2)]
    for drafter in drafters:
        drafter.set_draft_vocabulary(every_third(drafter))
        Target(target).draft_logits(drafter)
    rows = [weakref.ref(reduced_head._rows[drafter][target.lm_head]) for drafter in drafters]
    drafters.pop(0)
    del drafter
    gc.collect()
    assert rows[0]() is None and rows[1]() is not None
    del target
    gc.collect()
    assert rows[1]() is None


# --- drafting and decoding ---


def test_a_tree_holds_the_likeliest_of_the_tokens_that_may_be_drafted():
    target = family("llama").make_target()
    drafter = untrained(target, **TREE)
    drafter.set_draft_vocabulary(every_third(drafter))
    ids = torch.tensor([[5, 9, 13, 2], [7, 7, 3, 1]])
    with torch.no_grad():
        features = target.model(ids).last_hidden_state
        state = DrafterState(drafter, 2)
        state.read(target.get_input_embeddings()(ids), features[:, :-1], torch.arange(4).expand(2, -1), [4, 4])
        tree = grow(state, head_of(target, drafter), ids[:, -1:], drafter.config)
        first = Target(target).logits(state.root_features)[:, 0].clone()
    assert not (tree.tokens[:, 1:] % 3).any()
    first[:, [token for token in range(first.shape[1]) if token % 3]] = -torch.inf
    for row in range(2):
        drafted = tree.tokens[row][tree.depths[row] == 1].tolist()
        assert set(drafted) <= set(first[row].topk(3).indices.tolist()) and drafted


@pytest.mark.parametrize("name", NAMES)
def test_output_is_that_of_plain_decoding_in_ragged_batches(name):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch_size=3)
    expected = generate(target, inputs, output_logits=True, max_new_tokens=24)
    # The oracle knows the answer; every second token of it cannot be drafted.
    written = expected.sequences[:, -24:].unique()
    for shape in (TREE, CHAIN):
        drafter, _ = oracle(target, inputs, expected.sequences, **shape)
        whole = generate(target, inputs, assistant_model=drafter, max_new_tokens=24)
        drafter.set_draft_vocabulary(written[::2])
        part = generate(target, inputs, assistant_model=drafter, max_new_tokens=24)
        for out in (whole, part):
            assert_same_tokens(expected, out)
            assert_counts_add_up(out, target.generation_config.pad_token_id)
        mean = [sum(map(sum, gains(out))) / sum(map(len, gains(out))) for out in (whole, part)]
        assert 1.0 < mean[1] < mean[0]


def test_sampled_tokens_have_the_targets_distribution():
    target = tiny_llama()
    drafter = untrained(target, tree_depth=3, tree_top_k=2, tree_size=6)
    drafter.set_draft_vocabulary([1, 4, 5])
    inputs = tiny_prompt(target)
    joint = exact_joint(target, inputs, 3, temperature=0.8)
    torch.manual_seed(0)
    draws = draw(target, inputs, 2048, 3, 512, assistant_model=drafter, temperature=0.8)
    assert p_value(draws, joint) >= 1e-3


@pytest.mark.parametrize("name", ["llava_clip_llama", "gemma3"])
def test_all_tokens_draft_as_without_and_simulated_tau_is_that_of_generate(name):
    target = family(name).make_target()
    lengths = [14, 5, 20]
    text = answer(family(name), target, lengths)
    batch, view = batch_of(target, text, 1.0)
    drafter = imitate(target, batch, visual_keep_ratio=1.0, **TREE)
    sizes = drafter.config.vocab_size, len(set(torch.cat(text.answers).tolist())) // 2

    def simulated() -> tuple[list[list[int]], dict[str, float]]:
        counts = AcceptanceCounts(drafter.config.tree_depth)
        head = TargetHead(view.embed, view.draft_logits(drafter), drafter.draft_token_ids)
        found = replay_decoding(drafter, head, batch, counts)
        count_chain_hits(drafter, head, batch, counts)
        return found, counts.metrics()

    def decoded() -> list[list[int]]:
        settings = {"assistant_model": drafter, "eos_token_id": None}
        outs = [
            generate(target, prompt, max_new_tokens=n, **settings)
            for prompt, n in zip(text.prompts, lengths, strict=True)
        ]
        for out, tokens in zip(outs, text.answers, strict=True):
            assert out.sequences[0, -len(tokens) :].tolist() == tokens.tolist()
        return [gains(out)[0] for out in outs]

    whole = simulated()
    assert decoded() == whole[0]
    counts = torch.bincount(torch.cat(text.answers), minlength=sizes[0])
    drafter.set_draft_vocabulary(choose_draft_vocabulary(counts, sizes[0]))
    assert simulated() == whole and decoded() == whole[0]
    drafter.set_draft_vocabulary(choose_draft_vocabulary(counts, max(sizes[1], 3)))
    part = simulated()
    assert decoded() == part[0] and part[1]["tau"] < whole[1]["tau"]  # half of what is right cannot be drafted
    assert part[1]["top_k_depth_1"] < whole[1]["top_k_depth_1"]
    drafter.set_draft_vocabulary(None)
    assert simulated() == whole and decoded() == whole[0]


def test_chains_in_transformers_own_loop_draft_from_it_too(monkeypatch):
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    drafter = untrained(target)
    drafter.set_draft_vocabulary(every_third(drafter))
    trees = []

    def keeping(*args):
        trees.append(growth.grow_tree(*args))
        return trees[-1]

    monkeypatch.setattr("dream_hf.drafters.lazy_session.grow_tree", keeping)
    expected = generate(target, inputs, max_new_tokens=12).sequences
    settings = {"custom_generate": dream_chain_generate, "drafter": drafter, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(target.generate(**inputs, **settings), expected)
    assert trees and not any((tree.tokens[:, 1:] % 3).any() for tree in trees)
