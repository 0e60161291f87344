"""Streamers get what they get in plain generate(); stop strings stop at the same token."""

from __future__ import annotations

import threading

import pytest
import torch
from families import Inputs, Target, family
from oracle import make_oracle, make_plan
from processors import train_tokenizer
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import dream_hf
from dream_hf import DreamDrafter

NUM_NEW = 24


@pytest.fixture(scope="module")
def target() -> Target:
    return family("llava_clip_llama").make_target()


@pytest.fixture(scope="module")
def inputs(target) -> Inputs:
    return family("llava_clip_llama").make_inputs(target)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([])  # its first tokens, which tiny targets write, are single characters


@pytest.fixture(scope="module")
def drafters(target, inputs) -> dict[str, DreamDrafter]:
    oracle = make_oracle(target, make_plan(plain(target, inputs), inputs["attention_mask"], 6))
    return {"untrained": DreamDrafter.for_target(target), "oracle": oracle}


def plain(target: Target, inputs: Inputs, **kwargs):
    return target.generate(**inputs, **{"max_new_tokens": NUM_NEW, "do_sample": False} | kwargs)


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts: list[tuple[tuple[int, ...], list, str]] = []
        self.num_ends = 0

    def put(self, value):
        assert not self.num_ends
        self.puts.append((tuple(value.shape), value.tolist(), value.device.type))

    def end(self):
        self.num_ends += 1


@pytest.mark.parametrize("kind", ["untrained", "oracle"])
@pytest.mark.parametrize("ends_early", [False, True])
def test_the_same_puts_as_in_plain_decoding(target, inputs, drafters, kind, ends_early):
    expected, ours = Recorder(), Recorder()
    out = plain(target, inputs)
    settings = {"eos_token_id": int(out[0, -8])} if ends_early else {}
    plain(target, inputs, streamer=expected, **settings)
    plain(target, inputs, streamer=ours, assistant_model=drafters[kind], **settings)
    assert ours.puts == expected.puts and ours.num_ends == expected.num_ends == 1
    assert len(ours.puts) > 3 and (len(ours.puts) <= NUM_NEW - 6 or not ends_early)


def test_rows_of_a_batch_are_put_in_step(target):
    batch = family("llava_clip_llama").make_inputs(target, 3)
    expected, ours = Recorder(), Recorder()
    out = plain(target, batch, streamer=expected)
    oracle = make_oracle(target, make_plan(out, batch["attention_mask"], 6))
    plain(target, batch, streamer=ours, assistant_model=oracle)
    assert ours.puts == expected.puts and ours.num_ends == 1
    stop = int(out[1, -8])  # ends rows at different lengths
    expected, ours = Recorder(), Recorder()
    plain(target, batch, streamer=expected, eos_token_id=stop)
    plain(target, batch, streamer=ours, assistant_model=oracle, eos_token_id=stop)
    assert ours.puts == expected.puts


def test_tokens_are_put_as_they_come(target, inputs, drafters):
    class Counting(Recorder):
        num_forwards = 0

        def put(self, value):
            super().put(value)
            seen.append(self.num_forwards)

    seen: list[int] = []
    streamer = Counting()
    handle = target.register_forward_hook(lambda *_: setattr(streamer, "num_forwards", streamer.num_forwards + 1))
    plain(target, inputs, streamer=streamer, assistant_model=drafters["oracle"])
    handle.remove()
    assert seen[0] == 0 and seen[1] == 1  # the prompt before any work, the first token after the prefill
    assert seen == sorted(seen) and len(set(seen)) > 4


@pytest.mark.parametrize("kind", ["untrained", "oracle"])
def test_text_streamer_prints_the_same(target, inputs, drafters, tokenizer, kind, capsys):
    plain(target, inputs, streamer=TextStreamer(tokenizer, skip_prompt=True))
    expected = capsys.readouterr().out
    plain(target, inputs, streamer=TextStreamer(tokenizer, skip_prompt=True), assistant_model=drafters[kind])
    assert capsys.readouterr().out == expected != ""


def test_text_iterator_streamer_in_a_thread(target, inputs, drafters, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    arguments = {**inputs, "max_new_tokens": NUM_NEW, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=target.generate, kwargs=arguments | {"assistant_model": drafters["oracle"]})
    thread.start()
    pieces = list(streamer)
    thread.join(timeout=60)
    new = plain(target, inputs)[0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces) == tokenizer.decode(new) and len(pieces) > 3


def test_text_streamer_refuses_batches_as_ever(target, tokenizer, drafters):
    batch = family("llava_clip_llama").make_inputs(target, 2)
    with pytest.raises(ValueError, match="batch size 1"):
        plain(target, batch, streamer=TextStreamer(tokenizer), assistant_model=drafters["untrained"])


@pytest.mark.parametrize("position", [3, 9, 10, 16])
@pytest.mark.parametrize("kind", ["untrained", "oracle"])
def test_stop_strings_stop_at_the_same_token(target, inputs, drafters, tokenizer, position, kind):
    start = inputs["input_ids"].shape[1]
    out = plain(target, inputs)[0, start:]
    stop = tokenizer.decode(out[position - 1 : position + 1])  # across two tokens
    settings = {"stop_strings": [stop], "tokenizer": tokenizer}
    expected = plain(target, inputs, **settings)
    assert start < expected.shape[1] <= start + position + 1
    assert torch.equal(plain(target, inputs, assistant_model=drafters[kind], **settings), expected)


def test_stop_strings_in_a_batch(target, tokenizer):
    batch = family("llava_clip_llama").make_inputs(target, 3)
    out = plain(target, batch)
    oracle = make_oracle(target, make_plan(out, batch["attention_mask"], 6))
    stops = [tokenizer.decode(out[1, -10:-8]), tokenizer.decode(out[0, -5:-4])]
    settings = {"stop_strings": stops, "tokenizer": tokenizer}
    for eos in ({}, {"eos_token_id": int(out[2, -6])}):
        expected = plain(target, batch, **settings, **eos)
        assert torch.equal(plain(target, batch, assistant_model=oracle, **settings, **eos), expected)


def test_without_the_hook_there_is_no_streamer(target, inputs, drafters):
    """transformers hands a callable `custom_generate` neither a streamer nor a tokenizer; the output is the same."""
    streamer = Recorder()
    custom = {"custom_generate": dream_hf.dream_generate, "drafter": drafters["oracle"]}
    assert torch.equal(plain(target, inputs, streamer=streamer, **custom), plain(target, inputs))
    assert len(streamer.puts) == 1  # the prompt, by generate() itself
