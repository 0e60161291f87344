"""Greedy output is token-identical to plain `generate()`: every family, attention, batch, stop rule and processor."""

from __future__ import annotations

import pytest
import torch
from double import tolerance
from families import FAMILIES, INEXACT, Family, family
from lossless import (
    CHAIN,
    DEPTH,
    NUM_NEW,
    SMALL_TREE,
    assert_lossless,
    assert_same_tokens,
    gains,
    generate,
    oracle,
    stop_tokens,
    untrained,
)
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import LogitsProcessor, StoppingCriteria, stopping_criteria

from dream_hf import PromptLookupDrafter, RetrievalDrafter
from dream_hf.targets.target import Target

TEXT_LEN = 40  # five times the sliding windows
EVERY_LENGTH = set(range(1, DEPTH + 2))
WITH_SETTINGS = ["llava_clip_llama", "gemma3", "qwen2_vl"]  # plain positions, sliding windows, M-RoPE
WITH_PICTURES = [each for each in FAMILIES if each.takes_images]
WITH_CLIPS = [each for each in FAMILIES if each.make_video_inputs]

each_batch = pytest.mark.parametrize("batch", [1, 3])
some_families = pytest.mark.parametrize("name", WITH_SETTINGS)


def implementations(each: Family) -> list[str]:
    return ["sdpa", "eager"] if each.supports_sdpa else ["eager"]


def softcap(target) -> float | None:
    return getattr(target.config.get_text_config(), "final_logit_softcapping", None)


# --- families ---


@each_batch
@pytest.mark.parametrize(
    ("family", "attention"),
    [(each, attention) for each in FAMILIES for attention in implementations(each)],
    ids=str,
)
def test_every_family(family, attention, batch):
    target = family.make_target(attn_implementation=attention)
    inputs = family.make_inputs(target, batch, text_len=TEXT_LEN)
    expected = assert_lossless(target, inputs, drafts=["untrained", "fuzz", "lookup", "retrieval"])
    assert expected.sequences.shape[1] == inputs["input_ids"].shape[1] + NUM_NEW
    for config in ({}, CHAIN):
        drafter, plan = oracle(target, inputs, expected.sequences, **config)
        out = generate(target, inputs, assistant_model=drafter)
        assert_same_tokens(expected, out)
        assert [sum(row) for row in gains(out)] == [NUM_NEW - 1] * batch
        if config:  # a chain accepts as planned, up to the last step, which the length limit cuts
            planned = [row[: len(got) - 1] for row, got in zip(plan.gains, gains(out), strict=True)]
            assert [row[:-1] for row in gains(out)] == planned
        seen = {gain for row in gains(out) for gain in row}
        # Soft-capped logits cannot be as certain as the plan, so that branches of their trees crowd each other out.
        assert seen >= EVERY_LENGTH if config or not softcap(target) else len(seen) >= DEPTH - 1


@pytest.mark.parametrize("family", INEXACT, ids=repr)
def test_families_whose_padded_batches_are_inexact(family):
    target = family.make_target()
    for text_len in (12, TEXT_LEN):
        assert_lossless(target, family.make_inputs(target, text_len=text_len), drafts=["untrained", "tree", "chain"])


@pytest.mark.parametrize("images", [0, 2, [1, 0, 2]], ids=["none", "two", "mixed"])
@pytest.mark.parametrize("family", WITH_PICTURES, ids=repr)
def test_any_number_of_pictures(family, images):
    target = family.make_target()
    inputs = family.make_inputs(target, 3, images=images, text_len=24)
    assert_lossless(target, inputs, lambda: {"max_new_tokens": 32}, drafts=["tree"])


@pytest.mark.parametrize("family", WITH_CLIPS, ids=repr)
@each_batch
def test_clips(family, batch):
    target = family.make_target()
    inputs = family.make_video_inputs(target, batch, text_len=TEXT_LEN)
    assert_lossless(target, inputs)


@pytest.mark.parametrize("family", WITH_CLIPS, ids=repr)
def test_a_picture_and_a_clip(family):
    target = family.make_target()
    inputs = family.make_inputs(target, 3, videos=1, text_len=24)
    assert_lossless(target, inputs, drafts=["tree"])


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_the_head_gives_the_target_s_logits(family):
    target = family.make_target()
    inputs = family.make_inputs(target, 3)
    outputs = target(**inputs, output_hidden_states=True)
    view = Target(target)
    features = outputs.hidden_states[-1]
    view.learn_logit_rule(features[:, -1], outputs.logits[:, -1])
    logits = view.logits(features)  # in float32, from a head in float64
    torch.testing.assert_close(logits, outputs.logits.float(), **tolerance(logits))


# --- shapes of trees and prompts ---


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 4), (2, 4, 32), (8, 2, 60), (6, 8, 3), (12, 1, 12)], ids=str)
@some_families
def test_any_tree(name, shape):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, 3, text_len=24)
    config = dict(zip(("tree_depth", "tree_top_k", "tree_size"), shape, strict=True))
    assert_lossless(target, inputs, lambda: {"max_new_tokens": 32}, drafts=["untrained", "tree"], **config)


@pytest.mark.parametrize("ratio", [1.0, 0.25, 0.01, 0.0])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava_clip_llama", "gemma4_shared", "qwen2_vl"])
def test_any_share_of_visual_tokens(name, attention, ratio):
    target = family(name).make_target(attn_implementation=attention)
    inputs = family(name).make_inputs(target, 3, images=[1, 0, 2])
    config = {"visual_keep_ratio": ratio}
    assert_lossless(target, inputs, lambda: {"max_new_tokens": 16}, drafts=["untrained"], **config)


@pytest.mark.parametrize("name", ["llama", "gemma2", "llava_clip_llama", "qwen2_vl", "glm4v"])
@each_batch
def test_prompts_as_embeddings(name, batch):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch, images=0, text_len=TEXT_LEN)
    embeds = target.get_input_embeddings()(inputs["input_ids"])
    if batch == 1:
        settings = {"max_new_tokens": NUM_NEW, "do_sample": False}
        only = {key: value for key, value in inputs.items() if key != "input_ids"} | {"inputs_embeds": embeds}
        expected = target.generate(**only, **settings)
        for drafter in (untrained(target, **SMALL_TREE), RetrievalDrafter(), PromptLookupDrafter()):
            assert torch.equal(target.generate(**only, **settings, assistant_model=drafter), expected)
    assert_lossless(target, inputs | {"inputs_embeds": embeds}, drafts=["tree"])


@pytest.mark.parametrize("chunk", [7, 16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "llava_clip_llama"])
@each_batch
def test_prompts_read_in_chunks(name, batch, chunk):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch, images=0, text_len=TEXT_LEN)
    assert_lossless(target, inputs, lambda: {"prefill_chunk_size": chunk})


@pytest.mark.parametrize("name", ["llama", "llava_clip_llama", "gemma3"])
def test_a_prompt_of_one_token(name):
    target = family(name).make_target()
    inputs = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    assert_lossless(target, inputs)


@some_families
def test_without_an_attention_mask(name):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, text_len=TEXT_LEN)
    expected = generate(target, inputs)
    drafter, _ = oracle(target, inputs, expected.sequences)
    inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
    assert_same_tokens(generate(target, inputs), generate(target, inputs, assistant_model=drafter))


@some_families
def test_adapted_targets(name):
    peft = pytest.importorskip("peft")
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, 3, text_len=TEXT_LEN)
    before = generate(target, inputs).sequences
    config = peft.LoraConfig(r=4, target_modules=r".*(language_model|text_model|layers).*\.(q_proj|v_proj)")
    adapted = peft.get_peft_model(target, config)
    generator = torch.Generator().manual_seed(0)
    for weight_name, weight in adapted.named_parameters():
        if "lora_" in weight_name:
            weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    expected = generate(adapted, inputs)
    assert not torch.equal(expected.sequences, before)
    drafter, _ = oracle(target, inputs, expected.sequences)
    for each in (drafter, untrained(target, **SMALL_TREE)):
        assert_same_tokens(expected, generate(adapted, inputs, assistant_model=each))
    with adapted.disable_adapter():
        out = generate(adapted, inputs, assistant_model=drafter)
    assert torch.equal(out.sequences, before)


# --- stops ---


@pytest.mark.parametrize("num_stops", [1, 3])
@some_families
@each_batch
def test_end_of_sequence_tokens(name, batch, num_stops):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch, text_len=TEXT_LEN)
    endless = generate(target, inputs)
    ends = stop_tokens(endless.sequences)[:num_stops]
    expected = assert_lossless(target, inputs, lambda: {"eos_token_id": ends}, foresight=dict)
    lengths = (expected.sequences != target.generation_config.pad_token_id).sum(1)
    assert len(set(lengths.tolist())) == batch
    if num_stops >= batch:
        assert expected.sequences.shape[1] < endless.sequences.shape[1]


@pytest.mark.parametrize("num_new", range(1, 10))
@each_batch
def test_length_limits(batch, num_new):
    llava = family("llava_clip_llama")
    target = llava.make_target()
    inputs = llava.make_inputs(target, batch)
    expected = assert_lossless(target, inputs, lambda: {"max_new_tokens": num_new}, foresight=dict)
    length = inputs["input_ids"].shape[1] + num_new
    assert expected.sequences.shape[1] == length
    by_length = target.generate(
        **inputs, max_length=length, do_sample=False, assistant_model=untrained(target, **SMALL_TREE)
    )
    assert torch.equal(by_length, expected.sequences)


def make_tokenizer():
    """One character for each token."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(ord("a") + index if index < 26 else 0x100 + index): index for index in range(104)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@some_families
@each_batch
def test_stop_strings(name, batch):
    target, tokenizer = family(name).make_target(), make_tokenizer()
    inputs = family(name).make_inputs(target, batch, text_len=TEXT_LEN)
    endless = generate(target, inputs).sequences
    new = endless[:, -NUM_NEW:]
    stops = [tokenizer.decode(row[at : at + 3]) for row, at in zip(new, (8, 21, 36), strict=False)]
    expected = assert_lossless(target, inputs, lambda: {"stop_strings": stops, "tokenizer": tokenizer}, foresight=dict)
    assert expected.sequences.shape[1] < endless.shape[1]
    both = {"stop_strings": stops[:1], "tokenizer": tokenizer, "eos_token_id": stop_tokens(endless)[-1]}
    assert_lossless(target, inputs, lambda: both, foresight=dict)


def test_a_time_limit(monkeypatch):
    """By a clock that ticks whenever it is read: the criterion reads it once for every token."""
    llava = family("llava_clip_llama")
    target = llava.make_target()
    inputs = llava.make_inputs(target)

    class Clock:
        now = 0.0

        def time(self) -> float:
            self.now += 1.0
            return self.now

    expected = generate(target, inputs)
    drafter, _ = oracle(target, inputs, expected.sequences)
    outs = []
    for assistant in ({}, {"assistant_model": drafter}):
        monkeypatch.setattr(stopping_criteria, "time", Clock())
        outs.append(generate(target, inputs, max_time=20.5, **assistant))
    assert 10 < outs[0].sequences.shape[1] - inputs["input_ids"].shape[1] < NUM_NEW
    assert_same_tokens(*outs)


@each_batch
def test_no_time_at_all(batch):
    llava = family("llava_clip_llama")
    target = llava.make_target()
    inputs = llava.make_inputs(target, batch)
    expected = assert_lossless(target, inputs, lambda: {"max_time": 0.0}, foresight=dict)
    assert expected.sequences.shape[1] == inputs["input_ids"].shape[1] + 1


class SeenTwice(StoppingCriteria):
    """Ends a row when it writes a token for the second time; remembers what it was shown."""

    def __init__(self):
        self.seen: list[set[int]] = []
        self.lengths: list[int] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        self.seen = self.seen or [set() for _ in input_ids]
        last = input_ids[:, -1].tolist()
        is_done = [token in seen for token, seen in zip(last, self.seen, strict=True)]
        for token, seen in zip(last, self.seen, strict=True):
            seen.add(token)
        return torch.tensor(is_done)


class MultipleOfFive(StoppingCriteria):
    """Ends a row whose newest token is a multiple of five."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 5 == 0


class Confident(StoppingCriteria):
    """Ends a row whose newest token had a high score."""

    def __init__(self, prompt_length: int, threshold: float):
        self.prompt_length, self.threshold = prompt_length, threshold

    def __call__(self, input_ids, scores, **kwargs):
        assert len(scores) == input_ids.shape[1] - self.prompt_length
        return scores[-1].amax(1) >= self.threshold


@some_families
@each_batch
def test_criteria_that_read_scores(name, batch):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch, text_len=TEXT_LEN)
    scores = torch.stack(generate(target, inputs, output_scores=True).scores).amax(-1)  # (steps, B)
    threshold = float(scores.topk(6, dim=0).values[-1].min()) - 1e-2  # between two scores, not on one
    criteria = StoppingCriteriaList([Confident(inputs["input_ids"].shape[1], threshold)])
    settings = {"stopping_criteria": criteria, "output_scores": True, "eos_token_id": 2}
    expected = assert_lossless(target, inputs, lambda: dict(settings), foresight=dict)
    assert expected.sequences.shape[1] < inputs["input_ids"].shape[1] + NUM_NEW


@pytest.mark.parametrize("criterion", [SeenTwice, MultipleOfFive])
@pytest.mark.parametrize("ends", [None, 2], ids=["no eos", "eos"])
@some_families
@each_batch
def test_custom_criteria(name, batch, ends, criterion):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch, text_len=TEXT_LEN)
    criteria: list[StoppingCriteria] = []

    def settings():
        criteria.append(criterion())
        return {"stopping_criteria": StoppingCriteriaList([criteria[-1]]), "eos_token_id": ends}

    expected = assert_lossless(target, inputs, settings, foresight=dict)
    assert expected.sequences.shape[1] < inputs["input_ids"].shape[1] + NUM_NEW
    if criterion is SeenTwice:
        assert all(each.lengths == criteria[0].lengths for each in criteria)


# --- processors ---


class Alternating(LogitsProcessor):
    """Counts its own calls, and pushes odd and even tokens by turns: wrong unless called once for each token."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, input_ids, scores):
        self.num_calls += 1
        parity = (torch.arange(scores.shape[1]) + self.num_calls) % 2
        return scores + 2.0 * parity


PROCESSORS = {
    "repetition penalty": lambda: {"repetition_penalty": 1.4},
    "no repeated n-gram": lambda: {"no_repeat_ngram_size": 2},
    "min new tokens": lambda: {"min_new_tokens": 30, "eos_token_id": list(range(3, 60))},
    "suppressed tokens": lambda: {"suppress_tokens": list(range(3, 40))},
    "suppressed first tokens": lambda: {"begin_suppress_tokens": list(range(3, 50))},
    "bad words": lambda: {"bad_words_ids": [[token] for token in range(3, 20)] + [[21, 37], [60, 70, 80]]},
    "allowed tokens": lambda: {
        "prefix_allowed_tokens_fn": lambda row, ids: [3 + (int(ids[-1]) * 7 + row + shift) % 87 for shift in range(9)]
    },
    "sequence bias": lambda: {
        "sequence_bias": [[[token, other], 4.0] for token in range(3, 60) for other in (5, 9)] + [[[7], -3.0]]
    },
    "exponential decay": lambda: {"exponential_decay_length_penalty": (12, 1.1), "eos_token_id": [2]},
    "forced end": lambda: {"forced_eos_token_id": 2, "eos_token_id": 2, "max_new_tokens": 30},
    "prompt penalty": lambda: {"encoder_repetition_penalty": 2.0},
    "renormalised": lambda: {"renormalize_logits": True, "remove_invalid_values": True},
    "several": lambda: {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [5, 6, 7]},
    "guidance": lambda: {"guidance_scale": 1.5},
    "stateful": lambda: {"logits_processor": LogitsProcessorList([Alternating()])},
}
HARMLESS = {"renormalised"}  # leaves the best token the best


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("name", ["llava_clip_llama", "gemma3"])
@each_batch
def test_processors(name, batch, processors):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch, text_len=TEXT_LEN)
    expected = assert_lossless(target, inputs, PROCESSORS[processors])
    if processors not in HARMLESS:
        assert not torch.equal(expected.sequences, generate(target, inputs).sequences)
