"""Tree masks against a mask written out by hand, under every attention implementation; scopes; proof that they are used."""

from __future__ import annotations

import copy
import threading
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from families import family
from lossless import SMALL_TREE, assert_lossless, assert_same_tokens, generate, untrained
from nodes import random_tree
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForCausalLM, CompileConfig, GptOssConfig
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    add_offsets_to_mask_function,
    causal_mask_function,
    flash_attention_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import AttentionInterface

from dream_hf.runtime import compilation as compiling
from dream_hf.targets import tree_masks, tree_proof
from dream_hf.targets.attention_statistics import observe_attention
from dream_hf.targets.target import Target
from dream_hf.targets.tree_masks import (
    TreeScope,
    takes_tree_masks,
    tree_implementation,
    tree_mask_function,
    tree_masks_available,
    tree_scope,
)
from dream_hf.targets.tree_proof import are_tree_masks

WINDOW = 5
FLASH = "flash_attention_2"  # whose kernel is not installed: `flash` below stands in for it


def flash(module, query, key, value, attention_mask, scaling, sliding_window=None, softcap=None, s_aux=None, **_):
    """Takes what FlashAttention takes, no mask or a 2D one, and honours windows, soft caps and sinks."""
    assert attention_mask is None or attention_mask.ndim == 2, "a mask for another implementation"
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    num_queries, num_keys = query.shape[2], key.shape[2]
    own, keys = torch.arange(num_keys)[num_keys - num_queries :, None], torch.arange(num_keys)
    hidden = (keys > own) | (keys <= own - (sliding_window or num_keys))
    if attention_mask is not None:
        hidden = (hidden | ~attention_mask[:, None, None, -num_keys:].bool()) & (keys != own)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return (scores.softmax(-1)[..., :num_keys] @ value).transpose(1, 2), None


def own_sdpa(module, *args, **kwargs):
    """Takes masks of all four dimensions, and marks its output, so that it is seen to have run."""
    output, weights = AttentionInterface._global_mapping["sdpa"](module, *args, **kwargs)
    return output * 1.5, weights


@pytest.fixture
def implementations(monkeypatch):
    """Names to load a target with: FlashAttention's, a kernel's, one without masks, one with masks like sdpa's."""
    functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    for name in (FLASH, "some/flash-kernel", "maskless"):
        monkeypatch.setitem(functions, name, flash)
    monkeypatch.setitem(masks, "some/flash-kernel", flash_attention_mask)
    monkeypatch.setitem(functions, "own_sdpa", own_sdpa)
    monkeypatch.setitem(masks, "own_sdpa", sdpa_mask)


def make_target(name: str, implementation: str):
    """A tiny target in float64 that runs with an implementation in its text decoder only."""
    make = tiny_gpt_oss if name == "gpt_oss" else family(name).make_target
    target = make(attn_implementation="eager", dtype=torch.float64)
    target.config.get_text_config(decoder=True)._attn_implementation_internal = implementation
    return target


def tiny_gpt_oss(**loading):
    """Sinks that take a large share of the attention, and windows."""
    settings = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8, "eos_token_id": None}
    settings |= {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = GptOssConfig(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = AutoModelForCausalLM.from_config(config, experts_implementation="eager", **loading).eval()
        with torch.no_grad():
            for name, weight in target.named_parameters():
                weight.normal_(std=2.0 if "sinks" in name else 0.5)
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target


def make_inputs(name: str, target, batch: int = 1):
    if name != "gpt_oss":
        return family(name).make_inputs(target, batch)
    ids = torch.randint(5, 90, (batch, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 3 * row] = ids[row, : 3 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_as_plain(target, inputs, num_new: int = 24):
    """Drafts are right in part, with wrong siblings: who sees whom decides what is written."""
    assert_lossless(target, inputs, lambda: {"max_new_tokens": num_new}, drafts=["tree"])


# --- what a mask shows ---


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
    whole = function(rows, 0, queries, slots)
    assert torch.equal(whole, by_hand(lengths, tree, window))
    last = TreeScope(scope.lengths, tree.depths, tree.ancestors[:, 5:])  # the last three, behind five in their slots
    function = tree_mask_function(last, own, q_offset + 5)
    assert torch.equal(function(rows, 0, queries[:, 5:], slots), whole[:, 5:])


@pytest.mark.parametrize("place", ["registered", "local before the scope", "local during the scope"])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_masks_in_a_scope_and_out_of_it(monkeypatch, name, place):
    target = family("llama").make_target()
    tree = random_tree(2, 4, torch.Generator().manual_seed(0))
    scope = TreeScope(torch.tensor([3, 6]), tree.depths, tree.ancestors)

    def override():
        own = AttentionMaskInterface._global_mapping[name]
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, name, partial(own))

    def build(q_length):
        arguments = {"batch_size": 2, "q_length": q_length, "kv_length": 10, "q_offset": 10 - q_length, "kv_offset": 0}
        arguments |= {"mask_function": causal_mask_function, "allow_is_causal_skip": False}
        arguments |= {"device": torch.device("cpu"), "dtype": torch.float32}
        return tree_masks.visible(ALL_MASK_ATTENTION_FUNCTIONS[name](**arguments))

    plain = build(4)
    if place == "local before the scope":
        override()
    with tree_masks_available(target.model, target.config):
        if place == "local during the scope":
            override()
        assert torch.equal(build(4), plain)
        with tree_scope(scope):
            assert torch.equal(build(4)[:, 0], by_hand([3, 6], tree, None))
            assert build(3).shape[-2] == 3  # not the tree's forward: left alone
        assert torch.equal(build(4), plain)


# --- what stands in for implementations without masks ---


@pytest.mark.parametrize("implementation", [FLASH, "some/flash-kernel", "maskless", "own_sdpa"])
@pytest.mark.parametrize("name", ["llama", "llava_clip_llama", "gpt_oss", "gemma2", "gemma3"])
def test_output_is_that_of_the_implementation(implementations, name, implementation):
    """Sinks, soft caps and windows included, and pictures."""
    if implementation == "maskless" and name in ("gpt_oss", "gemma2", "gemma3"):
        pytest.skip("transformers does not tell such an implementation where a window's cache begins")
    if (name, implementation) == ("gemma2", "own_sdpa"):
        pytest.skip("sdpa refuses soft caps")
    target = make_target(name, implementation)
    assert_as_plain(target, make_inputs(name, target))


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2"])
def test_ragged_batches(implementations, name):
    target = make_target(name, FLASH)
    assert_as_plain(target, make_inputs(name, target, batch=3), num_new=12)


@pytest.mark.parametrize(
    ("name", "implementation", "stand_in"),
    [
        ("llama", FLASH, "sdpa"),
        ("gemma3", FLASH, "sdpa"),
        ("gpt_oss", FLASH, "eager"),
        ("gemma2", FLASH, "eager"),
        ("gpt_oss", "own_sdpa", "own_sdpa"),
        ("llama", "eager", "eager"),
    ],
)
def test_what_stands_in(implementations, name, implementation, stand_in):
    target = make_target(name, implementation)
    view = Target(target)
    with view.recording():
        target(**make_inputs(name, target))
    assert tree_implementation(view.decoder, view.text_config, view.noted) == stand_in


def test_what_sdpa_would_drop_needs_eager(implementations):
    """Whatever its name: real numbers that a layer passes on."""
    target = make_target("llama", FLASH)
    for names, stand_in in ((("position_ids", "sliding_window"), "sdpa"), (("bias_of_mine",), "eager")):
        values = {"position_ids": torch.arange(3)[None], "sliding_window": 4, "bias_of_mine": torch.randn(3)}
        view = Target(target)
        with view.recording():
            target.model(input_ids=torch.tensor([[5, 6, 7]]), **{name: values[name] for name in names})
        assert tree_implementation(view.decoder, view.text_config, view.noted) == stand_in


def test_without_knowledge_eager_stands_in(implementations):
    target = make_target("llama", FLASH)
    assert tree_implementation(target.model, target.config) == "eager"


def test_other_configurations_stay_as_they_are(implementations):
    """The vision tower's, while trees are verified; those of layers that have one each follow the decoder's."""
    target = make_target("llava_clip_llama", FLASH)
    text_config, vision_config = target.config.text_config, target.config.vision_config
    for layer in target.get_decoder().layers:
        layer.self_attn.config = copy.deepcopy(text_config)
    layers = [layer.self_attn.config for layer in target.get_decoder().layers]
    tree = random_tree(1, 4, torch.Generator().manual_seed(0))
    scope = TreeScope(torch.tensor([3]), tree.depths, tree.ancestors)
    with tree_masks_available(target.get_decoder(), text_config):
        assert text_config._attn_implementation == FLASH  # forwards that are not over a tree
        with tree_scope(scope):
            names = [config._attn_implementation for config in (text_config, *layers)]
            assert names == ["eager"] * len(names)
            assert (target.config._attn_implementation, vision_config._attn_implementation) == ("eager", "eager")
            vision_config._attn_implementation = "sdpa"
            assert vision_config._attn_implementation == "sdpa"
    assert text_config.to_dict() == copy.deepcopy(text_config).to_dict()
    assert_as_plain(target, make_inputs("llava_clip_llama", target), num_new=8)


def test_an_implementation_that_cannot_be_changed_is_refused_before_any_forward(implementations, monkeypatch):
    target = make_target("llama", FLASH)
    drafter = untrained(target)
    monkeypatch.setattr(type(target.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    target.register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    with pytest.raises(ValueError, match=r"attn_implementation='flash_attention_2'.*load the target with"):
        generate(target, make_inputs("llama", target), assistant_model=drafter)


def test_names_by_their_masks(implementations):
    names = ["sdpa", "eager", "flex_attention", "own_sdpa", FLASH, "some/flash-kernel", "maskless", "unheard of"]
    assert [takes_tree_masks(name) for name in names] == [True] * 4 + [False] * 4


# --- scopes ---


def state():
    getters = [vars(owner).get("__getitem__") for owner in (AttentionMaskInterface, AttentionInterface)]
    mappings = [dict(owner._global_mapping) for owner in (AttentionMaskInterface, AttentionInterface)]
    return getters, mappings, vars(PreTrainedConfig)["_attn_implementation"]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_all_is_put_back(implementations, error):
    target = make_target("llama", FLASH)
    before = state()
    arguments = (target.model, target.config)
    try:
        with ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(tree_masks_available(*arguments))
            stack.enter_context(observe_attention([Target(target).last_attention], lambda *_: None))
            assert state() != before
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert state() == before
    assert target.config._attn_implementation == FLASH
    assert tree_masks._tree.get() is None and tree_masks._implementations.get() is None


@pytest.mark.parametrize("is_first_closed_first", [True, False])
def test_threads_that_overlap_on_one_configuration(implementations, is_first_closed_first):
    """A scope lives on when another thread's closes, and the last one leaves nothing."""
    target = make_target("llama", FLASH)
    before = state()
    tree = random_tree(1, 4, torch.Generator().manual_seed(0))
    scope = TreeScope(torch.tensor([3]), tree.depths, tree.ancestors)
    is_open, may_close = threading.Event(), threading.Event()

    def stay_open():
        with tree_masks_available(target.model, target.config):
            is_open.set()
            may_close.wait(60)

    thread = threading.Thread(target=stay_open)
    thread.start()
    is_open.wait(60)
    with tree_masks_available(target.model, target.config):
        if is_first_closed_first:
            may_close.set()
            thread.join()
        with tree_scope(scope):
            assert target.config._attn_implementation == "eager"
            target.model(inputs_embeds=torch.zeros(1, 4, 32, dtype=torch.float64), use_cache=False)
            assert len(tree_masks.tree_masks()) == 1
        assert target.config._attn_implementation == FLASH
    may_close.set()
    thread.join()
    assert state() == before
    assert target.config._attn_implementation == FLASH


def test_threads_that_generate_at_once(implementations):
    """One model, plain and drafted, prompts of several lengths: no forward sees another's tree or implementation."""
    target = make_target("gpt_oss", FLASH)
    prompts = [{"input_ids": torch.arange(5, 5 + length)[None]} for length in (6, 9, 14, 21)]
    expected = [generate(target, prompt, max_new_tokens=16).sequences for prompt in prompts]
    drafter = untrained(target, **SMALL_TREE)
    actual: list[list[Tensor]] = [[] for _ in prompts]

    def work(index):
        for assistant in (drafter, None, drafter):
            out = generate(target, prompts[index], assistant_model=assistant, max_new_tokens=16)
            actual[index].append(out.sequences)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for wanted, got in zip(expected, actual, strict=True):
        assert len(got) == 3 and all(torch.equal(sequences, wanted) for sequences in got)
    assert target.config._attn_implementation == FLASH


def test_another_thread_does_not_see_the_tree():
    tree = random_tree(1, 4, torch.Generator().manual_seed(0))
    seen = []
    with tree_scope(TreeScope(torch.tensor([3]), tree.depths, tree.ancestors)):
        thread = threading.Thread(target=lambda: seen.append(tree_masks.current_tree()))
        thread.start()
        thread.join()
        assert tree_masks.current_tree() is not None
    assert seen == [None]


# --- functions of the user's own, and models that go their own way ---


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_local_overrides_that_do_as_asked(monkeypatch, name):
    """transformers' documented way to change masks for one registry."""
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "sdpa", partial(sdpa_mask))
    target = make_target(name, "sdpa")
    assert_as_plain(target, make_inputs(name, target))


def ignoring(**arguments):
    """Causal by slots, whatever is asked for, unless the tokens are few."""
    if arguments["q_length"] > 2:
        arguments["mask_function"] = causal_mask_function
    return sdpa_mask(**arguments)


def hiding(**arguments):
    """As asked, but for the first token."""
    mask = sdpa_mask(**arguments)
    return mask if mask is None or arguments["q_length"] < 3 else mask & (torch.arange(mask.shape[-1]) > 0)


def in_own_model(target):
    """A model that makes its masks itself."""

    def own_mask(module, args, kwargs):
        length = kwargs["hidden_states"].shape[1]
        past = next((value.get_seq_length(1) for value in kwargs.values() if isinstance(value, Cache)), 0)
        mask = torch.ones(length, past + length, dtype=torch.bool).tril(past)[None, None]
        return args, {**kwargs, "attention_mask": mask}

    target.model.layers[1].self_attn.register_forward_pre_hook(own_mask, with_kwargs=True)


def in_a_layer_that_nobody_sees(target):
    """Which layer of the cache is its own is not known."""
    target.model.layers[1].self_attn.layer_idx = torch.tensor(1)


@pytest.mark.parametrize(
    "change", [ignoring, hiding, in_own_model, in_a_layer_that_nobody_sees], ids=lambda change: change.__name__
)
def test_what_is_not_proven_is_an_error(monkeypatch, change):
    target = make_target("llama", "sdpa")
    inputs = make_inputs("llama", target)
    if change.__name__.startswith("in"):
        change(target)
    else:
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "sdpa", change)
    message = r"`LlamaForCausalLM` with `attn_implementation='sdpa'` cannot verify draft trees.*generate without"
    with pytest.raises(RuntimeError, match=message):
        generate(target, inputs, assistant_model=untrained(target, **SMALL_TREE))
    assert not any(
        module._forward_pre_hooks for module in target.modules() if module is not target.model.layers[1].self_attn
    )


def test_compiled_forwards_are_proven_in_every_call(monkeypatch):
    """The first call watches the model uncompiled; in later ones the masks that were made beforehand are looked at."""
    target = make_target("llama", "sdpa")
    inputs, drafter = make_inputs("llama", target), untrained(target, **SMALL_TREE)
    settings = {"assistant_model": drafter, "compile_config": CompileConfig(backend="eager"), "max_new_tokens": 8}
    expected = generate(target, inputs, max_new_tokens=8)
    for _ in range(2):
        assert_same_tokens(expected, generate(target, inputs, **settings))
    assert [function.watched for function in compiling._compiled[target].values()] == [{"sdpa"}]
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "sdpa", ignoring)
    with pytest.raises(RuntimeError, match="cannot verify draft trees: a mask that was built"):
        generate(target, inputs, **settings)


def test_what_stands_in_is_not_compiled(implementations):
    target = make_target("gpt_oss", FLASH)
    inputs, drafter = make_inputs("gpt_oss", target), untrained(target, **SMALL_TREE)
    out = generate(target, inputs, assistant_model=drafter, compile_config=CompileConfig(), max_new_tokens=8)
    assert_same_tokens(generate(target, inputs, max_new_tokens=8), out)
    assert target not in compiling._compiled


@pytest.mark.parametrize("is_obeyed", [True, False])
def test_block_masks_are_proven(monkeypatch, is_obeyed):
    target = family("llama").make_target()
    tree = random_tree(2, 4, torch.Generator().manual_seed(0))

    def block_mask(batch_size, q_length, kv_length, q_offset, mask_function, **_):
        function = mask_function if is_obeyed else causal_mask_function
        shifted = add_offsets_to_mask_function(function, q_offset, 0)
        return create_block_mask(shifted, batch_size, None, q_length, kv_length, device="cpu")

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "flex_attention", block_mask)
    arguments = {
        "batch_size": 2,
        "q_length": 4,
        "kv_length": 10,
        "q_offset": 6,
        "kv_offset": 0,
        "attention_mask": None,
    }
    with tree_masks_available(target.model, target.config):
        with tree_scope(TreeScope(torch.tensor([3, 6]), tree.depths, tree.ancestors)):
            mask = ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"](mask_function=causal_mask_function, **arguments)
            assert are_tree_masks(mask) == is_obeyed
            assert not are_tree_masks({"full_attention": mask, "sliding_attention": None})


def test_only_the_first_tree_forward_is_watched(monkeypatch):
    target = make_target("llama", "sdpa")
    calls = []
    monkeypatch.setattr(
        tree_proof,
        "attending_modules",
        lambda *given, own=tree_proof.attending_modules: calls.append(1) or own(*given),
    )
    out = generate(target, make_inputs("llama", target), assistant_model=untrained(target, **SMALL_TREE))
    assert out.accepted_lengths.shape[1] > 4
    assert len(calls) <= 2  # over a tree, and over a root alone


def test_paused_steps_are_plain_ones(implementations, monkeypatch):
    """Roots alone need no mask of ours, and so no other implementation than the target's."""
    widths = []

    def counted(module, query, *given, **named):
        widths.append(query.shape[2])
        return flash(module, query, *given, **named)

    monkeypatch.setitem(AttentionInterface._global_mapping, FLASH, counted)
    target = make_target("llama", FLASH)
    inputs, drafter = make_inputs("llama", target), untrained(target, **SMALL_TREE, pause_below=100.0)
    out = generate(target, inputs, assistant_model=drafter, max_new_tokens=12)
    num_plain = (out.drafted_lengths == 0).sum().item()
    assert num_plain > 4 and widths.count(1) == num_plain * target.config.num_hidden_layers


def test_layers_that_the_user_compiled_are_watched():
    target = make_target("llama", "sdpa")
    inputs, drafter = make_inputs("llama", target), untrained(target, **SMALL_TREE)
    expected = generate(target, inputs, max_new_tokens=4)
    target.model.layers[1].compile(backend="eager", dynamic=True)
    assert_same_tokens(expected, generate(target, inputs, assistant_model=drafter, max_new_tokens=4))


def test_a_scaled_query_of_another_shape_is_an_error():
    target = family("llama4_scaled").make_target()
    view = Target(target)
    assert view.rescaled_attentions
    module = view.rescaled_attentions[0]
    module.q_proj = nn.Sequential(module.q_proj, nn.Flatten(0, 1))
    tree = random_tree(1, 4, torch.Generator().manual_seed(0))
    scope = TreeScope(torch.tensor([3]), tree.depths, tree.ancestors)
    with view.taking_trees(), tree_scope(scope), pytest.raises(RuntimeError, match="scales queries"):
        module.q_proj(torch.zeros(1, 4, module.q_proj[0].in_features, dtype=target.dtype))
    module.attn_temperature_tuning = False
    with pytest.raises(ValueError, match="attn_temperature_tuning"):
        view.rescaled_attentions  # noqa: B018
