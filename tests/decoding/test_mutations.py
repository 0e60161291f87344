"""Taking any part of exact verification away is noticed by the check for lossless decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import family
from lossless import assert_lossless

from dream_hf.decoding import sampling as choosing
from dream_hf.decoding import stopping
from dream_hf.decoding.target_forward import TargetForward
from dream_hf.runtime import kv_cache as caches
from dream_hf.targets import target as targets
from dream_hf.targets import tree_masks

PENALISED = {"repetition_penalty": 1.5}
ENDING = {"eos_token_id": list(range(3, 12))}


def patched(monkeypatch, owner, name, make):
    """Replace `owner.name` by what `make` makes of it."""
    monkeypatch.setattr(owner, name, make(getattr(owner, name)))


def without_the_mask(monkeypatch):
    """Nodes see all that precedes them in the tree, siblings included."""
    patched(
        monkeypatch, tree_masks, "tree_mask_function", lambda _: lambda scope, mask_function, q_offset: mask_function
    )


def without_logical_positions_in_the_mask(monkeypatch):
    """Windows and chunks cut by slot, not by position."""

    def make(original):
        def by_slot(scope, mask_function, q_offset):
            everything = lambda batch, head, query, key: query >= -1  # noqa: E731
            ancestors = original(scope, everything, q_offset)
            return lambda b, h, q, k: ancestors(b, h, q, k) & mask_function(b, h, q, k)

        return by_slot

    patched(monkeypatch, tree_masks, "tree_mask_function", make)


def without_compaction(monkeypatch):
    """Accepted nodes stay where they are; the first slots are taken for theirs."""
    monkeypatch.setattr(caches.SlotLayer, "keep", lambda self, path: None)


def without_depth_positions(monkeypatch):
    """Nodes are numbered through instead of by depth."""

    def make(forward):
        def numbered(self, tree):
            depths = torch.arange(tree.num_nodes).expand_as(tree.depths)
            return forward(self, replace(tree, depths=depths))

        return numbered

    patched(monkeypatch, TargetForward, "__call__", make)


def without_rope_deltas(monkeypatch):
    """Positions count tokens, as if pictures took one position each token."""

    def make(start):
        def counting(self, *arguments):
            start(self, *arguments)
            self.root_positions = torch.full_like(self.root_positions, self.prompt_slots)

        return counting

    patched(monkeypatch, TargetForward, "begin", make)


def without_processors(monkeypatch):
    """Nodes are judged by raw logits."""
    monkeypatch.setattr(choosing._Walk, "choose", _raw_choice)


def _raw_choice(self, rows, length):
    return self._at_nodes(self.logits, rows).argmax(-1).tolist()


def without_the_true_prefix(monkeypatch):
    """Processors see the text before the last token."""
    monkeypatch.setattr(choosing._Walk, "prefixes", lambda self, length, rows: self.sequences.at(length - 1, rows))


def without_ragged_rows(monkeypatch):
    """All rows keep as many slots as the one that gained most."""

    def commit(self, counts):
        self.tentative = 0
        self.place([length + max(counts) for length in self.lengths])

    monkeypatch.setattr(caches.Slots, "commit", commit)


def without_ends_inside_paths(monkeypatch):
    """Only the last token of what a row gained is asked whether the text ends."""

    def cut(self, row, start, tokens):
        if tokens[-1] in self.eos_token_ids or start + len(tokens) >= self.max_length:
            self.ended_at[row] = start + len(tokens)
        return len(tokens)

    monkeypatch.setattr(stopping.Stopping, "cut", cut)


def without_query_scales(monkeypatch):
    """Llama4's queries are scaled by slot."""
    monkeypatch.setattr(targets, "rescale_tree_queries", lambda module, queries: queries)


def without_the_sliding_offset(monkeypatch):
    """Layers that dropped old slots say that they start at the first."""
    monkeypatch.setattr(
        caches.SlotLayer, "get_mask_sizes", lambda self, n: (self.slots.end + n - self.first_visible, 0)
    )


MUTATIONS = [
    (without_the_mask, "llava_clip_llama", 1, {}),
    (without_the_mask, "paligemma2", 3, {}),
    (without_logical_positions_in_the_mask, "gemma3", 1, {}),
    (without_logical_positions_in_the_mask, "llama4", 1, {}),
    (without_compaction, "llava_clip_llama", 1, {}),
    (without_compaction, "gemma3", 3, {}),
    (without_depth_positions, "llava_clip_llama", 1, {}),
    (without_depth_positions, "qwen2_vl", 3, {}),
    (without_rope_deltas, "qwen2_vl", 1, {}),
    (without_rope_deltas, "glm4v", 3, {}),
    (without_processors, "llava_clip_llama", 1, PENALISED),
    (without_the_true_prefix, "llava_clip_llama", 1, PENALISED),
    (without_ragged_rows, "llava_clip_llama", 3, {}),
    (without_ends_inside_paths, "llava_clip_llama", 1, ENDING),
    (without_query_scales, "llama4_scaled", 1, {}),
    (without_the_sliding_offset, "gemma3", 1, {}),
]


@pytest.mark.parametrize(
    ("mutate", "name", "batch", "settings"), MUTATIONS, ids=[f"{m.__name__}-{n}-{b}" for m, n, b, _ in MUTATIONS]
)
def test_mutations_are_caught(monkeypatch, mutate, name, batch, settings):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch, text_len=24)
    arguments = {"settings": lambda: dict(settings), "foresight": lambda: {**settings, "eos_token_id": None}}
    assert_lossless(target, inputs, **arguments, drafts=["tree"])
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError)) as caught:
        assert_lossless(target, inputs, **arguments, drafts=["tree"])
    if mutate is not without_the_sliding_offset:  # a mask of the wrong width cannot be used at all
        assert caught.type is AssertionError and "drafts: tree" in str(caught.value)


def test_a_wrong_drafter_is_slow_and_never_wrong(monkeypatch):
    target = family("gemma2").make_target()
    inputs = family("gemma2").make_inputs(target, 3)
    monkeypatch.setattr(targets, "logit_rules", lambda *_: [targets.LogitRule(scale=-0.5)])
    assert_lossless(target, inputs, drafts=["untrained", "tree"])
