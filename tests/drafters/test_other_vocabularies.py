"""A model of another vocabulary drafts characters: what it drafts is spelt by the target's tokenizer, or not at all."""

from __future__ import annotations

import functools
import random

import pytest
import torch
import transformers
from lossless import assert_same_tokens, gains, generate
from processors import train_tokenizer
from tiny_pair import tiny_processor, tiny_target
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dream_hf import ModelDrafter
from dream_hf.decoding.drafter import DrafterAround
from dream_hf.decoding.settings import DraftSettings
from dream_hf.drafters.model.bridge import BROKEN, Speller, Written
from dream_hf.drafters.model.other_vocabulary import OwnText

STORY = (
    "The quick brown fox said: \u4f60\u597d, \U0001f600! Then   it ran over 12 hills, and over 34 more hills, to caf\u00e9s "
    "and back.\n\n    def fox(n):\n        return n + 1\nSo it went, day after day; the end is near. "
)
OTHER = "Invoices, totals and taxes: 1,204.50 due on the 31st; hills over cafes. Return to sender, please, please, please. "
SETTINGS = DraftSettings(tree_depth=6, tree_top_k=2, tree_size=16)


@functools.cache
def other_tokenizer(size=330, text=OTHER):
    """Byte-level, trained on another text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator([text] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


@functools.cache
def spellers():
    return [Speller(train_tokenizer([])), Speller(train_tokenizer([], style="metaspace")), Speller(other_tokenizer())]


# --- spelling ---


@pytest.mark.parametrize("place", range(3))
def test_what_is_drafted_is_spelt_or_left_out(place):
    """Whatever the two texts are cut into: paths spell a beginning of the draft, and mostly all of it."""
    speller = spellers()[place]
    spelt = wanted = 0
    ids = speller.encode(STORY * 2)
    for start in range(4, len(ids) - 12):
        written = Written(speller, ids[: start - 2])
        written.extend(ids[start - 2 : start])
        rest = speller.decode(ids)[len(written.text) :]
        for drafted in (rest[:7], rest[:3], "zz", " "):
            path, ends = written.paths(drafted)
            assert len(path) == len(ends) and ends == sorted(ends)
            whole = speller.decode([*written.ids, *path]).rstrip(BROKEN)
            assert (written.text + drafted).startswith(whole) or not path
            if path and drafted == rest[:7]:
                assert whole == written.text + drafted[: ends[-1]]
            if drafted == rest[:7]:
                spelt, wanted = spelt + (ends[-1] if ends else 0), wanted + 7
    assert spelt > 0.8 * wanted


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("seed", range(3))
def test_texts_that_grow_are_those_that_are_read_at_once(place, seed):
    speller = spellers()[place]
    written, text, known = Written(speller, speller.encode("A")), OwnText(speller, "A"), "A"
    ids = speller.encode("A" + STORY * 2)
    rng, start = random.Random(seed), 1
    while start < len(ids):
        step = rng.randint(1, 5)
        written.extend(ids[start : start + step])
        start += step
        assert speller.decode(ids).startswith(written.text) and BROKEN not in written.text
        before = list(text.ids)
        kept = text.follow(written.text)
        assert text.ids[:kept] == before[:kept] and kept <= len(text.ids)
        assert speller.decode(text.ids[len(text.opening) :]) == written.text
        known = written.text
    assert written.num_whole == len(written.ids) and known == speller.decode(ids)


def test_half_characters_wait():
    speller = Speller(other_tokenizer())
    ids = speller.encode("so \U0001f600 it")
    halves = next(place for place in range(1, len(ids)) if speller.decode(ids[:place]).endswith(BROKEN))
    written = Written(speller, ids[:halves])
    assert written.text == "so " and written.num_whole < halves
    path, ends = written.paths("\U0001f600 it")
    assert path == ids[halves:] and ends[-1] == 4  # goes on within the character
    assert written.paths("\u4f60")[0] == []  # which it is not
    written.extend(ids[halves:])
    assert written.text == "so \U0001f600 it"


# --- drafting ---


def learn(tokenizer, seed, text=STORY, num_steps=220):
    """A tiny model that knows a text by heart, in the tokens of a tokenizer, wherever the text is cut."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(num_steps):
        cut = rng.randrange(len(text))
        parts = [tokenizer.encode(part, add_special_tokens=False) for part in (text[:cut], text[cut:])]
        ids = torch.tensor([[*parts[0], *parts[1], tokenizer.eos_token_id]])
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.double().eval().requires_grad_(False)


@functools.cache
def learnt():
    """Target and drafter of one vocabulary, and a drafter of another, all of which know the story."""
    theirs, own = train_tokenizer([]), other_tokenizer()
    with torch.enable_grad():
        return theirs, learn(theirs, 0), learn(theirs, 1), own, learn(own, 2)


def prompts(tokenizer, batch):
    texts = [STORY[:40], STORY[:90], STORY[:61]][:batch]
    tokenizer.padding_side = "left"
    return dict(
        tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    )


def per_step(out):
    steps = [gain for row in gains(out) for gain in row]
    return sum(steps) / len(steps)


@pytest.mark.parametrize("batch", [1, 3])
def test_more_than_half_of_what_the_target_s_vocabulary_gains(batch):
    theirs, target, same, own, other = learnt()
    inputs = prompts(theirs, batch)
    expected = generate(target, inputs, eos_token_id=theirs.eos_token_id, max_new_tokens=200)
    found = []
    for drafter in (ModelDrafter(same, settings=SETTINGS), ModelDrafter(other, own, theirs, settings=SETTINGS)):
        out = generate(target, inputs, assistant_model=drafter, eos_token_id=theirs.eos_token_id, max_new_tokens=200)
        assert_same_tokens(expected, out)
        found.append(per_step(out) - 1)
    assert found[1] > 0.5 * found[0] > 1
    assert STORY[100:140] in theirs.decode(expected.sequences[0])  # it knows it by heart


def test_ends_are_drafted():
    theirs, target, _, own, other = learnt()
    ids = theirs(STORY[:-12], return_tensors="pt", add_special_tokens=False)["input_ids"]
    expected = generate(target, {"input_ids": ids}, eos_token_id=theirs.eos_token_id)
    trees = []

    class Watching(DrafterAround):
        def start(self, prefill, settings):
            session = super().start(prefill, settings)
            draft = session.draft
            session.draft = lambda *args: trees.append(draft(*args)) or trees[-1]
            return session

    drafter = Watching(ModelDrafter(other, own, theirs, settings=SETTINGS))
    out = generate(target, {"input_ids": ids}, eos_token_id=theirs.eos_token_id, assistant_model=drafter)
    assert_same_tokens(expected, out)
    assert expected.sequences[0, -1] == theirs.eos_token_id
    assert any((tree.tokens == theirs.eos_token_id).any() for tree in trees)
    assert all(tree.log_probs is not None and tree.num_nodes <= SETTINGS.tree_size + 1 for tree in trees)


def test_stops_sampling_and_pictures():
    """A vision-language target whose drafter knows neither its vocabulary nor its pictures."""
    from processors import make_image

    from dream_hf.data.prompts import PromptEncoder

    target, processor = tiny_target(2.6), tiny_processor()
    _, _, _, own, other = learnt()
    drafter = ModelDrafter(other.float(), own, processor, settings=SETTINGS)
    content = [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]
    inputs = dict(PromptEncoder(processor).encode([([{"role": "user", "content": content}], [make_image()])] * 2))
    for settings in ({}, {"repetition_penalty": 1.3}, {"max_new_tokens": 1}, {"max_new_tokens": 2}):
        expected = generate(target, inputs, **settings)
        assert_same_tokens(expected, generate(target, inputs, assistant_model=drafter, **settings))
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(generate(target, inputs, do_sample=True, assistant_model=drafter, max_new_tokens=12))
    assert torch.equal(runs[0].sequences, runs[1].sequences)


def test_tokenizers_belong_together():
    theirs, _, same, own, other = learnt()
    with pytest.raises(ValueError, match="`tokenizer` and `target_tokenizer` belong together"):
        ModelDrafter(other, own)
    assert ModelDrafter(same, theirs, theirs).spellers is None  # one vocabulary after all
    assert ModelDrafter(other, own, theirs).spellers is not None
