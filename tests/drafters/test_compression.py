"""Which visual tokens are kept: by novelty, evenly, as means of runs; none of it takes attention maps."""

import math

import pytest
import torch
from double import TIGHT, doubles
from families import family
from lossless import assert_same_tokens, generate, untrained

from dream_hf import DreamConfig, DreamDrafter
from dream_hf.decoding import prompt
from dream_hf.drafters.dream import session
from dream_hf.drafters.dream.compression import compress_text, even_runs, mean_of_runs, novelty, tokens_to_keep


def slow_novelty(features, is_visual):
    """1 less the largest cosine to an earlier visual token, pair by pair; 0 at tokens of text."""
    values = torch.zeros(features.shape[:2], dtype=torch.float64)
    for row, directions in enumerate(features.double() / features.double().norm(dim=-1, keepdim=True)):
        for column, one in enumerate(directions):
            if is_visual[row, column]:
                earlier = [float(one @ directions[other]) for other in range(column) if is_visual[row, other]]
                values[row, column] = 1 - max(earlier, default=-1.0)
    return values


@pytest.mark.parametrize("num_compared", [1, 60, 2**22], ids=["one by one", "in chunks", "at once"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_novelty_equals_a_slow_count(share, num_compared):
    generator = torch.Generator().manual_seed(0)
    features = doubles(3, 13, 6, generator=generator) * 5
    is_visual = torch.rand(3, 13, generator=generator) < share
    found = novelty(features, is_visual, num_compared)
    torch.testing.assert_close(found, slow_novelty(features, is_visual), **TIGHT)


def test_of_several_alike_the_first_is_kept():
    """Three kinds of patches, each several times, at any length of the vectors."""
    kinds = torch.randperm(12, generator=torch.Generator().manual_seed(1)) % 3
    features = torch.eye(5)[kinds] * torch.arange(1, 13)[:, None]
    is_visual = torch.ones(1, 12, dtype=torch.bool)
    kept = tokens_to_keep(novelty(features[None], is_visual), is_visual, 3 / 12)
    first = [kinds.tolist().index(kind) for kind in range(3)]
    assert sorted(first) == kept[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("name", ["llava_clip_llama", "gemma3", "qwen2_vl"])
def test_decoding_by_novelty_observes_no_attention(monkeypatch, name):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch_size=2)
    drafter = DreamDrafter.for_target(target, visual_importance="novelty", visual_keep_ratio=0.5)
    kept = []
    compress = session.compress_text

    def spy(embeds, features, real, is_visual, *args):
        text = compress(embeds, features, real, is_visual, *args)
        real = real[:, -is_visual.shape[1] :]
        by_novelty = real & tokens_to_keep(novelty(features, is_visual), is_visual, 0.5)
        for order, count, row in zip(text.order, text.counts, by_novelty, strict=True):
            assert torch.equal(order[:count], row.nonzero().flatten())
        kept.append((is_visual.sum(-1), text.counts - (real & ~is_visual).sum(-1)))
        return text

    def never(*_):
        raise AssertionError("attention was observed")

    monkeypatch.setattr(session, "compress_text", spy)
    monkeypatch.setattr(prompt, "observe_attention", never)
    expected = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(
        target.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=drafter), expected
    )
    ((num_visual, num_kept),) = kept
    assert torch.equal(num_kept, (num_visual * 0.5).ceil().long()) and num_kept.min() > 0


@pytest.mark.parametrize("ratio", [1.0, 0.6, 1 / 3, 0.05])
@pytest.mark.parametrize("num_visual", [0, 1, 5, 12])
def test_runs_are_even_and_end_at_the_last_token(num_visual, ratio):
    is_visual = torch.zeros(2, 20, dtype=torch.bool)
    is_visual[0, 3 : 3 + num_visual] = True
    is_visual[1, torch.tensor([1, 2, 9, 10, 11])] = True
    runs, ends = even_runs(is_visual, ratio)
    for row in range(2):
        found = runs[row][is_visual[row]].tolist()
        count = math.ceil(len(found) * ratio - 1e-6)
        sizes = [found.count(run) for run in range(count)]
        assert found == sorted(found) and sum(sizes) == len(found) and (not sizes or max(sizes) - min(sizes) <= 1)
        last = [len(found) - 1 - found[::-1].index(run) for run in range(count)]
        assert ends[row][is_visual[row]].nonzero().flatten().tolist() == last
        assert (runs[row][~is_visual[row]] == -1).all() and not ends[row][~is_visual[row]].any()


def test_means_take_the_place_of_runs():
    states = doubles(2, 7, 3, generator=torch.Generator().manual_seed(0))
    runs = torch.tensor([[-1, 0, 0, -1, 1, 1, 1], [-1, -1, -1, -1, -1, -1, -1]])
    means = mean_of_runs(states, runs)
    torch.testing.assert_close(means[0, 1], states[0, 1:3].mean(0), **TIGHT)
    torch.testing.assert_close(means[0, 5], states[0, 4:].mean(0), **TIGHT)
    assert torch.equal(means[0, [0, 3]], states[0, [0, 3]]) and torch.equal(means[1], states[1])


@pytest.mark.parametrize("ratio", [0.5, 0.05, 0.0])
@pytest.mark.parametrize("importance", ["uniform", "pool", "attention"])
def test_texts_without_most_of_a_picture(importance, ratio):
    """Counts, positions that rise, all text as it was; pooling changes what is read and not where it stands."""
    generator = torch.Generator().manual_seed(1)
    embeds, features = (doubles(2, 24, 4, generator=generator) for _ in range(2))
    real = torch.ones(2, 24, dtype=torch.bool)
    real[1, :5] = False
    is_visual = torch.zeros(2, 24, dtype=torch.bool)
    is_visual[0, 2:14], is_visual[1, 7:10] = True, True
    received = torch.rand(2, 24, generator=generator)
    text = compress_text(embeds, features, real, is_visual, ratio, importance, received if ratio else None)
    for row, num_text in enumerate((12, 16)):
        count = int(text.counts[row])
        assert count == num_text + math.ceil(int(is_visual[row].sum()) * ratio)
        assert text.positions[row, :count].diff().min() > 0
        order = text.order[row, :count]
        is_text = ~is_visual[row, order]
        assert is_text.sum() == num_text
        assert torch.equal(text.features[row, :count][is_text], features[row, order][is_text])
        if importance != "pool":
            assert torch.equal(text.embeds[row, :count], embeds[row, order])
        elif ratio == 0.5 and row == 0:
            first = order[~is_text][0]  # of two neighbours
            torch.testing.assert_close(text.embeds[row, 2], embeds[row, first - 1 : first + 1].mean(0), **TIGHT)


@pytest.mark.parametrize("importance", ["uniform", "pool"])
@pytest.mark.parametrize("ratio", [0.3, 0.05, 0.0])
def test_decoding_with_few_visual_tokens_is_lossless(monkeypatch, importance, ratio):
    each = family("qwen2_vl")
    target = each.make_target()
    inputs = each.make_inputs(target, 3, images=[1, 0, 2])
    drafter = untrained(target, visual_keep_ratio=ratio, visual_importance=importance)
    monkeypatch.setattr(prompt, "observe_attention", lambda *_: pytest.fail("attention was observed"))
    expected = generate(target, inputs, max_new_tokens=12)
    assert_same_tokens(expected, generate(target, inputs, max_new_tokens=12, assistant_model=drafter))


def test_importance_is_one_of_four():
    with pytest.raises(
        ValueError, match=r"`visual_importance` \('size'\) must be one of \['attention', 'novelty', 'uni"
    ):
        DreamConfig(visual_importance="size")
    assert DreamConfig().visual_importance == "attention"
