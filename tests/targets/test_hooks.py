"""Hooks on modules that several threads run: each thread's hooks see its own forwards only."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch
from families import family
from lossless import assert_same_tokens, generate, oracle
from nodes import random_tree
from test_target_limits import longrope, make_inputs
from torch import nn

from dream_hf.targets.attention_statistics import observe_attention
from dream_hf.targets.hooks import after_own_forwards, before_own_forwards
from dream_hf.targets.target import Target
from dream_hf.targets.tree_masks import TreeScope, tree_scope


@contextmanager
def in_another_thread(*scopes):
    """Another thread has the scopes open while this one is in the block."""
    is_open, may_close = threading.Event(), threading.Event()

    def stay_open(rest):
        if not rest:
            is_open.set()
            may_close.wait(60)
            return
        with rest[0]:
            stay_open(rest[1:])

    thread = threading.Thread(target=stay_open, args=(scopes,))
    thread.start()
    assert is_open.wait(60)
    try:
        yield
    finally:
        may_close.set()
        thread.join()


def test_a_hook_sees_the_forwards_of_its_thread():
    module, seen = nn.Linear(2, 2), []
    with (
        in_another_thread(
            before_own_forwards([module], lambda *_: seen.append("other")),
            after_own_forwards([module], lambda *_: seen.append("other")),
        ),
        before_own_forwards([module], lambda module, args, kwargs: seen.append(("before", len(args), sorted(kwargs)))),
        after_own_forwards([module], lambda module, args, kwargs, output: output + 1),
    ):
        inputs = torch.zeros(1, 2)
        assert torch.equal(module(input=inputs), module(inputs) * 1)
        assert torch.equal(module(inputs), module.bias[None] + 1)
    assert seen == [("before", 0, ["input"]), ("before", 1, []), ("before", 1, [])]
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_hook_that_another_thread_is_putting_in_place():
    """torch calls it without keyword arguments until it has noted that it takes them."""
    module = nn.Linear(2, 2)
    target = family("llama").make_target()
    with in_another_thread(
        before_own_forwards([module], lambda module, args, kwargs: None),
        after_own_forwards([module], lambda module, args, kwargs, output: None),
        Target(target).recording(),
    ):
        for hooked in (module, Target(target).decoder):
            hooked._forward_pre_hooks_with_kwargs.clear()
            hooked._forward_hooks_with_kwargs.clear()
        module(torch.zeros(1, 2))
        target(torch.tensor([[5, 6]]))


def test_angles_while_another_thread_verifies_a_tree():
    target, inputs = longrope(), make_inputs(1)
    expected = generate(target, inputs, max_new_tokens=24)
    drafter, _ = oracle(target, inputs, expected.sequences)
    with in_another_thread(Target(target).taking_trees(), Target(target).recording(positions=True)):
        assert_same_tokens(expected, generate(target, inputs, max_new_tokens=24, assistant_model=drafter))


def test_queries_are_scaled_once_while_another_thread_verifies_a_tree():
    view = Target(family("llama4_scaled").make_target())
    project = view.rescaled_attentions[0].q_proj
    tree = random_tree(1, 16, torch.Generator().manual_seed(0))
    scope = TreeScope(torch.tensor([3]), tree.depths, tree.ancestors)
    hidden = torch.ones(1, tree.depths.shape[1], project.in_features, dtype=project.weight.dtype)
    plain = project(hidden)
    with view.taking_trees(), tree_scope(scope):
        expected = project(hidden)
    assert not torch.equal(expected, plain)
    with in_another_thread(view.taking_trees()), view.taking_trees(), tree_scope(scope):
        assert torch.equal(project(hidden), expected)


def test_attention_that_another_thread_looks_at():
    target = family("llama").make_target(attn_implementation="eager")
    inputs = family("llama").make_inputs(target, 1)
    attentions = [target.model.layers[0].self_attn]
    seen = []

    def observer(module, chunks):
        seen.append(sum(chunk.shape[2] for chunk in chunks))

    with in_another_thread(observe_attention(attentions, observer)), observe_attention(attentions, observer):
        target(**inputs)
    assert seen == [inputs["input_ids"].shape[1]]
