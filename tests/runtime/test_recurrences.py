"""Recurrences over trees: every node against its own path, one step after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from double import TIGHT, doubles
from nodes import random_tree
from torch import Tensor

from dream_hf.runtime.counts import Counts
from dream_hf.runtime.recurrent import linear, selective
from dream_hf.runtime.recurrent.layers import TreeStates, state_layers
from dream_hf.runtime.recurrent.paths import NodePaths
from dream_hf.targets.recurrence import trees_of_states

BATCH, HEADS, GROUPS, KEY, VALUE = 2, 4, 2, 5, 3


def tree_of(num_nodes: int, generator: torch.Generator) -> NodePaths:
    tree = random_tree(BATCH, num_nodes, generator)
    return NodePaths(tree.parents, tree.depths, tree.ancestors)


def path_of(paths: NodePaths, row: int, node: int) -> list[int]:
    return paths.ancestors[row, node].nonzero().flatten().tolist()  # parents come first


def in_turn(state: Tensor, nodes: list[int], queries, keys, values, decays, betas) -> tuple[Tensor, Tensor]:
    """The state (H, D, E) and what is read, (H, E), after stepping along `nodes` of one row, by the definition."""
    read = state.new_zeros(0)
    for node in nodes:
        key, query = (part[:, node].repeat_interleave(HEADS // GROUPS, dim=0) for part in (keys, queries))
        state = state * decays[:, node].exp()[:, :, None]
        written = values[:, node]
        if betas is not None:
            written = betas[:, node, None] * (written - torch.einsum("hd,hde->he", key, state))
        state = state + key[:, :, None] * written[:, None]
        read = torch.einsum("hd,hde->he", query, state)
    return state, read


@pytest.mark.parametrize("num_nodes", [1, 17, 70])
@pytest.mark.parametrize("num_decays", [1, KEY], ids=["a decay", "a decay for each channel"])
@pytest.mark.parametrize("is_delta", [False, True], ids=["plain", "delta rule"])
def test_linear_recurrences_follow_every_path(is_delta, num_decays, num_nodes):
    generator = torch.Generator().manual_seed(num_nodes)
    paths = tree_of(num_nodes, generator)
    queries, keys = (doubles(BATCH, GROUPS, num_nodes, KEY, generator=generator) for _ in range(2))
    keys = keys / keys.norm(dim=-1, keepdim=True)
    values = doubles(BATCH, HEADS, num_nodes, VALUE, generator=generator)
    decays = -3 * torch.rand(BATCH, HEADS, num_nodes, num_decays, generator=generator).double()
    betas = torch.rand(BATCH, HEADS, num_nodes, generator=generator).double() if is_delta else None
    state = doubles(BATCH, HEADS, KEY, VALUE, generator=generator)
    outputs, record = linear.over_tree(queries, keys, values, decays, state, paths.ancestors, betas)
    depths = paths.depths.max(1).values + 1
    path = torch.zeros(BATCH, int(depths.max()), dtype=torch.long)
    for row in range(BATCH):
        for node in range(num_nodes):
            parts = [None if part is None else part[row] for part in (queries, keys, values, decays, betas)]
            _, read = in_turn(state[row], path_of(paths, row, node), *parts)
            torch.testing.assert_close(outputs[row, :, node], read, **TIGHT)
        deepest = path_of(paths, row, int(paths.depths[row].argmax()))
        path[row, : len(deepest)] = torch.tensor(deepest)
        for count in range(len(deepest) + 1):
            counts = torch.zeros(BATCH, dtype=torch.long)
            counts[row] = count
            kept = record.after(state, path, counts)
            wanted, _ = in_turn(state[row], deepest[:count], *parts)
            torch.testing.assert_close(kept[row], wanted, **TIGHT)
            torch.testing.assert_close(kept[1 - row], state[1 - row], **TIGHT)  # a row that rests


def test_strong_decays_leave_zeros_and_no_nan():
    paths = tree_of(9, torch.Generator().manual_seed(0))
    ones = torch.ones(BATCH, GROUPS, 9, KEY)
    arguments = (torch.ones(BATCH, HEADS, 9, VALUE), torch.full((BATCH, HEADS, 9, 1), -500.0))
    state = torch.ones(BATCH, HEADS, KEY, VALUE)
    outputs, record = linear.over_tree(ones, ones, *arguments, state, paths.ancestors)
    kept = record.after(state, torch.tensor([[0, 1]] * BATCH), torch.tensor([2, 0]))
    assert outputs.isfinite().all() and kept.isfinite().all()
    torch.testing.assert_close(outputs, torch.full_like(outputs, KEY))  # of itself alone
    torch.testing.assert_close(kept[1], state[1])


def test_mamba_follows_every_path():
    generator = torch.Generator().manual_seed(0)
    paths = tree_of(13, generator)
    channels, size = 6, 4
    steps = selective.SelectiveSteps(
        -torch.rand(channels, size, generator=generator).double(),
        torch.rand(BATCH, 13, channels, generator=generator).double(),
        doubles(BATCH, 13, channels, generator=generator),
        doubles(BATCH, 13, size, generator=generator),
    )
    reads, state = doubles(BATCH, 13, size, generator=generator), doubles(BATCH, channels, size, generator=generator)
    outputs = selective.over_tree(steps, reads, state, paths.parents)
    for row in range(BATCH):
        for node in range(13):
            after, nodes = state[row], path_of(paths, row, node)
            for each in nodes:
                decay = (steps.steps[row, each][:, None] * steps.rates).exp()
                after = after * decay + steps.inputs[row, each][:, None] * steps.writes[row, each]
            torch.testing.assert_close(outputs[row, node], after @ reads[row, node], **TIGHT)
            path, counts = torch.tensor([nodes] * BATCH), torch.zeros(BATCH, dtype=torch.long)
            counts[row] = len(nodes)
            torch.testing.assert_close(steps.after(state, path, counts)[row], after, **TIGHT)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_windows_hold_ancestors_and_then_the_text(size):
    paths = tree_of(11, torch.Generator().manual_seed(size))
    windows = paths.windows(size)
    for row in range(BATCH):
        for node in range(11):
            text = list(range(size))
            wanted = (text + [size + each for each in path_of(paths, row, node)])[-size:]
            assert windows[row, node].tolist() == wanted


@torch.no_grad()
def test_a_record_is_small():
    """At Qwen3.5's shape, in bfloat16: less than 60 KB for a node and layer, everything counted that is kept alive."""
    shape: dict[str, Any] = {
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }  # fmt: skip
    config = hf.Qwen3_5TextConfig(
        **shape, vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = hf.Qwen3_5ForCausalLM(config).bfloat16().eval()
    states, num_nodes = TreeStates(), 33
    prompt = model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=True)
    cache = prompt.past_key_values
    before = [part.clone() for part in (cache.layers[0].conv_states[0], cache.layers[0].recurrent_states[0])]
    tree = random_tree(1, num_nodes, torch.Generator().manual_seed(0), num_tokens=30)
    with trees_of_states(model.model), state_layers(cache, list(cache.layers), states):
        states.begin(NodePaths(tree.parents, tree.depths, tree.ancestors))
        model(input_ids=tree.tokens, past_key_values=cache)
        assert not states.missing
        (layer,) = states.layers
        ((_, record),) = layer.records
        kept = [layer.new_inputs, record.keys, record.values, record.decays]
        num_bytes = sum({part.data_ptr(): part.untyped_storage().nbytes() for part in kept}.values())
        keys = record.keys.shape[1]  # 16; transformers 5.20 repeats them for every head
        assert num_bytes / num_nodes == 8192 * 2 + (keys * 128 + 32 * 128 + 32) * 4  # 41 KB, or 49
        assert num_bytes / num_nodes < 60_000
        for part, wanted in zip((layer.inputs, layer.state), before, strict=True):
            assert torch.equal(part, wanted)  # a tree leaves no trace before a path is kept
        states.keep(torch.zeros(1, 1, dtype=torch.long), Counts([1]))
        assert not torch.equal(layer.inputs, before[0]) and not torch.equal(layer.state, before[1])
        assert states.missing and layer.new_inputs is None  # nor is it remembered
