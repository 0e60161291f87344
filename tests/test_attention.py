"""Tree masks against a mask written out by hand; attention statistics against eager probabilities; scopes that close."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
import torch
from double import TIGHT, doubles
from families import FAMILIES, family
from lossless import generate, untrained
from nodes import random_tree
from torch import Tensor
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import AttentionInterface

from dream_hf import attention
from dream_hf.attention import (
    TreeScope,
    attention_chunks,
    attention_entropy,
    attention_received,
    observe_attention,
    tree_mask_function,
    tree_masks_available,
    tree_scope,
)
from dream_hf.targets import Target

WINDOW = 5


def by_hand(lengths: list[int], tree, window: int | None) -> Tensor:  # (B, N, slots)
    """Who sees whom, one pair at a time."""
    num_nodes, num_slots = tree.num_nodes, max(lengths) + tree.num_nodes
    mask = torch.zeros(len(lengths), num_nodes, num_slots, dtype=torch.bool)
    for row, length in enumerate(lengths):
        for node in range(num_nodes):
            position = length + int(tree.depths[row, node])
            for slot in range(length + num_nodes):
                if slot < length:
                    key_position, is_known = slot, True
                else:
                    other = slot - length
                    key_position = length + int(tree.depths[row, other])
                    is_known = bool(tree.ancestors[row, node, other])
                is_near = window is None or position - key_position < window
                mask[row, node, slot] = is_known and is_near
    return mask


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("lengths", [[7, 7], [3, 9], [12, 1]], ids=str)
def test_the_mask_function(lengths, window):
    tree = random_tree(2, 8, torch.Generator().manual_seed(0))
    scope = TreeScope(torch.tensor(lengths), tree.depths, tree.ancestors)
    own = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    q_offset = max(lengths)
    function = tree_mask_function(scope, own, q_offset)
    rows, queries = torch.arange(2)[:, None, None], torch.arange(8)[None, :, None] + q_offset
    slots = torch.arange(q_offset + 8)[None, None]
    assert torch.equal(function(rows, 0, queries, slots), by_hand(lengths, tree, window))


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_masks_in_a_scope_and_out_of_it(name):
    config = family("llama").make_config()
    config._attn_implementation = name
    tree = random_tree(2, 4, torch.Generator().manual_seed(0))
    scope = TreeScope(torch.tensor([3, 6]), tree.depths, tree.ancestors)

    def build(q_length):
        arguments = {"batch_size": 2, "q_length": q_length, "kv_length": 10, "q_offset": 10 - q_length, "kv_offset": 0}
        arguments |= {"mask_function": causal_mask_function, "allow_is_causal_skip": False}
        arguments |= {"device": torch.device("cpu"), "dtype": torch.float32}
        mask = AttentionMaskInterface._global_mapping[name](**arguments)
        return mask if mask.dtype == torch.bool else mask == 0

    plain = build(4)
    with tree_masks_available(config):
        assert torch.equal(build(4), plain)
        with tree_scope(scope):
            assert torch.equal(build(4)[:, 0], by_hand([3, 6], tree, None))
            assert build(3).shape[-2] == 3  # not the tree's forward: left alone
        assert torch.equal(build(4), plain)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_registries_are_put_back(error):
    masks = dict(AttentionMaskInterface._global_mapping)
    functions = dict(AttentionInterface._global_mapping)
    config = family("llama").make_config()
    config._attn_implementation = "flash_attention_2"
    target = family("llama").make_target()
    module = Target(target).last_attention
    try:
        with tree_masks_available(config), tree_masks_available(config), observe_attention([module], lambda *_: None):
            assert config._attn_implementation == "sdpa"
            assert AttentionMaskInterface._global_mapping["sdpa"] is not masks["sdpa"]
            assert AttentionInterface._global_mapping["sdpa"] is not functions["sdpa"]
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert AttentionMaskInterface._global_mapping == masks
    assert AttentionInterface._global_mapping == functions
    assert config._attn_implementation == "flash_attention_2"
    assert attention._tree.get() is None and not attention._observed.get()


def test_scopes_that_overlap_close_in_any_order():
    masks = dict(AttentionMaskInterface._global_mapping)
    config = family("llama").make_config()
    config._attn_implementation = "sdpa"
    first, second = ExitStack(), ExitStack()
    first.enter_context(tree_masks_available(config))
    second.enter_context(tree_masks_available(config))
    first.close()
    assert AttentionMaskInterface._global_mapping["sdpa"] is not masks["sdpa"]
    second.close()
    assert AttentionMaskInterface._global_mapping == masks


def test_another_thread_does_not_see_the_tree():
    tree = random_tree(1, 4, torch.Generator().manual_seed(0))
    seen = []
    with tree_scope(TreeScope(torch.tensor([3]), tree.depths, tree.ancestors)):
        thread = threading.Thread(target=lambda: seen.append(attention._tree.get()))
        thread.start()
        thread.join()
        assert attention._tree.get() is not None
    assert seen == [None]


# --- statistics ---


@pytest.mark.parametrize("chunk", [256, 5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", [each for each in FAMILIES if each.supports_sdpa], ids=repr)
def test_statistics_agree_with_eager_probabilities(monkeypatch, family, batch, chunk):
    """Every layer: windows, chunks, scales and pictures that attend both ways included."""
    monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
    target, eager = family.make_target(), family.make_target(attn_implementation="eager")
    inputs = family.make_inputs(target, batch)
    expected = eager(**inputs, output_attentions=True).attentions
    for model in (target, eager):
        seen: dict[int, list[Tensor]] = {}
        modules = [layer.self_attn for layer in Target(model).decoder.layers]

        def observe(module, chunks, seen=seen, modules=modules):
            seen[modules.index(module)] = list(chunks)

        with observe_attention(modules, observe):
            model(**inputs)
        is_real = inputs["attention_mask"].bool()
        for index, chunks in seen.items():
            # What padding attends to is nobody's business.
            mask = is_real[:, None, :, None]
            wanted = expected[index] * mask
            got = torch.cat(chunks, dim=2) * mask
            torch.testing.assert_close(got, wanted, **TIGHT)
        assert set(seen) == set(range(len(modules)))


def test_what_is_received_and_entropy():
    generator = torch.Generator().manual_seed(0)
    query, key = doubles(2, 4, 6, 8, generator=generator), doubles(2, 2, 6, 8, generator=generator)
    mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, 6, 6).clone()
    mask[1, :, :, :2] = False  # padding: its own queries see nothing
    received = attention_received(attention_chunks(query, key, mask, 0.3))
    entropy = attention_entropy(attention_chunks(query, key, mask, 0.3))
    for row in range(2):
        want_received, want_entropy = torch.zeros(2, 6, dtype=torch.float64)
        for head in range(4):
            for position in range(6):
                keys = [k for k in range(6) if mask[row, 0, position, k]]
                if not keys:
                    continue
                weights = torch.stack(
                    [query[row, head, position] @ key[row, head // 2, k] * 0.3 for k in keys]
                ).softmax(0)
                want_received[keys] += weights
                want_entropy[position] -= (weights * weights.log()).sum() / 4
        torch.testing.assert_close(received[row], want_received, **TIGHT)
        torch.testing.assert_close(entropy[row], want_entropy, **TIGHT)


@pytest.mark.parametrize("kind", ["none", "2D", "additive"])
def test_masks_in_every_form(kind):
    generator = torch.Generator().manual_seed(0)
    query, key = doubles(1, 2, 3, 8, generator=generator), doubles(1, 2, 7, 8, generator=generator)
    visible = torch.arange(7) <= torch.arange(4, 7)[:, None]
    masks = {
        "none": None,
        "2D": torch.tensor([[0, 1, 1, 1, 1, 1, 1]]),
        "additive": torch.zeros(1, 1, 3, 7).masked_fill(~visible, torch.finfo(torch.float32).min),
    }
    if kind == "2D":
        visible = visible & masks["2D"].bool()
    wanted = (query @ key.transpose(2, 3) * 0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    torch.testing.assert_close(torch.cat(list(attention_chunks(query, key, masks[kind], 0.5)), dim=2), wanted, **TIGHT)


def test_generation_leaves_the_registries_alone():
    masks, functions = dict(AttentionMaskInterface._global_mapping), dict(AttentionInterface._global_mapping)
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    generate(target, inputs, assistant_model=untrained(target), max_new_tokens=4)
    assert AttentionMaskInterface._global_mapping == masks
    assert AttentionInterface._global_mapping == functions
