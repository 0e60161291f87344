"""Compiled decoding: the same tokens as eager decoding, one graph for all steps, and an eager path where none can be had."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path

import peft
import pytest
import torch
from double import tolerance
from families import FAMILIES, family
from left_behind import left_by_calls
from lossless import CHAIN, SMALL_TREE, assert_same_tokens, gains, generate, oracle, stop_tokens, untrained
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import CompileConfig, DynamicCache

from dream_hf.decoding.target_forward import padded_count
from dream_hf.decoding.tree import DraftTree
from dream_hf.drafters import growth as drafting
from dream_hf.drafters import masked_attention
from dream_hf.drafters.levels import Beams
from dream_hf.runtime import compilation as compiling
from dream_hf.runtime import few_queries
from dream_hf.runtime.compilation import Settings, compiled_function
from dream_hf.runtime.kv_cache import SlotLayer, capacity_for, slot_layers
from dream_hf.runtime.leases import Lease
from dream_hf.runtime.slots import Slots

KEEPS_DOUBLE = False  # and targets in float32, which have no casts to lift

# Traces everything into one graph, as for a real compiler, and runs that as it is: quick, and exact to the last bit or so.
TRACED = CompileConfig(backend="eager", fullgraph=True)
NUM_NEW = 40
UNCOMPILED = {"llama4": "scales queries", "paligemma2": "cannot take masks"}
OWN_KINDS = ["llama", "gemma3", "qwen2_vl"]  # plain positions, sliding windows, M-RoPE


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is compiled yet."""
    torch._dynamo.reset()


@pytest.fixture
def warnings(monkeypatch):
    """What is warned of, line by line."""
    lines: list[str] = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(logging.Logger, name, lambda self, text, *args: lines.append(str(text)))
    return lines


def compiled_of(model) -> list[compiling.CompiledFunction]:
    return list(compiling._compiled.get(model, {}).values())


# --- the same tokens ---


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family(family, warnings):
    target = family.make_target(dtype=torch.float32)
    inputs = family.make_inputs(target, 3, text_len=40)
    expected = generate(target, inputs, max_new_tokens=NUM_NEW)
    drafter, _ = oracle(target, inputs, expected.sequences)
    out = generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW, compile_config=TRACED)
    assert_same_tokens(expected, out)
    assert max(gain for row in gains(out) for gain in row) > 3  # paths that had to be moved
    if reason := UNCOMPILED.get(family.name):
        assert not compiled_of(target) and any(reason in line for line in warnings)
    else:
        assert [each.is_broken for each in compiled_of(target)] == [False], warnings


@pytest.mark.parametrize("shape", [CHAIN, SMALL_TREE, {"tree_size": 60}], ids=str)
@pytest.mark.parametrize("name", OWN_KINDS)
def test_shapes_of_trees(name, shape):
    target = family(name).make_target(attn_implementation="eager", dtype=torch.float32)
    inputs = family(name).make_inputs(target, 1, text_len=40)
    expected = generate(target, inputs, max_new_tokens=NUM_NEW)
    for drafter in (oracle(target, inputs, expected.sequences, **shape)[0], untrained(target, **shape)):
        out = generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW, compile_config=TRACED)
        assert_same_tokens(expected, out)
    assert [each.is_broken for each in compiled_of(target)] == [False]


def decode_under_a_default_device():
    """What [`test_under_a_default_device`] runs in another process."""
    few_queries._is_for_accelerator = lambda query: torch.compiler.is_compiling()
    target = family("llama").make_target(dtype=torch.float32)
    inputs = family("llama").make_inputs(target, text_len=40)
    drafter = untrained(target, **SMALL_TREE)
    expected = generate(target, inputs, max_new_tokens=NUM_NEW)
    with torch.device("cpu"):
        out = generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW, compile_config=TRACED)
    assert_same_tokens(expected, out)
    assert [each.is_broken for model in (target, drafter) for each in compiled_of(model)] == [False, False]


def test_under_a_default_device():
    """`torch.set_default_device` is a mode that watches all functions; the compiler does not see through it everywhere.

    What it sees through it finds out once in a process: in one of its own no other test has exchanged functions by then.
    """
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", "import test_compile; test_compile.decode_under_a_default_device()"]
    ran = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", OWN_KINDS)
def test_sampling_draws_what_eager_decoding_draws(name):
    target = family(name).make_target(dtype=torch.float32)
    inputs = family(name).make_inputs(target, 2)
    drafter = untrained(target, **SMALL_TREE)
    outs = []
    for config in (None, TRACED):
        torch.manual_seed(7)
        settings = {"do_sample": True, "top_k": 20, "temperature": 0.9, "compile_config": config}
        outs.append(generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW, **settings))
    assert_same_tokens(*outs)
    assert torch.equal(outs[0].accepted_lengths, outs[1].accepted_lengths)


@pytest.mark.parametrize("name", OWN_KINDS)
def test_the_cache_and_the_states_that_are_returned(name):
    """Rows end at different times, so that some read padding; what is left of the buffers is an ordinary cache."""
    target = family(name).make_target(dtype=torch.float32)
    inputs = family(name).make_inputs(target, 3, text_len=24)
    drafter, _ = oracle(target, inputs, generate(target, inputs).sequences)
    stops = {"eos_token_id": stop_tokens(generate(target, inputs).sequences), "output_hidden_states": True}
    plain, eager, out = (
        generate(target, inputs, **stops, **extra)
        for extra in ({}, {"assistant_model": drafter}, {"assistant_model": drafter, "compile_config": TRACED})
    )
    assert_same_tokens(plain, out)
    assert type(out.past_key_values) is DynamicCache
    for ours, theirs in zip(out.past_key_values.layers, eager.past_key_values.layers, strict=True):
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours.keys, theirs.keys, **tolerance(theirs.keys, roundings=64))
        torch.testing.assert_close(ours.values, theirs.values, **tolerance(theirs.values, roundings=64))
    for ours, theirs in zip(out.hidden_states, eager.hidden_states, strict=True):
        torch.testing.assert_close(ours[-1], theirs[-1], **tolerance(theirs[-1], roundings=64))


def test_inductor():
    target = family("llama").make_target(dtype=torch.float32)
    inputs = family("llama").make_inputs(target)
    expected = generate(target, inputs)
    drafter, _ = oracle(target, inputs, expected.sequences)
    drafter.config.compile = True
    out = generate(target, inputs, assistant_model=drafter)
    assert_same_tokens(expected, out)
    (function,) = compiled_of(target)
    assert not function.is_broken and function.settings == Settings()


# --- one graph ---


@pytest.mark.parametrize("name", OWN_KINDS)
def test_nothing_is_compiled_anew(monkeypatch, name):
    """Not from step to step, nor for other prompts, lengths, capacities and numbers of nodes and beams."""
    target = family(name).make_target(dtype=torch.float32)
    drafter = untrained(target, **SMALL_TREE)
    settings = {"assistant_model": drafter, "compile_config": TRACED}
    with monkeypatch.context() as patch:
        choices = itertools.cycle([[0], [0, 1]])  # a single beam is a graph by itself
        patch.setattr(drafting, "_promising", lambda *_: next(choices))
        generate(target, family(name).make_inputs(target, text_len=12), max_new_tokens=6, **settings)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for text_len, num_new, node_probability in ((30, 20, 0.0), (300, 80, 0.0), (20, 20, 0.3)):
            drafter.config.tree_min_node_probability = node_probability
            inputs = family(name).make_inputs(target, text_len=text_len)
            expected = generate(target, inputs, max_new_tokens=num_new)
            assert_same_tokens(expected, generate(target, inputs, max_new_tokens=num_new, **settings))
    assert [each.is_broken for each in (*compiled_of(target), *compiled_of(drafter))] == [False, False]


def test_levels_come_in_one_layout(monkeypatch):
    """Whichever nodes are expanded: other shapes or strides would be compiled for anew, in the middle of decoding."""
    target = family("llama").make_target(dtype=torch.float32)
    inputs = family("llama").make_inputs(target, 1)
    drafter = untrained(target, tree_depth=6, tree_top_k=4)
    layouts: list[str] = []
    choices = itertools.cycle([[0], [2], [0, 1], [1, 3], [0, 1, 2, 3]])
    monkeypatch.setattr(drafting, "_promising", lambda *_: next(choices))
    run = compiling.CompiledFunction.__call__

    def noting(self, *args):
        beams = next((value for value in args if isinstance(value, Beams)), None)
        if beams is not None:
            seen = beams.sees[..., :1]  # of as many columns as there are
            layouts.append(str([(part.shape, part.stride()) for part in beams._replace(sees=seen.contiguous())]))
        return run(self, *args)

    monkeypatch.setattr(compiling.CompiledFunction, "__call__", noting)
    expected = generate(target, inputs, max_new_tokens=NUM_NEW)
    out = generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW, compile_config=TRACED)
    assert_same_tokens(expected, out)
    assert len(layouts) > 5 and len(set(layouts)) == 1


def test_twenty_calls_find_everything_where_it_was():
    """Addresses of buffers, graphs, memory: what the first call made serves others, with other prompts."""
    target = family("llama").make_target(dtype=torch.float32)
    drafter = untrained(target, tree_depth=3, tree_top_k=2, tree_size=6)
    seen = left_by_calls(target, drafter, 20, max_new_tokens=16, compile_config=TRACED)
    assert len(seen[1][0]) > 10 and seen[1][1] == 2  # levels, and the target
    assert all(each == seen[1] for each in seen[2:])


def test_what_changes_between_calls_is_seen():
    """Weights, hooks and adapters."""
    target = family("llama").make_target(dtype=torch.float32)
    inputs = family("llama").make_inputs(target)
    drafter = untrained(target, **SMALL_TREE)
    seen = []

    def agrees():
        plain = generate(target, inputs, max_new_tokens=NUM_NEW)
        out = generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW, compile_config=TRACED)
        assert_same_tokens(plain, out)
        assert not any(each.is_broken for each in compiled_of(target))
        seen.append(plain.sequences.tolist())

    agrees()
    layer = target.model.layers[1]
    with torch.no_grad():
        layer.mlp.up_proj.weight.neg_()
    agrees()
    handle = layer.mlp.register_forward_hook(lambda _, __, output: 3 * output)
    agrees()
    handle.remove()
    agrees()
    assert seen[3] == seen[1]
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_alpha=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, target)  # transformers 5.24's own method wants a peft that is not out
    agrees()
    for module in target.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    agrees()
    assert seen[5] == seen[1]
    assert len({str(each) for each in seen}) == 4


def test_compiled_functions_are_kept_for_as_long_as_their_model_lives():
    target = family("llama").make_target(dtype=torch.float32)
    inputs = family("llama").make_inputs(target)
    drafter = untrained(target, **SMALL_TREE)
    for _ in range(2):
        generate(target, inputs, assistant_model=drafter, max_new_tokens=6, compile_config=copy.copy(TRACED))
    assert len(compiled_of(target)) == 1
    generate(target, inputs, assistant_model=drafter, max_new_tokens=6, compile_config=CompileConfig(backend="eager"))
    assert len(compiled_of(target)) == 2
    ghost = weakref.ref(target)
    del target, drafter
    gc.collect()
    assert ghost() is None


# --- where nothing can be compiled ---


def decode(name, attention="sdpa", **settings):
    target = family(name).make_target(attn_implementation=attention, dtype=torch.float32)
    inputs = family(name).make_inputs(target)
    expected = generate(target, inputs, max_new_tokens=NUM_NEW)
    drafter, _ = oracle(target, inputs, expected.sequences)
    assert_same_tokens(expected, generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW, **settings))
    return target


def test_without_a_compiler(monkeypatch, warnings):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def find():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", find)
    target = decode("llama", compile_config=CompileConfig())
    assert not compiled_of(target)
    assert [line for line in warnings if "uncompiled: no C++ compiler was found" in line]


def test_a_compiler_that_fails(warnings):
    def fail(graph, examples):
        raise RuntimeError("this compiler is out of order")

    target = decode("llama", compile_config=CompileConfig(backend=fail, fullgraph=True))
    assert [each.is_broken for each in compiled_of(target)] == [True]
    assert len([line for line in warnings if "uncompiled" in line and "out of order" in line]) == 1


def test_a_device_error_is_no_reason_to_go_on(monkeypatch):
    def make(graph, examples):
        def run(*args):
            raise RuntimeError("out of memory")

        return run

    with pytest.raises(RuntimeError, match="out of memory"):
        decode("llama", compile_config=CompileConfig(backend=make, fullgraph=True))


def test_requests_that_stay_eager(warnings):
    target = decode("llama", "eager", compile_config=TRACED, output_attentions=True)
    assert not compiled_of(target) and any("output_attentions" in line for line in warnings)
    target = decode("llama", compile_config=TRACED, disable_compile=True)
    assert not compiled_of(target)


# --- the parts ---


def some(batch, num_tokens, seed):
    return torch.randn(batch, 2, num_tokens, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [[5], [5, 9, 7]], ids=str)
def test_fixed_layers_hold_what_growing_ones_hold(lengths):
    batch = len(lengths)
    slots, static = Slots([0] * batch), Slots([0] * batch, path_size=4, lease=Lease(0))
    ours, theirs = SlotLayer(static), SlotLayer(slots)
    for step, num_new in enumerate((max(lengths), 6, 300, 6)):
        states = some(batch, num_new, step)
        ours.lazy_initialization(states, states) if not ours.is_initialized else None
        ours.reserve(num_new)
        for layer in (ours, theirs):
            layer.update(states, 2 * states)
        static.settle()
        counts = lengths if step == 0 else [2 + row for row in range(batch)]
        if step:
            path = torch.tensor([0, 2, 3, 5])[None, : max(counts)].expand(batch, -1)
            static.keep(path)
            theirs.keep(path)
        slots.commit(counts)
        static.commit(counts)
    ours.move()
    assert ours.keys.shape[2] == capacity_for(ours.keys.shape[2])
    for row, length in enumerate(slots.lengths):
        assert torch.equal(ours.keys[row, :, :length], theirs.keys[row, :, :length])
        assert torch.equal(ours.values[row, :, :length], theirs.values[row, :, :length])


def test_tentative_slots_of_levels():
    """A level is written behind the one before, and taking them back starts over."""
    slots = Slots([3], lease=Lease(0))
    layer = SlotLayer(slots)
    levels = [some(1, 2, seed) for seed in range(2)]
    layer.lazy_initialization(levels[0], levels[0])
    for states in levels:
        layer.update(states, states)
        slots.extend(2)
    assert torch.equal(layer.keys[:, :, 3:7], torch.cat(levels, dim=2))
    slots.rollback()
    layer.update(levels[1], levels[1])
    assert torch.equal(layer.keys[:, :, 3:7], torch.cat([levels[1], levels[1]], dim=2))


def test_fixed_layers_leave_inference_mode():
    """Their buffers and where they write, in all layers of the same slots."""
    slots, states = Slots([0], path_size=3, lease=Lease(0)), some(1, 4, 0)
    layers = [SlotLayer(slots, name=str(index)) for index in range(2)]
    with torch.inference_mode():
        for layer in layers:
            layer.update(states, states)
        slots.commit([4])
    for layer in layers:
        layer.leave_inference_mode()
    for layer in layers:
        layer.update(states, states)
    slots.keep(torch.tensor([[0, 2]]))
    slots.commit([2])
    for layer in layers:
        layer.move()
        assert torch.equal(layer.keys[:, :, :6], torch.cat([states, states[:, :, [0, 2]]], dim=2))
        assert layer.get_seq_length() == 6 and layer.keys.shape[2] == capacity_for(6)


def test_masks_laid_out_for_accelerators(monkeypatch):
    target = family("llama").make_target(dtype=torch.float32)
    inputs = family("llama").make_inputs(target, 2, text_len=40)
    monkeypatch.setattr(masked_attention, "needs_alignment", lambda device: True)
    drafter = untrained(target, **SMALL_TREE)
    expected = generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW)
    out = generate(target, inputs, assistant_model=drafter, max_new_tokens=NUM_NEW, compile_config=TRACED)
    assert_same_tokens(expected, out)
    assert torch.equal(expected.accepted_lengths, out.accepted_lengths)
    assert [each.is_broken for each in (*compiled_of(target), *compiled_of(drafter))] == [False, False]


def test_a_cache_gets_its_layers_back_when_something_fails():
    cache = DynamicCache()
    states = some(1, 5, 0)
    cache.update(states, states, 0)
    slots = Slots([5], path_size=3, lease=Lease(0))
    before = list(cache.layers)
    with pytest.raises(KeyError), slot_layers(cache, slots, 8):
        assert cache.is_compileable and cache.layers[0].is_fixed
        raise KeyError
    assert cache.layers == before and torch.equal(cache.layers[0].keys, states)


def test_padded_trees():
    tree = DraftTree.from_parents(torch.tensor([[7, 8, 9]]), torch.tensor([[0, 0, 1]]), 2)
    padded = tree.padded(5)
    assert padded.tokens.tolist() == [[7, 8, 9, 7, 7]] and padded.depths.tolist() == [[0, 1, 2, 0, 0]]
    assert torch.equal(padded.ancestors[:, :3, :3], tree.ancestors)
    assert not padded.ancestors[:, :3, 3:].any() and not padded.ancestors[:, 3:, :3].any()
    assert torch.equal(padded.ancestors[0, 3:, 3:], torch.eye(2, dtype=torch.bool))
    assert tree.padded(3) is tree


def test_numbers_of_nodes():
    cpu, other = torch.device("cpu"), torch.device("cuda")
    assert [padded_count(n, 32, cpu) for n in (1, 2, 9, 10, 33, 34)] == [9, 9, 9, 17, 33, 41]
    assert [padded_count(n, 6, cpu) for n in (2, 7)] == [7, 7]
    assert [padded_count(n, 32, other) for n in (1, 20, 33)] == [33] * 3


def test_settings():
    settings = Settings.from_config(CompileConfig(mode="max-autotune", fullgraph=True))
    arguments = settings.arguments()
    assert arguments.items() >= {"fullgraph": True, "backend": "inductor"}.items()
    assert arguments["options"].items() >= torch._inductor.list_mode_options("max-autotune").items()
    with_options = Settings.from_config(CompileConfig(options={"epilogue_fusion": False}))
    options = with_options.arguments()["options"]
    assert callable(options.pop("guard_filter_fn")) and options == {"epilogue_fusion": False}
    model = nn.Linear(2, 2)
    assert compiled_function(model, torch.neg, settings) is compiled_function(model, torch.neg, copy.copy(settings))
    assert compiled_function(model, torch.neg, settings) is not compiled_function(model, torch.neg, with_options)
