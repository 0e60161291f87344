"""Taking any part of a state's way through a tree away is noticed: by the tokens, or by the states after a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import family
from lossless import make_drafter
from states import assert_states_follow, plain_states

from dream_hf.runtime.recurrent import linear
from dream_hf.runtime.recurrent.layers import StateLayer, TreeStates
from dream_hf.runtime.recurrent.paths import NodePaths


def with_parents_mixed_up(monkeypatch):
    """A node goes on from the node before it, wherever that stands."""
    begin = TreeStates.begin

    def begin_mixed(self, paths):
        shown = torch.arange(paths.parents.shape[1])
        begin(self, replace(paths, ancestors=(shown[:, None] >= shown).expand_as(paths.ancestors)))

    monkeypatch.setattr(TreeStates, "begin", begin_mixed)


def with_a_state_not_rolled_back(monkeypatch):
    """All nodes of a tree enter the state."""

    def keep(self, path, counts):
        num_nodes = self.new_inputs.shape[2]
        whole = torch.arange(num_nodes).expand(len(path), -1)
        for part, record in self.records:
            part.copy_(record.after(part, whole, torch.full_like(counts, num_nodes)))
        self.records = []
        own_keep(self, path, counts)

    own_keep = StateLayer.keep
    monkeypatch.setattr(StateLayer, "keep", keep)


def with_inputs_of_siblings(monkeypatch):
    """A convolution sees the nodes before a node, siblings included."""

    def windows(self, size):
        places = size + torch.arange(self.parents.shape[1])[:, None] + torch.arange(1 - size, 1)
        return places.expand(*self.parents.shape, -1)

    monkeypatch.setattr(NodePaths, "windows", windows)


def with_gates_of_rejected_nodes(monkeypatch):
    """What a path's nodes wrote decays by all nodes that stand before them."""
    after = linear.OuterProducts.after

    def after_all(self, state, path, counts):
        own = self.decays - torch.nn.functional.pad(self.decays, (0, 0, 1, -1))
        return after(replace(self, decays=self.decays + 0.1 * own.cumsum(2)), state, path, counts)

    monkeypatch.setattr(linear.OuterProducts, "after", after_all)


def with_inputs_of_rejected_nodes(monkeypatch):
    """The convolution goes on from the first nodes of the tree."""
    own_keep = StateLayer.keep

    def keep(self, path, counts):
        self.records, records = [], self.records
        for part, record in records:
            part.copy_(record.after(part, path, counts))
        own_keep(self, torch.arange(path.shape[1]).expand_as(path), counts)

    monkeypatch.setattr(StateLayer, "keep", keep)


def with_counts_of_another_row(monkeypatch):
    """Rows move on by as many nodes as the row before them."""
    own_keep = StateLayer.keep
    monkeypatch.setattr(StateLayer, "keep", lambda self, path, counts: own_keep(self, path, counts.roll(1)))


EVERYTHING = [
    with_parents_mixed_up,
    with_a_state_not_rolled_back,
    with_inputs_of_siblings,
    with_gates_of_rejected_nodes,
    with_inputs_of_rejected_nodes,
    with_counts_of_another_row,
]
CONVOLUTIONS = [with_inputs_of_siblings, with_inputs_of_rejected_nodes, with_counts_of_another_row]
CASES = [(each, name) for name in ("qwen3_5", "nemotron_h") for each in EVERYTHING]
CASES += [(each, "lfm2_vl") for each in CONVOLUTIONS]


@pytest.mark.parametrize(("mutate", "name"), CASES, ids=[f"{mutate.__name__}-{name}" for mutate, name in CASES])
def test_mutations_are_caught(monkeypatch, mutate, name):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, 3)
    expected, states = plain_states(target, inputs)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        drafter = make_drafter("tree", target, inputs, expected.sequences, {})
        assert_states_follow(target, inputs, drafter, expected, states)
