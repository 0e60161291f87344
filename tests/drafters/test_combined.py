"""Several drafters' suggestions in one tree: exact, within one budget, and each drafter told what it wants to know."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from distributions import tiny_llama
from eagle_reference import LAYOUTS
from families import family
from fuzz import FuzzDrafter
from lossless import NUM_NEW, assert_counts_add_up, assert_same_tokens, gains, generate, oracle, stop_tokens, untrained
from test_sampling import LIMIT, p_values

import dream_hf
from dream_hf import CombinedDrafter, LayerSkipDrafter, ModelDrafter, RetrievalDrafter
from dream_hf.compat import CACHE, cache_of
from dream_hf.decoding.drafter import DrafterAround
from dream_hf.decoding.settings import DraftSettings
from dream_hf.decoding.tree import DraftTree
from dream_hf.drafters import combined
from dream_hf.drafters.best_first import best_nodes
from dream_hf.drafters.opinions import Opinion, Panel, agreed_nodes, opinions_of

TREE = {"tree_depth": 3, "tree_top_k": 3, "tree_size": 8}
SMALL = DraftSettings(tree_depth=4, tree_top_k=3, tree_size=12)


def teams(target, inputs, known):
    """Drafters that want to see different things of the target."""
    retrieval = RetrievalDrafter(draft_text=known[:, -NUM_NEW:], settings=SMALL)
    yield [retrieval, untrained(target, **TREE)]
    yield [untrained(target, tree_depth=3, tree_top_k=3), oracle(target, inputs, known)[0]]
    yield [ModelDrafter(target, settings=SMALL), FuzzDrafter(range(3, 90), known, seed=3), retrieval]
    yield [LayerSkipDrafter(target, skip=["1.mlp"], settings=SMALL), ModelDrafter(target, settings=SMALL)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llava_clip_llama", "gemma3", "qwen2_vl"])
def test_any_team(name, batch):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch, text_len=24)
    known = generate(target, inputs).sequences
    for team in teams(target, inputs, known):
        for settings in ({}, {"eos_token_id": stop_tokens(known)}, {"repetition_penalty": 1.4, "max_new_tokens": 9}):
            expected = generate(target, inputs, **settings)
            combined = CombinedDrafter(team, SMALL)
            out = generate(target, inputs, assistant_model=combined, **settings)
            assert_same_tokens(expected, out)
            assert_counts_add_up(out)
            assert int(out.drafted_lengths.max()) <= SMALL.tree_size


@pytest.mark.parametrize("compiled", [False, True])
def test_features_of_different_layers(tmp_path, compiled):
    """EAGLE-3 reads three layers, DREAM the last features, retrieval none, and each gets its own."""
    layout = next(each for each in LAYOUTS if each.name == "eagle3")
    target = family(layout.family).make_target()
    inputs = family(layout.family).make_inputs(target, 3)
    eagle = dream_hf.load_drafter(layout.publish(tmp_path / "eagle"), target)
    expected = generate(target, inputs)
    known = RetrievalDrafter(draft_text=expected.sequences[:, -NUM_NEW:])
    settings = SMALL.changed(compile=compiled)
    for team in ([known, eagle], [eagle, untrained(target, **TREE)], [untrained(target, **TREE), known, eagle]):
        out = generate(target, inputs, assistant_model=CombinedDrafter(team, settings))
        assert_same_tokens(expected, out)
    alone = generate(target, inputs, assistant_model=eagle.with_settings(tree_depth=4, tree_top_k=3, tree_size=12))
    team = CombinedDrafter([untrained(target, tree_depth=1, tree_top_k=1, tree_size=1), eagle], SMALL)
    assert sum(map(len, gains(generate(target, inputs, assistant_model=team)))) <= 1.2 * sum(map(len, gains(alone)))


def test_samples_have_the_target_s_distribution():
    target = tiny_llama()
    team = [
        RetrievalDrafter(num_likeliest=3, settings=SMALL),
        ModelDrafter(target, settings=DraftSettings(tree_depth=2, tree_top_k=2)),
    ]
    assert (
        min(p_values(target, CombinedDrafter(team, DraftSettings(tree_depth=3, tree_size=6)), temperature=1.0)) > LIMIT
    )


def test_chats_go_on_with_those_that_can():
    target = family("llama").make_target()
    first = {"input_ids": family("llama").make_inputs(target, 1)["input_ids"]}
    seen = []

    class Watching(DrafterAround):
        def start(self, prefill, settings):
            seen.append(prefill.earlier)
            return super().start(prefill, settings)

    drafter = CombinedDrafter([Watching(RetrievalDrafter()), ModelDrafter(target), Watching(untrained(target))])
    ours = generate(target, first, max_new_tokens=20, assistant_model=drafter)
    turn = {"input_ids": torch.cat([ours.sequences, first["input_ids"][:, 2:7]], dim=1)}
    expected = generate(target, turn)
    assert_same_tokens(expected, generate(target, turn, assistant_model=drafter, **{CACHE: cache_of(ours)}))
    assert seen[:2] == [None, None] and None not in seen[2:]


def test_a_team_is_as_good_as_its_best():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    known = generate(target, inputs).sequences
    right = ModelDrafter(target, settings=DraftSettings(tree_depth=4, tree_top_k=1))
    wrong = FuzzDrafter(range(3, 90), seed=1)
    alone = gains(generate(target, inputs, assistant_model=right))
    for team in ([wrong, right], [right, wrong]):  # the one that is right is found out
        out = generate(target, inputs, assistant_model=CombinedDrafter(team, DraftSettings(tree_depth=4, tree_size=8)))
        assert torch.equal(out.sequences, known)
        assert len(gains(out)[0]) <= len(alone[0]) + 2


def chain(*tokens_and_shares):
    opinion = root = Opinion()
    for token, share in tokens_and_shares:
        opinion.shares[token] = share
        opinion.after[token] = opinion = Opinion()
    return root


def test_who_gains_too_little_pauses_and_the_others_go_on(monkeypatch):
    """Pauses are each drafter's own, by what its own drafts would have gained."""
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    known = generate(target, inputs).sequences
    poor, drafts = untrained(target, pause_below=1.9, **TREE), []
    start = type(poor).start

    def counted(self, prefill, settings):
        session = start(self, prefill, settings)
        own = session.draft
        session.draft = lambda *args: drafts.append(1) or own(*args)
        return session

    monkeypatch.setattr(type(poor), "start", counted)
    retrieval = RetrievalDrafter(draft_text=known[:, -NUM_NEW:], settings=replace(SMALL, tree_depth=1))
    alone = generate(target, inputs, assistant_model=retrieval)
    combined = CombinedDrafter([retrieval, poor], SMALL)
    together = generate(target, inputs, assistant_model=combined)
    assert_same_tokens(alone, together)
    num_steps = together.accepted_lengths.shape[1]
    assert num_steps <= alone.accepted_lengths.shape[1] and 2 <= len(drafts) <= num_steps / 2
    assert CombinedDrafter([retrieval, poor]).settings.pause_below == 0


def test_plain_steps_say_nothing_about_drafters(monkeypatch):
    """Where the whole team pauses, nobody is judged by what was drafted before."""
    noted, drafts = [], []

    class Noting(combined.DraftSchedule):
        def note(self, gained):
            noted.extend([gained] if len(gained) else [])
            super().note(gained)

    class Counting(FuzzDrafter):
        def start(self, prefill, settings):
            session = super().start(prefill, settings)
            own = session.draft
            session.draft = lambda *args: drafts.append(1) or own(*args)
            return session

    monkeypatch.setattr(combined, "DraftSchedule", Noting)
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    team = CombinedDrafter([Counting(range(3, 90), seed=1)], SMALL.changed(pause_below=4.0))
    out = generate(target, inputs, assistant_model=team)
    assert (out.drafted_lengths == 0).any()  # there were pauses
    assert len(noted) == len(drafts) > 2


def test_the_trusted_count_and_others_share_the_rest():
    panel = Panel(2)
    first, second = chain((5, 0.5), (7, 0.9)), chain((5, 0.8), (6, 0.9))
    second.shares[9], second.after[9] = 0.2, Opinion()
    wide = DraftSettings(tree_depth=4, tree_top_k=4, tree_size=10)
    nodes = agreed_nodes([first, second], wide, 4, frozenset())
    found = dict(zip(zip(nodes.depths, nodes.tokens, strict=True), nodes.probabilities, strict=True))
    expected = {(1, 5): 0.5, (1, 9): 0.5 * 0.2, (2, 7): 0.5 * 0.9, (2, 6): 0.5 * 0.1 * 0.9}
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[key], expected[key]) for key in found)
    small = agreed_nodes([first, second], wide.changed(tree_size=2), 4, frozenset())
    assert small.tokens == [5, 7]
    before = list(panel.trust)
    panel.judge({0: first, 1: second}, [9, 9])  # the second has named it, with a small share; the first has not
    assert panel.trust[1] - panel.trust[0] > (before[1] - before[0]) * 0.9
    assert math.isclose(first.room(4, frozenset()), 0.5) and math.isclose(first.room(2, frozenset()), 0.5)
    assert math.isclose(chain((5, 0.9), (7, 0.9)).room(4, frozenset([7])), 0.1)


def test_opinions_are_read_off_trees():
    tokens = torch.tensor([[1, 5, 6, 5, 1], [2, 5, 7, 2, 2]])
    parents = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 1, 0, 0]])
    tree = DraftTree.from_parents(tokens, parents, 2)
    assert math.isclose(opinions_of(tree)[0].after[5].shares[6], 0.5, rel_tol=1e-6)  # where nothing is said
    scored = replace(tree, log_probs=torch.tensor([[0, -1.0, -3.0, -2.0, -math.inf]] * 2))
    rows = opinions_of(scored)
    assert list(rows[0].shares) == [5] and list(rows[1].shares) == [5, 2]  # of equal siblings the first
    assert math.isclose(rows[0].after[5].shares[6], math.exp(-2.0), rel_tol=1e-6)


def test_settings_and_refusals():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    drafter = CombinedDrafter([RetrievalDrafter(), untrained(target, tree_depth=3)])
    assert drafter.settings.tree_depth == 3 and drafter.with_settings(tree_size=5).settings.tree_size == 5
    with pytest.raises(ValueError, match="`drafters` is empty"):
        CombinedDrafter([])
    with pytest.raises(TypeError, match="`drafters` has a `str`, which is no drafter"):
        CombinedDrafter(["retrieval"])
    other = family("gemma2").make_target()
    with pytest.raises(ValueError, match="asked to draft for another model"):
        generate(target, inputs, assistant_model=CombinedDrafter([RetrievalDrafter(), LayerSkipDrafter(other)]))
    assert dream_hf.CombinedDrafter is CombinedDrafter


def test_what_cannot_follow_is_left_out():
    """A drafter may be so sure of one token that others have no probability that a number can hold."""
    settings = DraftSettings(tree_depth=3, tree_top_k=2, tree_size=8, tree_min_node_probability=0.0)

    def following(state, token, min_share):
        assert min_share == 0.0
        return state, [(5, 1.0), (6, 0.0)]

    assert best_nodes(following, None, settings, 3).tokens == [5, 5, 5]
