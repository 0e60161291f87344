"""Trees that stop growing, and leave nodes out, where the drafter expects little."""

import math
from dataclasses import replace

import pytest
import torch
from families import family
from grown import grow

import dream_hf  # noqa: F401
from dream_hf import DreamConfig, DreamDrafter
from dream_hf.drafters import growth as drafting
from dream_hf.drafters.dream.state import DrafterState
from dream_hf.drafters.levels import SlotLevel, TargetHead
from dream_hf.drafters.visibility import bias_of
from dream_hf.runtime import crossings
from dream_hf.targets.target import Target


@pytest.fixture
def grown():
    """Grows a tree below a short random text, given settings of the config."""
    model = family("llama").make_target()
    target = Target(model)
    torch.manual_seed(0)
    drafter = DreamDrafter.for_target(model)
    head = TargetHead(target.embed, lambda features: target.logits(features) / 4)
    ids = torch.randint(5, 90, (1, 9))

    def grown_tree(ends=(), max_depth=None, **settings):
        for name, value in settings.items():
            setattr(drafter.config, name, value)
        state = DrafterState(drafter, 1)
        with torch.no_grad():
            state.read(target.embed(ids), torch.randn(1, 8, 32), torch.arange(9)[None], [9])
            ending = replace(head, ends=frozenset(ends))
            return grow(state, ending, ids[:, -1:], drafter.config, max_depth), state

    return grown_tree


def test_nothing_is_left_out_by_default(grown):
    tree, state = grown(tree_size=20)
    assert tree.num_nodes == 21 and tree.max_depth == 6
    assert state.tokens.tentative == state.features.tentative == 0


def test_unlikely_nodes_are_left_out(grown):
    full, _ = grown(tree_size=84)
    sizes = []
    for threshold in (1e-9, 1e-4, 1e-3, 1e-2, 0.99):
        tree, _ = grown(tree_size=84, tree_min_node_probability=threshold)
        sizes.append(tree.num_nodes)
        kept = {tuple(tree.tokens[0, tree.ancestors[0, i]].tolist()) for i in range(tree.num_nodes)}
        assert kept <= {tuple(full.tokens[0, full.ancestors[0, i]].tolist()) for i in range(full.num_nodes)}
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == full.num_nodes and sizes[-1] == 2  # at least one drafted token remains
    assert len(set(sizes)) > 2


def planted(log_probs, top_k=2):
    """Candidates of levels of these log-probabilities, all rows alike: every node below the first node of its level."""
    found = drafting._Candidates()
    for level, scores in enumerate(log_probs):
        rows = torch.tensor(scores)
        parents = torch.full((len(rows), 1), 0 if level else -1)
        found.tokens.append(torch.arange(level * top_k, (level + 1) * top_k).expand(len(rows), -1))
        found.scores.append(rows)
        found.parents.append(parents)
    return found


def best_tree(found, num_rows, config):
    return drafting._best_tree(found, torch.zeros(num_rows, 1, dtype=torch.long), config, found.places())


@pytest.mark.parametrize("depth", [2, 20, 128])
def test_a_threshold_means_the_same_at_every_level(depth):
    """A chain all of whose nodes are reached with 0.151, and one with 0.149: at any level."""
    config = DreamConfig(tree_depth=depth, tree_top_k=2, tree_size=depth, tree_min_node_probability=0.15)
    likely, unlikely = math.log(0.151), math.log(0.149)
    levels = [[[likely, unlikely]]] * depth
    tree = best_tree(planted(levels), 1, config)
    assert tree.num_nodes == depth + 1 and int(tree.depths.max()) == depth
    levels = [[[likely, unlikely]]] * (depth - 1) + [[[unlikely, unlikely]]]
    tree = best_tree(planted(levels), 1, config)
    assert tree.num_nodes == depth and int(tree.depths.max()) == depth - 1


def test_likely_nodes_go_before_unlikely_ones_and_rows_fill_up():
    """Of two rows one has two likely nodes, deep down; the other none, and gets its two best."""
    config = DreamConfig(tree_depth=60, tree_top_k=2, tree_size=59, tree_min_node_probability=0.15)
    likely, unlikely = math.log(0.1501), math.log(0.1499)
    levels = [[[likely, unlikely], [unlikely, -9.0]]] * 58 + [[[unlikely, -9.0], [unlikely, -9.0]]]
    tree = best_tree(planted(levels), 2, config)
    assert tree.num_nodes == 59
    assert int(tree.depths[0].max()) == 58 and int(tree.depths[1].max()) == 58


def test_growth_stops_at_unlikely_levels(grown):
    depths = []
    for threshold in (0.0, 1e-3, 1e-2, 0.1, 0.999):
        tree, state = grown(tree_min_level_probability=threshold)
        depths.append(tree.max_depth)
        assert state.tokens.tentative == 0
        assert int(tree.depths.max()) <= tree.max_depth
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == 6 and depths[-1] == 1
    assert len(set(depths)) > 2


def test_nothing_is_drafted_below_an_end(grown):
    free, _ = grown(tree_size=84, tree_min_node_probability=1e-9)
    ends = {int(free.tokens[0, 1]), int(free.tokens[0, 9])}
    below = {int(token) for node in range(84) for token in free.tokens[0, free.ancestors[0, node]][:-1]}
    assert ends & below  # so that there is something to leave out
    tree, _ = grown(ends, tree_size=84, tree_min_node_probability=1e-9)
    parents = {int(tree.tokens[0, parent]) for parent in tree.parents[0, 1:].tolist() if parent}
    assert not ends & parents and ends & set(tree.tokens[0].tolist())
    assert tree.num_nodes > 20  # the others lead on
    everything, state = grown(set(range(100)), tree_size=84, tree_min_node_probability=1e-9)
    assert everything.max_depth == 1 and state.tokens.tentative == 0


@pytest.mark.parametrize("max_depth", [0, 1, 3, 6, 9])
def test_no_more_levels_than_can_be_of_use(grown, max_depth):
    tree, state = grown(max_depth=max_depth, tree_top_k=1)
    assert tree.max_depth == int(tree.depths.max()) == min(max_depth, 6)
    assert state.tokens.tentative == 0


@pytest.mark.parametrize("limit", [2, 3, 5])
def test_levels_beyond_the_longest_text_are_not_drafted(limit):
    made = family("llama")
    target = made.make_target()
    inputs = made.make_inputs(target)
    drafter = DreamDrafter.for_target(target)
    levels = []
    run = DrafterState.next_level

    def spy(self, head, level, places, depth, top_k):
        levels.append(depth)
        return run(self, head, level, places, depth, top_k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DrafterState, "next_level", spy)
        result = target.generate(**inputs, assistant_model=drafter, max_new_tokens=limit, do_sample=False)
    assert torch.equal(result, target.generate(**inputs, max_new_tokens=limit, do_sample=False))
    assert max(levels, default=0) <= max(limit - 3, 0)  # the prefill and the target give a token each


@pytest.mark.parametrize("batch_size", [1, 3])
def test_output_is_exact(batch_size):
    made = family("gemma3")
    target = made.make_target()
    inputs = made.make_inputs(target, batch_size=batch_size)
    plain = target.generate(**inputs, max_new_tokens=40, do_sample=False)
    thresholds = {"tree_min_level_probability": 0.02, "tree_min_node_probability": 0.001}
    drafter = DreamDrafter.for_target(target, **thresholds)
    result = target.generate(
        **inputs, assistant_model=drafter, max_new_tokens=40, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(result.sequences, plain)
    drafted = result.drafted_lengths[result.drafted_lengths >= 0]
    assert drafted.max() < 32


def test_accelerators_are_rarely_asked(grown, monkeypatch):
    """Where reading waits, one level in four is looked at, with thresholds; what is unlikely is what is left out first."""
    asked, own = [], torch.Tensor.__bool__
    on_host, _ = grown(tree_size=84, tree_min_node_probability=1e-3)
    monkeypatch.setattr(crossings, "reads_wait", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: asked.append(1) or own(self))
    for name in ("tolist", "item", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, None)
    far, _ = grown(tree_size=84, tree_min_node_probability=1e-3)
    monkeypatch.undo()
    assert far.max_depth == 4 and far.num_nodes == 1 + 4 + 3 * 16 and len(asked) == 1  # all that was found by then

    def texts(tree) -> set[tuple[int, ...]]:
        return {tuple(tree.tokens[0, tree.ancestors[0, node]].tolist()) for node in range(tree.num_nodes)}

    assert texts(on_host) < texts(far)
    monkeypatch.setattr(crossings, "reads_wait", lambda device: True)
    assert grown(tree_min_level_probability=0.999, tree_min_node_probability=0.0)[0].max_depth == 4


@pytest.mark.parametrize("name", ["tree_min_level_probability", "tree_min_node_probability"])
def test_thresholds_are_probabilities(name):
    with pytest.raises(ValueError, match=rf"`{name}` \(1.5\)"):
        DreamConfig(**{name: 1.5})


@pytest.mark.parametrize("places", [[0, 1, 2, 3], [0, 1], [1], [0, 2], [1, 2, 3]])
def test_beams_see_what_their_parents_saw(places):
    """The beams chosen are written to the first slots, whichever they are, and see those slots besides."""
    torch.manual_seed(0)
    own = torch.arange(20, 24).view(1, 4, 1).repeat(2, 1, 1)
    seen = bias_of(torch.rand(2, 4, 30) < 0.5, torch.float32)
    seen[..., 20:] = -torch.inf
    features, before = torch.rand(2, 4, 3), seen.clone()
    tokens, scores = torch.randint(99, (2, 12)), torch.rand(2, 12)
    best = scores.topk(4, dim=-1).indices
    level = SlotLevel(tokens, scores, best, tokens.gather(1, best), scores.gather(1, best), features, seen, own)
    beams, everything = level.beams(places), level.all_beams(places)
    for row in range(2):
        nodes = best[row, places]
        assert torch.equal(beams.tokens[row], tokens[row, nodes])
        assert torch.equal(beams.scores[row], scores[row, nodes])
        assert torch.equal(beams.features[row], features[row, places])
        expected = seen[row, places].scatter(1, own[row, : len(places)], 0.0)
        assert torch.equal(beams.sees[row], expected)
        is_likely = everything.scores[row].isfinite()
        assert is_likely.nonzero()[:, 0].tolist() == places
        assert torch.equal(everything.scores[row, is_likely], beams.scores[row])
    assert torch.equal(beams.own, own) and torch.equal(seen, before)
