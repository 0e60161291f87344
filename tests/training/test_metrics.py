"""Simulated tau: replaying decoding along an answer equals decoding it."""

import math

import pytest
import torch
from answered import answer
from families import family
from oracle import make_oracle, make_plan

from dream_hf.drafters.dream.drafter import DreamDrafter
from dream_hf.drafters.levels import TargetHead
from dream_hf.targets.target import Target
from dream_hf.training.acceptance_metrics import AcceptanceCounts, count_chain_hits, replay_decoding
from dream_hf.training.target_features import DrafterBatch, FeatureExtractor, LayerSelection

LENGTHS = [14, 5, 20]
TREES = [{"tree_depth": 4, "tree_top_k": 3, "tree_size": 12}, {"tree_depth": 5, "tree_top_k": 1, "tree_size": 5}]


def batch_of(target, text, keep_ratio):
    extractor = FeatureExtractor(Target(target), LayerSelection("none"), keep_ratio)
    return extractor.drafter_batch(text.inputs, text.answer_mask), extractor.target


def measured(target, drafter, text, row):
    """`accepted_lengths` of `generate()` on a row's prompt, for the same number of tokens."""
    out = target.generate(
        **text.prompts[row],
        assistant_model=drafter,
        max_new_tokens=len(text.answers[row]),
        do_sample=False,
        return_dict_in_generate=True,
    )
    return [length for length in out.accepted_lengths[0].tolist() if length >= 0]


def imitate(target, batch, **config):
    """A drafter fitted to a batch's answers, so that it is right now and then."""
    torch.manual_seed(0)
    drafter = DreamDrafter.for_target(target, **config).train()
    head = target.get_output_embeddings()
    following = batch.token_ids.roll(-1, dims=1)[batch.predicts]
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    for _ in range(40):
        features = torch.nn.functional.pad(batch.text.features, (0, 0, 0, 0))[:, :-1]
        hidden = drafter(batch.text.embeds, features, position_ids=batch.text.positions).last_hidden_state
        loss = torch.nn.functional.cross_entropy(head(hidden[batch.predicts]), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return drafter.eval()


@pytest.mark.parametrize("tree", TREES, ids=["tree", "chain"])
@pytest.mark.parametrize("name", ["llava_clip_llama", "qwen2_5_vl", "gemma3"])
def test_replayed_steps_are_those_of_generate(name, tree):
    target = family(name).make_target()
    text = answer(family(name), target, LENGTHS)
    batch, view = batch_of(target, text, 0.5)
    drafter = imitate(target, batch, visual_keep_ratio=0.5, **tree)
    counts = AcceptanceCounts(tree["tree_depth"])
    gains = replay_decoding(drafter, TargetHead(view.embed, view.logits), batch, counts)
    assert gains == [measured(target, drafter, text, row) for row in range(len(LENGTHS))]
    every = [gain for row in gains for gain in row]
    assert len(set(every)) > 2  # right now and then
    assert counts.metrics()["tau"] == pytest.approx(sum(every) / len(every))
    assert [sum(row) for row in gains] == [length - 1 for length in LENGTHS]


def test_rates_by_depth_are_those_of_the_trees():
    counts = AcceptanceCounts(3, num_steps=4, num_gained=8, reached=[4, 2, 1], accepted=[2, 1, 0])
    metrics = counts.metrics()
    assert metrics == {"tau": 2.0, "accept_depth_1": 0.5, "accept_depth_2": 0.5, "accept_depth_3": 0.0}
    assert AcceptanceCounts.from_flat(3, counts.flat()) == counts
    assert list(AcceptanceCounts(3).metrics()) == ["tau"] and math.isnan(AcceptanceCounts(3).metrics()["tau"])


def test_oracle_is_accepted_as_planned():
    """Counts against a drafter whose mistakes are known."""
    target = family("llama").make_target()
    text = answer(family("llama"), target, [25])
    sequences = torch.cat([text.prompts[0]["input_ids"], text.answers[0][None]], dim=1)
    plan = make_plan(sequences, text.prompts[0]["attention_mask"], depth=3)
    drafter = make_oracle(target, plan, tree_depth=3, tree_top_k=2, tree_size=8)
    batch, view = batch_of(target, text, 1.0)
    counts = AcceptanceCounts(3)
    (gains,) = replay_decoding(drafter, TargetHead(view.embed, view.logits), batch, counts)
    assert gains[:-1] == plan.gains[0][: len(gains) - 1] and sum(gains) == 24
    sure = [
        sum(gain > depth + 1 for gain in gains[:-1]) for depth in range(3)
    ]  # the last one is cut by the answer's end
    assert all(least <= found <= least + 1 for least, found in zip(sure, counts.accepted, strict=True))


def test_several_answers_in_a_row_are_decoded_one_after_the_other():
    target = family("llama").make_target()
    text = answer(family("llama"), target, [12, 9])
    batch, view = batch_of(target, text, 1.0)
    drafter = imitate(target, batch, tree_depth=3, tree_top_k=2, tree_size=6)
    predicts = batch.predicts.clone()
    first = int(predicts[0].nonzero()[0])
    predicts[0, first + 5 : first + 7] = False  # answers of 5 and 5 tokens
    predicts[1, predicts[1].nonzero().flatten()[1:3]] = False  # of one token, which no tree precedes, and of 6
    batch = DrafterBatch(batch.text, batch.token_ids, predicts, None)
    gains = replay_decoding(drafter, TargetHead(view.embed, view.logits), batch, AcceptanceCounts(3))
    assert [sum(row) for row in gains] == [4 + 4, 5]


def test_chain_hits_equal_a_count_by_hand():
    target = family("llava_clip_llama").make_target()
    text = answer(family("llava_clip_llama"), target, [8, 6])
    batch, view = batch_of(target, text, 1.0)
    drafter = imitate(target, batch, tree_depth=2, tree_top_k=3, tree_size=6)
    counts = AcceptanceCounts(2)
    count_chain_hits(drafter, TargetHead(view.embed, view.logits), batch, counts)
    assert counts.asked == [7 + 5, 6 + 4]
    with torch.no_grad():
        hidden = drafter(batch.text.embeds, batch.text.features[:, :-1], position_ids=batch.text.positions)
        guesses = view.logits(hidden.last_hidden_state).argsort(-1, descending=True)
    top_1 = top_k = 0
    for row, length in enumerate([8, 6]):
        start = int(batch.predicts[row].nonzero()[0])
        for column in range(start + 1, start + length):
            wanted = batch.token_ids[row, column + 1]
            top_1 += int(guesses[row, column, 0] == wanted)
            top_k += int((guesses[row, column, :3] == wanted).any())
    assert (counts.top_1[0], counts.top_k[0]) == (top_1, top_k) and top_k > 0
