"""Targets whose layers keep a state: trees are verified, every node going on from its parent's state."""

from __future__ import annotations

import pytest
from families import HYBRIDS, Family, family
from lossless import make_drafter
from states import assert_states_follow, plain_states

BOTH_WAYS = ["qwen3_5", "lfm2_vl", "falcon_h1"]
LONG = 108  # longer than a chunk of the delta rule, 64
CASES = [
    (each, attention, batch)
    for each in HYBRIDS
    for attention, batch in [("sdpa", 1), ("eager", 3), ("sdpa", 3), ("eager", 1)][
        : 4 if each.name in BOTH_WAYS else 2
    ]
]


def check(target, inputs, drafts=("untrained", "tree", "chain", "fuzz")):
    expected, states = plain_states(target, inputs)
    for name in drafts:
        assert_states_follow(
            target, inputs, make_drafter(name, target, inputs, expected.sequences, {}), expected, states
        )


@pytest.mark.parametrize(("family", "attention", "batch"), CASES, ids=str)
def test_every_family(family: Family, attention, batch):
    target = family.make_target(attn_implementation=attention)
    check(target, family.make_inputs(target, batch, text_len=24))


@pytest.mark.parametrize("images", [0, 2, [1, 0, 2]], ids=["none", "two", "mixed"])
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "lfm2_vl"])
def test_any_number_of_pictures(name, images):
    target = family(name).make_target()
    check(target, family(name).make_inputs(target, 3, images=images), ["tree"])


@pytest.mark.parametrize("length", [2, LONG])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "nemotron_h", "jamba"])
def test_prompts_shorter_than_the_convolution_and_longer_than_a_chunk(name, length):
    target = family(name).make_target()
    for batch in (1, 3):
        check(target, family(name).make_inputs(target, batch, images=0, text_len=length), ["tree", "fuzz"])
