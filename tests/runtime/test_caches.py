"""After accepting paths, and after generation, a cache holds what plain decoding would have put there; chats go on from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from double import TIGHT
from families import FAMILIES, family
from lossless import SMALL_TREE, assert_same_tokens, gains, generate, oracle, stop_tokens, untrained
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from dream_hf.runtime.kv_cache import SlotLayer, slot_cache, slot_layers, unsupported_layer
from dream_hf.runtime.slots import Slots

each_batch = pytest.mark.parametrize("batch", [1, 3])
WINDOW = 5


def assert_same_cache(expected: Cache, actual: Cache, is_real: Tensor | None = None) -> None:
    """Same layers, lengths, keys and values; with `is_real` (B, slots), only in the slots it marks."""
    assert [type(layer) for layer in actual.layers] == [type(layer) for layer in expected.layers]
    assert actual.get_seq_length() == expected.get_seq_length()
    for index, (plain, ours) in enumerate(zip(expected.layers, actual.layers, strict=True)):
        if plain.keys is None:  # shares another layer's
            assert ours.keys is None
            continue
        assert ours.get_seq_length() == plain.get_seq_length(), index
        assert ours.get_mask_sizes(3) == plain.get_mask_sizes(3), index
        for name in ("keys", "values"):
            wanted, got = getattr(plain, name), getattr(ours, name)
            assert got.shape == wanted.shape, index
            if is_real is not None:
                mask = is_real[:, None, -wanted.shape[2] :, None]
                wanted, got = wanted * mask, got * mask
            torch.testing.assert_close(got, wanted, **TIGHT)


# --- after generation ---


@each_batch
@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_the_returned_cache_is_plain_decoding_s(family, batch):
    target = family.make_target()
    inputs = family.make_inputs(target, batch)
    expected = generate(target, inputs, max_new_tokens=40)
    drafter, _ = oracle(target, inputs, expected.sequences)
    out = generate(target, inputs, assistant_model=drafter, max_new_tokens=40)
    assert_same_tokens(expected, out)
    is_real = torch.nn.functional.pad(inputs["attention_mask"], (0, 39), value=1)
    assert_same_cache(expected.past_key_values, out.past_key_values, is_real)


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_the_returned_cache_of_rows_that_ended_early(family):
    target = family.make_target()
    inputs = family.make_inputs(target, 3)
    endless = generate(target, inputs, max_new_tokens=40).sequences
    ends = stop_tokens(endless, 40, (9, 17, 25))
    expected = generate(target, inputs, max_new_tokens=40, eos_token_id=ends)
    drafter, _ = oracle(target, inputs, endless)
    out = generate(target, inputs, assistant_model=drafter, max_new_tokens=40, eos_token_id=ends)
    assert_same_tokens(expected, out)
    assert len({len(gained) for gained in gains(out)}) > 1
    # Padding behind a row's end is in there too, as plain decoding feeds it.
    num_new = expected.sequences.shape[1] - inputs["input_ids"].shape[1]
    is_real = torch.nn.functional.pad(inputs["attention_mask"], (0, num_new - 1), value=1)
    assert_same_cache(expected.past_key_values, out.past_key_values, is_real)


# --- the next turn ---


def next_turn(inputs: dict[str, Any], out: Any, seed: int = 5, is_masked: bool = True) -> dict[str, Any]:
    """Everything so far and a new question, for a cache that holds everything so far; padding stays masked."""
    batch = out.sequences.shape[0]
    question = torch.randint(3, 90, (batch, 9), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([out.sequences, question], dim=1)
    mask = torch.nn.functional.pad(
        inputs["attention_mask"], (0, ids.shape[1] - inputs["attention_mask"].shape[1]), value=1
    )
    if is_masked:
        mask[:, inputs["input_ids"].shape[1] :] = (ids != 0)[:, inputs["input_ids"].shape[1] :]
    turn = {"input_ids": ids, "attention_mask": mask}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            old = inputs[name]
            turn[name] = torch.nn.functional.pad(old, (0, ids.shape[1] - old.shape[1]))
    return turn


@pytest.mark.parametrize("kind", ["untrained", "oracle"])
@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "llava_clip_llama", "gemma3", "gemma4_shared", "qwen2_5_vl", "llama4"]
)
def test_a_chat_of_three_turns(name, kind):
    """Each turn goes on from the cache that the one before returned."""
    target = family(name).make_target()
    inputs = family(name).make_inputs(target)
    settings = {"max_new_tokens": 20}
    turns: dict[str, Any] = {"plain": inputs, "ours": inputs}
    caches: dict[str, Any] = {"plain": {}, "ours": {}}
    for turn in range(3):
        expected = generate(target, turns["plain"], **caches["plain"], **settings)
        if kind == "untrained":
            drafter = untrained(target, **SMALL_TREE)
        else:
            drafter, _ = oracle(target, turns["plain"], expected.sequences)
        out = generate(target, turns["ours"], assistant_model=drafter, **caches["ours"], **settings)
        assert_same_tokens(expected, out)
        assert_same_cache(expected.past_key_values, out.past_key_values)
        if kind == "oracle":
            assert out.accepted_lengths.shape[1] < 15
        turns = {"plain": next_turn(inputs, expected, turn), "ours": next_turn(inputs, out, turn)}
        caches = {
            "plain": {"past_key_values": expected.past_key_values},
            "ours": {"past_key_values": out.past_key_values},
        }


@pytest.mark.parametrize("name", ["llama", "llava_clip_llama", "llava_pixtral_mistral", "gemma3"])
@pytest.mark.parametrize("is_masked", [True, False])
def test_a_second_turn_of_a_ragged_batch(name, is_masked):
    """Rows ended at different times; their padding is masked from then on, as it should be, or is not."""
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, 3)
    endless = generate(target, inputs, max_new_tokens=40).sequences
    ends = stop_tokens(endless, 40, (9, 17, 25))
    first, second = {"max_new_tokens": 40, "eos_token_id": ends}, {"max_new_tokens": 30}
    plain = generate(target, inputs, **first)
    ours = generate(target, inputs, assistant_model=oracle(target, inputs, endless)[0], **first)
    expected = generate(
        target, next_turn(inputs, plain, is_masked=is_masked), past_key_values=plain.past_key_values, **second
    )
    turn = next_turn(inputs, ours, is_masked=is_masked)
    assert is_masked == (not turn["attention_mask"][:, inputs["input_ids"].shape[1] :].all())
    drafter, _ = oracle(target, turn, expected.sequences)
    out = generate(target, turn, assistant_model=drafter, past_key_values=ours.past_key_values, **second)
    assert_same_tokens(expected, out)


@pytest.mark.parametrize("name", ["llama", "llava_clip_llama", "gemma3"])
def test_a_cache_that_holds_part_of_the_prompt(name):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, images=0, text_len=30)

    def prefix() -> DynamicCache:
        cache = DynamicCache(config=target.config.get_text_config())
        with torch.no_grad():
            target(**{key: value[:, :19] for key, value in inputs.items()}, past_key_values=cache, use_cache=True)
        return cache

    expected = generate(target, inputs, past_key_values=prefix())
    drafter, _ = oracle(target, inputs, expected.sequences)
    for each in (drafter, untrained(target, **SMALL_TREE)):
        cache = prefix()
        out = generate(target, inputs, assistant_model=each, past_key_values=cache)
        assert_same_tokens(expected, out)
        assert out.past_key_values is cache
        assert_same_cache(expected.past_key_values, cache)


# --- slots ---


def some(batch: int, num: int, generator: torch.Generator) -> Tensor:
    return torch.randn(batch, 2, num, 4, generator=generator)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("seed", range(4))
def test_slots_hold_what_was_kept(window, seed):
    """Against lists that are appended to, row by row, over enough steps for the buffers to grow several times."""
    generator = torch.Generator().manual_seed(seed)
    batch, num_nodes = 3, 6
    slots = Slots([0] * batch)
    layer = SlotLayer(slots, window)
    prompt = some(batch, 7, generator)
    layer.update(prompt, -prompt)
    slots.place([7] * batch)
    kept: list[list[Tensor]] = [list(row.unbind(1)) for row in prompt]
    for _ in range(60):
        nodes = some(batch, num_nodes, generator)
        keys, values = layer.update(nodes, -nodes)
        offset, first = layer.get_mask_sizes(0)[1], layer.first_visible
        assert offset == first and keys.shape[2] == slots.end + num_nodes - first
        for row, length in enumerate(slots.lengths):
            behind = slice(length - first, length - first + num_nodes)
            torch.testing.assert_close(keys[row, :, behind], nodes[row], rtol=0, atol=0)
            seen = slice(max(length - (window or length) + 1 - first, 0), length - first)
            wanted = torch.stack(kept[row][first + seen.start :], dim=1)
            torch.testing.assert_close(keys[row, :, seen], wanted, rtol=0, atol=0)
            torch.testing.assert_close(values[row, :, seen], -wanted, rtol=0, atol=0)
        path = torch.stack([torch.randperm(num_nodes, generator=generator)[:3].sort().values for _ in range(batch)])
        counts = torch.randint(0, 4, (batch,), generator=generator).tolist()
        layer.keep(path)
        for row, count in enumerate(counts):
            kept[row] += [nodes[row, :, node] for node in path[row, :count]]
        slots.commit(counts)
        assert slots.lengths == [len(row) for row in kept]


def test_tentative_slots_are_taken_back():
    slots = Slots([2, 4])
    slots.extend(3)
    slots.extend(2)
    assert (slots.end, slots.longest, slots.shortest) == (9, 4, 2)
    slots.rollback()
    assert slots.end == 4
    slots.extend(3)
    slots.commit([3, 0])
    assert (slots.lengths, slots.end) == ([5, 4], 5)
    assert slots.tensor(torch.device("cpu")).tolist() == [5, 4]


def test_buffers_are_bounded_by_window_and_limit():
    slots = Slots([0], limit=70)
    full, narrow = slot_cache([slots, slots]).layers
    narrow.sliding_window = WINDOW
    generator = torch.Generator().manual_seed(0)
    for _ in range(70):
        for layer in (full, narrow):
            nodes = some(1, 1, generator)
            layer.update(nodes, nodes)
            layer.keep(torch.zeros(1, 1, dtype=torch.long))
        slots.commit([1])
    assert full.keys.shape[2] <= 70
    for _ in range(1000):
        slots.limit = None
        nodes = some(1, 1, generator)
        narrow.update(nodes, nodes)
        slots.commit([1])
    assert narrow.keys.shape[2] < 200


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_cache_gets_its_own_layers_back(error):
    config = family("gemma2").make_config()
    cache = DynamicCache(config=config)
    generator = torch.Generator().manual_seed(0)
    plain = DynamicCache(config=config)
    states = [some(2, 12, generator) for _ in cache.layers]
    for index, prompt in enumerate(states):
        cache.update(prompt, -prompt, index)
        plain.update(prompt, -prompt, index)
    before = list(cache.layers)
    assert {type(layer) for layer in before} == {DynamicLayer, DynamicSlidingWindowLayer}
    slots = Slots([12, 12])
    try:
        with slot_layers(cache, slots) as layers:
            assert all(type(layer) is SlotLayer for layer in cache.layers)
            for layer in layers:
                nodes = some(2, 5, generator)
                layer.update(nodes, nodes)
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert all(mine is original for mine, original in zip(cache.layers, before, strict=True))
    assert_same_cache(plain, cache)
    for index in range(len(cache.layers)):
        token = some(2, 1, generator)
        got, wanted = cache.update(token, token, index), plain.update(token, token, index)
        torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=0)


def test_layers_that_hold_more_are_named():
    assert unsupported_layer(DynamicCache()) is None
    assert unsupported_layer(Cache(layers=[DynamicLayer(), StaticLayer(8)])) == "StaticLayer"


@pytest.mark.parametrize("lengths", [[3], [3, 1]], ids=["equal", "ragged"])
def test_states_of_another_dtype_are_written_in_the_buffer_s(lengths):
    """Autocast gives keys and values of one layer in different dtypes from one forward to the next."""
    layer = SlotLayer(Slots([0] * len(lengths)))
    layer.update(*torch.ones(2, len(lengths), 2, 3, 4).unbind())
    layer.slots.extend(3)
    layer.slots.commit(lengths)
    keys, _ = layer.update(*torch.full((2, len(lengths), 2, 1, 4), 2.0, dtype=torch.bfloat16).unbind())
    assert keys.dtype == torch.float32
    assert [int(row[0, length, 0]) for row, length in zip(keys, lengths, strict=True)] == [2] * len(lengths)


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_under_autocast(batch):
    """Up to rounding: its bfloat16 logits tie too often for tokens to be compared."""
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target, batch, text_len=12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = generate(target, inputs, assistant_model=untrained(target, **SMALL_TREE), max_new_tokens=12)
        start = inputs["input_ids"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 12), value=1)
        logits = target(out.sequences, attention_mask=mask).logits[:, start - 1 : -1].float()
    chosen = logits.gather(2, out.sequences[:, start:, None])[..., 0]
    assert out.sequences.shape[1] == start + 12 and (logits.amax(-1) - chosen < 0.3).all()
