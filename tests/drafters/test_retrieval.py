"""Retrieval: what is matched, what is drafted, what is kept of earlier answers."""

from __future__ import annotations

import json
import logging
import math
import random
import stat
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from distributions import tiny_llama
from families import family
from lossless import NUM_NEW, assert_same_tokens, gains, generate
from test_sampling import LIMIT, p_values

import dream_hf
from dream_hf import RetrievalDrafter, RetrievalStore
from dream_hf.decoding.drafter import Verified
from dream_hf.decoding.settings import DraftSettings
from dream_hf.decoding.tree import DraftTree
from dream_hf.drafters.best_first import best_nodes, tree_of
from dream_hf.drafters.retrieval.likeliest import LikeliestTokens
from dream_hf.drafters.retrieval.mixture import Mixture, Source
from dream_hf.drafters.retrieval.ngrams import NgramIndex
from dream_hf.drafters.retrieval.text import UNKNOWN, GrowingText, Limits

EVERYTHING = DraftSettings(tree_depth=10, tree_top_k=16, tree_size=48)


def random_text(seed: int, length: int = 160, alphabet: int = 4) -> list[int]:
    generator = random.Random(seed)
    return [UNKNOWN if generator.random() < 0.05 else generator.randrange(alphabet) for _ in range(length)]


def followers(text: list[int], context: list[int], start: int = 0) -> Counter[int]:
    """What follows each occurrence of `context` in `text` from `start` on, by looking at all places."""
    size = len(context)
    places = [place for place in range(start, len(text) - size) if text[place : place + size] == context]
    return Counter(text[place + size] for place in places if text[place + size] >= 0)


def grow_text(prompt: list[int], store: RetrievalStore | None = None, num_tokens: int = 100, **limits) -> GrowingText:
    text = GrowingText(Mixture(), Limits(num_tokens, **limits), store)
    text.read_prompt(prompt)
    return text


def accepted_per_step(out) -> float:
    steps = gains(out)
    return sum(map(sum, steps)) / sum(map(len, steps))


# --- contexts ---


@pytest.mark.parametrize("num_forgotten", [0, 1, 50])
@pytest.mark.parametrize("seed", range(3))
def test_contexts_count_what_followed(seed, num_forgotten):
    text, index = random_text(seed), NgramIndex(4)
    index.extend(text[:120])
    index.forget(num_forgotten)
    index.extend(text[120:])
    other = random_text(seed + 100, 40)
    for match, suffix in ((index.match(), text), *((index.matched(other[:end]), other[:end]) for end in range(4, 40))):
        found = [dict(index.ranked(context)[1]) for context in match]
        assert len(match) <= 5
        for length in range(1, 5):
            context = suffix[-length:]
            expected = followers(text, context, num_forgotten) if UNKNOWN not in context else Counter()
            assert (found[length] if length < len(found) else {}) == expected, (length, context)
    drafted = index.followed(index.matched([0, 1]), 2)
    assert [index.ranked(each) for each in drafted] == [index.ranked(each) for each in index.matched([0, 1, 2])]


def test_probabilities_are_a_mixture():
    text = random_text(7, 300)
    index, other = NgramIndex(6), NgramIndex(6)
    index.extend(text)
    other.extend(random_text(8, 300))
    sources = [Source(index, 2.0), Source(other)]
    for end in range(2, 60):
        matches = [index.matched(text[:end]), other.matched(text[:end])]
        for likeliest in ((), ((3, 0.4), (0, 0.3), (50, 0.2))):
            shares = Mixture().probabilities(sources, matches, likeliest)
            assert all(share > 0 for share in shares.values()) and sum(shares.values()) <= 1 + 1e-9
    long = NgramIndex(6)
    long.extend([1, 2, 3, 4, 5, 6, 7, 8, 1, 9, 5, 1, 9, 5, 9])  # 1 was followed by 9 twice, 8 1 by 9, 2 3 4 by 5
    shares = Mixture().probabilities([Source(long)], [long.matched([2, 3, 4])])
    assert max(shares, key=shares.get) == 5  # the longest context decides


# --- trees ---


def test_the_best_nodes_come_first_and_parents_before_children():
    nodes = grow_text([*random_text(3)[:-1], 1]).draft(EVERYTHING, 10)
    assert 0 < len(nodes.tokens) <= 48 and max(nodes.depths) <= 10
    assert nodes.probabilities == sorted(nodes.probabilities, reverse=True)
    for number, (parent, depth) in enumerate(zip(nodes.parents, nodes.depths, strict=True), 1):
        assert parent < number and depth == (nodes.depths[parent - 1] + 1 if parent else 1)
    edges = list(zip(nodes.parents, nodes.tokens, strict=True))
    assert len(set(edges)) == len(edges)


@pytest.mark.parametrize(
    ("changes", "is_right"),
    [
        ({"tree_size": 5}, lambda nodes: len(nodes.tokens) == 5),
        ({"tree_top_k": 1}, lambda nodes: nodes.parents == list(range(len(nodes.tokens)))),
        ({"tree_min_node_probability": 0.2}, lambda nodes: nodes.probabilities[-1] >= 0.2),
        (
            {"tree_min_level_probability": 0.8},
            lambda nodes: sum(p for p, d in zip(nodes.probabilities, nodes.depths, strict=True)
                              if d == max(nodes.depths) - 1) >= 0.8,
        ),
    ],
    ids=["size", "chain", "node", "level"],
)  # fmt: skip
def test_settings_limit_a_tree(changes, is_right):
    text = grow_text([1, 2, 3, 4, 5, 6, 2, 3, 4, 7, 1, 2, 3])
    everything, limited = text.draft(EVERYTHING, 10), text.draft(EVERYTHING.changed(**changes), 10)
    assert is_right(limited) and 0 < len(limited.tokens) < len(everything.tokens)


def test_nothing_is_drafted_that_cannot_be():
    repeated = [5, 99, 6, 100, 7, 50, 8] * 4
    nodes = grow_text([*repeated, 5], never=frozenset([50]), end_ids=frozenset([6])).draft(EVERYTHING, 6)
    assert 99 in nodes.tokens and not {100, 50, UNKNOWN} & set(nodes.tokens)
    ends = [number for number, token in enumerate(nodes.tokens, 1) if token == 6]
    assert ends and not set(ends) & set(nodes.parents)
    assert not grow_text([]).draft(EVERYTHING, 6).tokens
    assert not grow_text(repeated).draft(EVERYTHING, 0).tokens


def test_rows_of_different_sizes_make_a_tree():
    rows = [grow_text([1, 2, 3, 1]).draft(EVERYTHING, 4), grow_text([]).draft(EVERYTHING, 4)]
    tree = tree_of(torch.tensor([[1], [9]]), rows)
    assert tree.tokens[1].unique().tolist() == [9] and tree.tokens[0, 0] == 1
    assert tree.max_depth == int(tree.depths.max()) == max(rows[0].depths)
    assert tree_of(torch.tensor([[9]]), rows[1:]).num_nodes == 1


def test_equally_probable_states_are_never_compared():
    class State:
        pass

    nodes = best_nodes(lambda state, token, min_share: (state, [(1, 0.5), (2, 0.5)]), State(), EVERYTHING, 3)
    assert len(nodes.tokens) == 2 + 4 + 8 and math.isclose(sum(nodes.probabilities[-8:]), 1)


def test_a_long_text_is_forgotten_from_its_start():
    text = grow_text(list(range(90)) * 2, longest_text=64)
    assert text.index.tokens == list(range(26, 90))
    text.read([1] * 10)
    assert len(text.index.tokens) == 66 and text.index.matched([30])[1:] == []


# --- what the target found likely ---


def test_likeliest_tokens_of_the_first_node_count():
    tree = DraftTree.from_parents(torch.tensor([[5, 6, 6, 5]]), torch.tensor([[0, 0, 1, 0]]), 2)
    rows = torch.arange(8).view(1, 4, 2)
    likeliest = LikeliestTokens()
    likeliest.note(Verified(tree.tokens, [1], tree=tree, likeliest=rows))
    likeliest.note(Verified(tree.tokens, [1]))
    found = {token: [each for each, _ in likeliest.after(token)] for token in (5, 6, 7)}
    assert found == {5: [0, 1], 6: [2, 3], 7: []}
    before = [share for _, share in likeliest.after(6)]
    likeliest.judge([6, 3, 5, 1, 6, 3, 9])  # the second choice was right three times, the first never
    assert [share for _, share in likeliest.after(6)] == [before[0] * 20 / 23, (before[1] * 20 + 3) / 23]
    text = GrowingText(Mixture(), Limits(100), likeliest=likeliest)
    text.read_prompt([6])
    nodes = text.draft(EVERYTHING, 3)
    assert nodes.tokens[0] == 2 and {2, 3} <= set(nodes.tokens)


def test_likeliest_tokens_gain_in_a_text_that_repeats_nothing_before():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target, 3)
    expected = generate(target, inputs)
    outs = [generate(target, inputs, assistant_model=RetrievalDrafter(num_likeliest=number)) for number in (0, 8)]
    for out in outs:
        assert_same_tokens(expected, out)
    assert accepted_per_step(outs[1]) >= accepted_per_step(outs[0])


# --- generate() ---


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "llava_clip_llama", "gemma3", "qwen2_vl"])
def test_a_draft_text_and_a_store_are_found_again(name, batch):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch)
    expected = generate(target, inputs)
    answers = expected.sequences[:, -NUM_NEW:]
    image = getattr(target.config, "image_token_id", None) or 0
    noise = torch.tensor([image, 10**6, -1])  # of pictures, of another vocabulary, of nothing
    store = RetrievalStore()
    assert accepted_per_step(generate(target, inputs, assistant_model=RetrievalDrafter(store))) < 4 or name == "gemma3"
    assert len(store) == batch
    for drafter in (
        RetrievalDrafter(draft_text=torch.cat([noise, answers.flatten(), noise])),
        RetrievalDrafter(store),
    ):
        out = generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW)
        assert_same_tokens(expected, out)
        assert accepted_per_step(out) > 4


def test_a_store_learns_whole_answers_and_only_if_it_is_given():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target, 2)
    store = RetrievalStore()
    target.generate(**inputs, max_new_tokens=20, do_sample=False, assistant_model=RetrievalDrafter())
    assert not len(store)
    expected = target.generate(**inputs, max_new_tokens=20, do_sample=False, assistant_model=RetrievalDrafter(store))
    assert [answer[-20:] for answer in store._answers.values()] == expected[:, -20:].tolist()
    with pytest.raises(RuntimeError, match="enough"):  # what was written before something broke is kept
        target.generate(**inputs, assistant_model=RetrievalDrafter(store), streamer=Broken(), do_sample=False)
    assert len(store) == 4


class Broken:
    """A streamer that fails after a few tokens."""

    num_puts = 0

    def put(self, value):
        self.num_puts += 1
        if self.num_puts > 4:
            raise RuntimeError("enough")

    def end(self):
        pass


@pytest.mark.parametrize("batch", [1, 3])
def test_seeded_runs_repeat(batch):
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target, batch)
    drafter, outs = RetrievalDrafter(), []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(generate(target, inputs, assistant_model=drafter, do_sample=True))
    assert_same_tokens(*outs)
    assert torch.equal(outs[0].accepted_lengths, outs[1].accepted_lengths)


def test_samples_have_the_target_s_distribution():
    target = tiny_llama()
    for drafter in (
        RetrievalDrafter(num_likeliest=4),
        RetrievalDrafter(RetrievalStore(max_tokens=200), num_likeliest=2),
    ):
        assert min(p_values(target, drafter, temperature=0.8)) > LIMIT


@pytest.mark.parametrize("batch", [1, 3])
def test_a_chat_goes_on_with_what_was_read(batch):
    target = family("llama").make_target()
    first = {"input_ids": family("llama").make_inputs(target, 1)["input_ids"].expand(batch, -1)}
    store = RetrievalStore()
    drafter = RetrievalDrafter(store)
    plain, ours = (generate(target, first, max_new_tokens=20, **more) for more in ({}, {"assistant_model": drafter}))
    turn = {"input_ids": torch.cat([plain.sequences, first["input_ids"][:, 2:7]], dim=1)}
    expected = generate(target, turn, max_new_tokens=20)
    out = target.generate(**turn, max_new_tokens=20, do_sample=False, assistant_model=drafter,
                          past_key_values=dream_hf.compat.cache_of(ours), return_dict_in_generate=True)  # fmt: skip
    assert_same_tokens(expected, out)
    kept = [answer[-20:] for answer in store._answers.values()]
    assert kept == [*plain.sequences[:, -20:].tolist(), *expected.sequences[:, -20:].tolist()]


def test_a_string_needs_a_tokenizer_and_numbers_a_meaning():
    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [ord(letter) for letter in text]}

    class Processor:
        tokenizer = Tokenizer()

    assert RetrievalDrafter(draft_text="ab", tokenizer=Tokenizer()).draft_ids == [97, 98]
    assert RetrievalDrafter(draft_text="ab", tokenizer=Processor()).draft_ids == [97, 98]
    for arguments, message in [
        ({"draft_text": "ab"}, "pass the target's `tokenizer`"),
        ({"num_likeliest": 99}, r"`num_likeliest` \(99\) must lie between 0 and 8"),
        ({"max_text": 3}, r"`max_text` \(3\) must be at least 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            RetrievalDrafter(**arguments)
    with pytest.raises(ValueError, match=r"`max_tokens` \(0\)"):
        RetrievalStore(max_tokens=0)
    target = tiny_llama()
    with pytest.raises(ValueError, match=r"`num_likeliest` \(8\) must not exceed the target's `vocab_size`"):
        target.generate(torch.tensor([[1, 2]]), assistant_model=RetrievalDrafter(), max_new_tokens=3)


# --- the store ---


def test_a_store_is_bounded():
    store = RetrievalStore(max_tokens=30)
    for number in range(20):
        store.add([number, number + 1, number + 2, 50, 51, number])
    assert store.num_tokens == 30 and len(store) == 5
    tokens = [token for token in store.index.tokens if token >= 0]
    assert len(tokens) <= 30 + 12  # the last few of what is forgotten stay
    assert store.index.matched([1, 2])[1:] == [] and len(store.index.matched([18, 19])) == 3
    store.add(list(range(60, 100)))
    assert store.num_tokens == 30 and len(store) == 1
    store.add([])
    assert len(store) == 1


def test_a_store_is_kept_in_a_file_that_several_share(tmp_path):
    path = tmp_path / "folder" / "answers.jsonl"
    with RetrievalStore(path) as one, RetrievalStore(path) as other:
        one.add([1, 2, 3])
        other.add([4, 5, 6])
        other.save()
        assert len(other) == 1 and len(one) == 1
    assert len(RetrievalStore(path)) == 2 and len(one) == 2  # it was the last to save
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(file.name for file in path.parent.iterdir() if file.suffix != ".lock") == [path.name]
    assert list(RetrievalStore(path, max_tokens=3)._answers.values()) == [[1, 2, 3]]
    for _ in range(16):
        other.add([7])  # saved by itself
    assert len(RetrievalStore(path)) == 18


def test_many_threads_save_one_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    barrier = threading.Barrier(4, timeout=60)

    def write(number: int) -> None:
        store = RetrievalStore(path)
        barrier.wait()
        for answer in range(5):
            store.add([number, answer])
            store.save()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    answers = [json.loads(line)[1] for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(answers) == [[number, answer] for number in range(4) for answer in range(5)]


def test_two_threads_draft_from_one_store():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target, 2)
    expected, store = generate(target, inputs), RetrievalStore(max_tokens=300)
    barrier = threading.Barrier(2, timeout=60)

    def run(_):
        barrier.wait()
        return [generate(target, inputs, assistant_model=RetrievalDrafter(store)) for _ in range(4)]

    with ThreadPoolExecutor(2) as pool:
        for outs in pool.map(run, range(2)):
            for out in outs:
                assert_same_tokens(expected, out)
    assert len(store) == 4 and store.num_tokens <= 300


def test_a_damaged_store_is_refused_and_costs_no_answer(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    path.write_text('["a", [1, 2]]\nnonsense\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"`path` \('answers.jsonl'\) is no store of answers: line 2 is 'nonsense'"):
        RetrievalStore(path)
    path.unlink()
    store = RetrievalStore(path)
    path.write_text("nonsense", encoding="utf-8")
    warnings = []
    monkeypatch.setattr(logging.getLogger("dream_hf.drafters.retrieval.store"), "warning", warnings.append)
    for number in range(16):
        store.add([number])
    assert len(store) == 16 and len(warnings) == 1 and "16 answers were not saved" in warnings[0]
    with pytest.raises(ValueError, match="line 1"):
        store.save()
    assert path.read_text(encoding="utf-8") == "nonsense"
