"""Ranking visual tokens by novelty: what it says, and that it takes no attention maps."""

import pytest
import torch
from double import TIGHT, doubles
from families import family

from dream_hf import DreamConfig, DreamDrafter
from dream_hf.decoding import prompt
from dream_hf.drafters.dream import session
from dream_hf.drafters.dream.compression import novelty, tokens_to_keep


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


def test_importance_is_one_of_two():
    with pytest.raises(ValueError, match=r"`visual_importance` \('size'\) must be one of \['attention', 'novelty'\]"):
        DreamConfig(visual_importance="size")
    assert DreamConfig().visual_importance == "attention"
