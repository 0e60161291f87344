"""Trees are attended to without copies of the keys, by the arithmetic of the functions that copy them."""

import pytest
import torch
from double import keeping_double
from families import family
from lossless import SMALL_TREE, assert_same_tokens, generate, untrained
from torch import nn
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import AttentionInterface
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2

from dream_hf.targets import grouped_attention
from dream_hf.targets.grouped_attention import attend_in_groups, grouping, groups_available

B, HEADS, KEY_HEADS, QUERIES, KEYS, DIM = 2, 6, 2, 5, 11, 4


def attention_inputs(mask_dtype: torch.dtype = torch.float64):
    """Queries, keys, values and a mask that hides a third of the keys, as attention functions take them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, HEADS, QUERIES, DIM), (B, KEY_HEADS, KEYS, DIM), (B, KEY_HEADS, KEYS, DIM)]
    states = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    is_seen = torch.rand(B, 1, QUERIES, KEYS, generator=generator) < 2 / 3
    is_seen[..., 0] = True
    mask = (
        is_seen
        if mask_dtype == torch.bool
        else torch.zeros(is_seen.shape, dtype=mask_dtype).masked_fill(~is_seen, -1e30)
    )
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // KEY_HEADS, True
    return module.eval(), *states, mask


@pytest.mark.parametrize("knows_groups", [True, False], ids=["a kernel for groups", "folded into queries"])
@pytest.mark.parametrize("implementation", ["sdpa", "sdpa with booleans", "eager"])
def test_it_computes_what_the_function_computes(monkeypatch, implementation, knows_groups):
    monkeypatch.setattr(grouped_attention, "_knows_groups", lambda device: knows_groups)
    own = (
        modeling_llama.eager_attention_forward if implementation == "eager" else sdpa_attention.sdpa_attention_forward
    )
    inputs = attention_inputs(torch.bool if "booleans" in implementation else torch.float64)
    with keeping_double(), groups_available(), grouping():
        expected, weights = own(*inputs, scaling=0.3)
        found = AttentionInterface().get_interface("eager" if implementation == "eager" else "sdpa", own)
        assert found is not own
        for _ in range(2):  # the second layer of a forward takes the first one's mask
            attended, probabilities = found(*inputs, scaling=0.3)
            torch.testing.assert_close(attended, expected, atol=1e-9, rtol=0)
            assert attended.is_contiguous() and (weights is None) == (probabilities is None)
            if weights is not None:
                torch.testing.assert_close(probabilities, weights, atol=1e-9, rtol=0)


def test_what_is_not_simple_is_left_to_the_function(monkeypatch):
    """One query, no mask, a mask for each head, as many keys as queries: all as the function itself has it."""
    calls = []
    own = sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(grouped_attention, "sdpa_attention_forward", lambda *args, **_: calls.append(1) or own(*args))
    module, query, key, value, mask = attention_inputs()
    for given in (
        (query[:, :, :1], key, value, mask[:, :, :1]),
        (query, key, value, None),
        (query, key, value, mask.expand(-1, HEADS, -1, -1)),
        (query[:, :KEY_HEADS], key, value, mask),
    ):
        module.num_key_value_groups = given[0].shape[1] // KEY_HEADS
        num_calls = len(calls)
        found, _ = grouped_attention._sdpa(module, *given)
        torch.testing.assert_close(found, own(module, *given)[0], atol=1e-9, rtol=0)
        assert len(calls) == num_calls + 1


def test_only_known_functions_are_replaced():
    def users_own(module, query, key, value, attention_mask, **_):
        return query

    known = [sdpa_attention.sdpa_attention_forward, modeling_llama.eager_attention_forward]
    assert all(map(attend_in_groups, [*known, modeling_qwen2.eager_attention_forward]))
    with_more = [modeling_gemma2.eager_attention_forward, modeling_gpt_oss.eager_attention_forward, users_own, print]
    assert not any(map(attend_in_groups, with_more))  # soft caps, sinks, whatever else
    with groups_available():
        assert AttentionInterface().get_interface("sdpa", users_own) is known[0]  # no tree is verified
        with grouping():
            assert AttentionInterface().get_interface("eager", users_own) is users_own


@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "sdpa"), ("llama", "eager"), ("gemma3", "sdpa"), ("qwen2_vl", "sdpa"), ("qwen2_vl", "eager")],
)
def test_tree_forwards_of_targets_attend_in_groups(monkeypatch, name, attention):
    """All of them, and nothing else does; the text is plain decoding's."""
    target = family(name).make_target(attn_implementation=attention)
    inputs = family(name).make_inputs(target, 2)
    expected = generate(target, inputs, max_new_tokens=20)
    grouped: list[tuple[int, bool]] = []
    own = grouped_attention._is_simple
    monkeypatch.setattr(
        grouped_attention,
        "_is_simple",
        lambda query, *rest: grouped.append((query.shape[2], own(query, *rest))) or grouped[-1][1],
    )
    with_trees = generate(target, inputs, assistant_model=untrained(target, **SMALL_TREE), max_new_tokens=20)
    assert_same_tokens(expected, with_trees)
    assert len(grouped) > 20 and all(is_grouped == (num_queries > 1) for num_queries, is_grouped in grouped)
    assert max(num_queries for num_queries, _ in grouped) <= SMALL_TREE["tree_size"] + 1  # no prompt
