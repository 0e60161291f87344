"""Attention statistics against eager probabilities, whatever implementation is registered; scopes that close."""

from __future__ import annotations

import pytest
import torch
from double import TIGHT, doubles
from families import FAMILIES, family
from lossless import generate, untrained
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from dream_hf.targets import attention_statistics as attention
from dream_hf.targets.attention_statistics import (
    attention_chunks,
    attention_entropy,
    attention_received,
    observe_attention,
)
from dream_hf.targets.target import Target


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


@pytest.mark.parametrize("place", ["global", "local", "local, during the scope", "another name"])
def test_functions_registered_anywhere_are_observed(monkeypatch, place):
    target = family("llama").make_target()
    module = Target(target).last_attention
    name = "my_attention" if place == "another name" else "sdpa"

    def mine(*args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)

    def register():
        mapping = AttentionInterface._global_mapping if place == "global" else ALL_ATTENTION_FUNCTIONS._local_mapping
        monkeypatch.setitem(mapping, name, mine)

    seen = []
    if place != "local, during the scope":
        register()
    target.config._attn_implementation = name
    with observe_attention([module], lambda module, chunks: seen.append(torch.cat(list(chunks), dim=2).shape)):
        register()
        target(input_ids=torch.tensor([[5, 6, 7]]))
    assert seen == [(1, 4, 3, 3)]


def test_generation_leaves_the_registries_alone():
    masks, functions = dict(AttentionMaskInterface._global_mapping), dict(AttentionInterface._global_mapping)
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    generate(target, inputs, assistant_model=untrained(target), max_new_tokens=4)
    assert AttentionMaskInterface._global_mapping == masks
    assert AttentionInterface._global_mapping == functions
