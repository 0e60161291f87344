"""Processors and criteria are asked what plain decoding asks them: the same prefixes, as often, never about an ended text.

Plain decoding asks each processor once for every new token about all that precedes it, and each criterion once about all up
to it; rows that have ended are padded. So the output itself says what must have been asked.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from families import family
from lossless import CHAIN, SMALL_TREE, generate, oracle, stop_tokens, untrained
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation import logits_process, stopping_criteria

NUM_NEW = 28
each_batch = pytest.mark.parametrize("batch", [1, 3])
DRAFTS = ["tree", "chain", "untrained"]


class AskedBefore(LogitsProcessor):
    """Changes nothing and remembers every text it was shown."""

    def __init__(self) -> None:
        self.texts: list[list[list[int]]] = []

    def __call__(self, input_ids, scores):
        self.texts.append(input_ids.tolist())
        return scores


class AskedAfter(StoppingCriteria):
    """Stops nothing and remembers every text it was shown."""

    def __init__(self) -> None:
        self.texts: list[list[list[int]]] = []

    def __call__(self, input_ids, scores, **kwargs):
        self.texts.append(input_ids.tolist())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class EndsRow(StoppingCriteria):
    """A criterion of one's own that ends rows at lengths of their own."""

    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


class Clock:
    """Ticks whenever it is read."""

    now = 0.0

    def time(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture(scope="module")
def target():
    return family("llama").make_target()


def inputs_of(target, batch):
    return family("llama").make_inputs(target, batch, text_len=12)


def drafter_for(target, inputs, draft: str, **settings):
    """One that knows what would have been written but for a stop."""
    shape = {"tree": {}, "chain": CHAIN, "untrained": SMALL_TREE}[draft]
    if draft == "untrained":
        return untrained(target, **shape)
    settings = {name: value for name, value in settings.items() if name in CHANGES_TEXT}
    known = generate(target, inputs, max_new_tokens=NUM_NEW + 8, **settings)
    return oracle(target, inputs, known.sequences, **shape)[0]


CHANGES_TEXT = (
    "repetition_penalty", "sequence_bias", "guidance_scale", "watermarking_config", "suppress_tokens", "no_repeat_ngram_size",
    "bad_words_ids", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "begin_suppress_tokens",
)  # fmt: skip
BIAS = [[[token, other], 4.0] for token in range(3, 60) for other in (5, 9)]
CUTOFFS = {"epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4}
SYNTH_ID = SynthIDTextWatermarkingConfig(keys=[3, 5, 7, 11], ngram_len=3)
SETTINGS: dict[str, dict[str, Any]] = {
    "end tokens": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "one new token": {"max_new_tokens": 1},
    "no end tokens": {"eos_token_id": None},
    "min new tokens": {"min_new_tokens": 14},
    "min length": {"min_length": 30, "do_sample": True},
    "repetition penalty": {"repetition_penalty": 1.3},
    "sequence bias": {"sequence_bias": BIAS},
    "forced end": {"forced_eos_token_id": 2, "max_new_tokens": 20},
    "decay": {"exponential_decay_length_penalty": (4, 1.2)},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[5], [9, 11], [20, 21]]},
    "prompt penalty": {"encoder_repetition_penalty": 1.3},
    "prompt n-grams": {"encoder_no_repeat_ngram_size": 2},
    "suppressed at the start": {"begin_suppress_tokens": [7, 8], "suppress_tokens": [5]},
    "top h": {"do_sample": True, "top_k": 0, "top_h": 0.5},
    "all warpers": {
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "min_p": 0.02,
        "typical_p": 0.9,
        "epsilon_cutoff": 3e-4,
        "eta_cutoff": 3e-4,
    },
    "SynthID": {
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 7, 11], ngram_len=3),
        "do_sample": True,
        "max_new_tokens": 12,
    },
    "watermark": {"watermarking_config": {"bias": 2.0, "seeding_scheme": "lefthash"}, "max_new_tokens": 12},
    "guidance": {"guidance_scale": 1.5},
    "scores": {"output_scores": True, "suppress_tokens": [5, 6]},
    "a row ends by a criterion": {"rows_end": [17, 22, 30]},
    "a row ends by a criterion, no end tokens": {"rows_end": [17, 22, 30], "eos_token_id": None},
    "a time limit": {"max_time": 15.5},
    "a time limit, no end tokens": {"max_time": 15.5, "eos_token_id": None},
}


def run(target, inputs, settings: dict[str, Any], monkeypatch, **assistant: Any):
    """Output, and what a processor and a criterion were asked."""
    before, after, settings = AskedBefore(), AskedAfter(), dict(settings)
    criteria: list[Any] = [after]
    if "rows_end" in settings:
        criteria.append(EndsRow(settings.pop("rows_end")[: inputs["input_ids"].shape[0]]))
    monkeypatch.setattr(stopping_criteria, "time", Clock())
    torch.manual_seed(0)
    out = generate(
        target,
        inputs,
        **{"max_new_tokens": NUM_NEW} | settings,
        logits_processor=LogitsProcessorList([before]),
        stopping_criteria=StoppingCriteriaList(criteria),
        **assistant,
    )
    return out, before.texts, after.texts


@pytest.mark.parametrize("name", SETTINGS)
@each_batch
def test_the_same_prefixes_as_often(target, batch, name, monkeypatch):
    inputs = inputs_of(target, batch)
    prompt = inputs["input_ids"].shape[1]
    ends = stop_tokens(generate(target, inputs, max_new_tokens=NUM_NEW).sequences, NUM_NEW, at=(5, 11, 18))
    settings = {"eos_token_id": ends} | SETTINGS[name]
    plain = run(target, inputs, settings, monkeypatch)
    for draft in DRAFTS:
        drafter = drafter_for(target, inputs, draft, **settings)
        drafted = run(target, inputs, settings, monkeypatch, assistant_model=drafter)
        if not settings.get("do_sample"):
            assert torch.equal(drafted[0].sequences, plain[0].sequences), draft
            assert drafted[1:] == plain[1:], draft
        for out, before, after in (plain, drafted):
            lengths = range(prompt, out.sequences.shape[1])
            assert before == [out.sequences[:, :length].tolist() for length in lengths], draft
            assert after == [out.sequences[:, : length + 1].tolist() for length in lengths], draft


@each_batch
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_a_trie_is_not_asked_about_a_text_that_has_ended(target, batch, do_sample):
    """As users write them, it knows no token after the end; only in a batch is it asked about padding."""
    inputs = inputs_of(target, batch)
    prompt, end, pad = inputs["input_ids"].shape[1], 2, target.generation_config.pad_token_id
    endless = generate(target, inputs, max_new_tokens=NUM_NEW).sequences
    paths = [[*row[prompt : prompt + 7 + 3 * index].tolist(), end] for index, row in enumerate(endless)]

    def run_trie(**assistant):
        calls = []

        def allowed(row, ids):
            written = ids[prompt:].tolist()
            calls.append((row, written))
            if end in written:
                assert batch > 1 and set(written[written.index(end) + 1 :]) <= {pad}
                return [pad]
            return [paths[row][len(written)]]

        settings = {"max_new_tokens": NUM_NEW, "eos_token_id": end, "do_sample": do_sample}
        return generate(target, inputs, prefix_allowed_tokens_fn=allowed, **settings, **assistant).sequences, calls

    expected, calls = run_trie()
    for draft in DRAFTS:
        drafter = drafter_for(target, inputs, draft)
        sequences, ours = run_trie(assistant_model=drafter)
        assert torch.equal(sequences, expected) and ours == calls, draft


class NothingAfter(LogitsProcessor):
    """Leaves nothing to choose from once a text has ended."""

    def __init__(self, prompt_length, ends):
        self.prompt_length, self.ends = prompt_length, torch.tensor(ends)

    def __call__(self, input_ids, scores):
        has_ended = torch.isin(input_ids[:, self.prompt_length :], self.ends).any(1, keepdim=True)
        return scores.masked_fill(has_ended, -torch.inf)


def test_nothing_is_drawn_after_the_end(target):
    inputs = inputs_of(target, 1)
    ends = stop_tokens(generate(target, inputs, max_new_tokens=NUM_NEW).sequences, NUM_NEW, at=(6,))
    drafter = drafter_for(target, inputs, "chain")
    settings = {"max_new_tokens": NUM_NEW, "eos_token_id": ends, "do_sample": True, "temperature": 1e-3}
    torch.manual_seed(0)
    processors = LogitsProcessorList([NothingAfter(inputs["input_ids"].shape[1], ends)])
    out = generate(target, inputs, assistant_model=drafter, logits_processor=processors, **settings)
    assert int(out.sequences[0, -1]) in ends


PROCESSORS = [
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
]


def watched(call, shown):
    def watch(self, input_ids, scores):
        shown.update(tuple(row) for row in input_ids.tolist())
        return call(self, input_ids, scores)

    return watch


def watched_criterion(call, shown):
    def watch(self, input_ids, scores, **kwargs):
        shown.update(tuple(row) for row in input_ids.tolist())
        return call(self, input_ids, scores, **kwargs)

    return watch


@pytest.mark.parametrize(
    "settings",
    [{"min_new_tokens": 9}, {"no_repeat_ngram_size": 2}, {"sequence_bias": BIAS}, {"stop_strings": True}],
    ids=lambda settings: next(iter(settings)),
)
def test_stock_ones_are_asked_about_each_text_of_a_batch_once(target, settings, monkeypatch):
    """Rows that have drifted apart are not padded for it, and what a row did not choose is not shown."""
    from test_losslessness import make_tokenizer

    inputs = inputs_of(target, 3)
    endless = generate(target, inputs, max_new_tokens=NUM_NEW).sequences
    settings = {"eos_token_id": stop_tokens(endless, NUM_NEW, at=(5, 11, 18))} | settings
    if "stop_strings" in settings:
        tokenizer = make_tokenizer()
        settings |= {"stop_strings": [tokenizer.decode(endless[1, 16:18])], "tokenizer": tokenizer}
    plain = generate(target, inputs, max_new_tokens=NUM_NEW, **settings).sequences
    drafter = oracle(target, inputs, plain)[0]
    shown: Counter[tuple[int, ...]] = Counter()
    for kind in PROCESSORS:
        monkeypatch.setattr(kind, "__call__", watched(kind.__call__, shown))
    stop_strings = stopping_criteria.StopStringCriteria
    monkeypatch.setattr(stop_strings, "__call__", watched_criterion(stop_strings.__call__, shown))
    out = generate(target, inputs, max_new_tokens=NUM_NEW, assistant_model=drafter, **settings)
    assert torch.equal(out.sequences, plain)
    assert len({tuple(row) for row in out.accepted_lengths.tolist()}) > 1  # they have drifted apart
    pad, prompt = target.generation_config.pad_token_id, inputs["input_ids"].shape[1]
    texts = [[token for token in row if token != pad] for row in plain[:, prompt:].tolist()]
    is_criterion = "stop_strings" in settings
    expected = Counter(
        (*start, *text[: count + is_criterion])
        for start, text in zip(inputs["input_ids"].tolist(), texts, strict=True)
        for count in range(len(text))
    )
    assert shown == expected


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}], ids=str)
def test_a_padding_token_that_is_no_token(target, settings):
    """As long as no row ends before the others plain decoding never looks at it."""
    inputs = inputs_of(target, 3)
    settings = settings | {"repetition_penalty": 1.2, "pad_token_id": -1, "max_new_tokens": NUM_NEW}
    plain = generate(target, inputs, **settings)
    for draft in DRAFTS[:2]:
        drafter = oracle(target, inputs, plain.sequences, **(CHAIN if draft == "chain" else {}))[0]
        assert torch.equal(generate(target, inputs, assistant_model=drafter, **settings).sequences, plain.sequences)
