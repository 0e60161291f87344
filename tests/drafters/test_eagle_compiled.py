"""A compiled target, which takes no hooks, hands a published drafter the same features."""

from __future__ import annotations

import pytest
import torch
from dflash_reference import LAYOUTS as BLOCKS
from eagle_reference import LAYOUTS
from families import family
from lossless import assert_same_tokens, generate
from test_eagle import WIDE, Watch
from transformers import CompileConfig

import dream_hf

KEEPS_DOUBLE = False  # compiled code cannot look at callers


@pytest.mark.parametrize(
    ("name", "layout"),
    [("llama", "eagle3"), ("llava_clip_llama", "vispec"), ("llava_clip_llama", "speculators-anchored")],
)
def test_a_compiled_target_hands_over_the_same_features(name, layout, tmp_path):
    target = family(name).make_target(dtype=torch.float32)
    folder = next(each for each in [*LAYOUTS, *BLOCKS] if each.name == layout).publish(tmp_path)
    watches = [Watch(dream_hf.load_drafter(folder, target).with_settings(**WIDE)) for _ in range(2)]
    inputs = family(name).make_inputs(target)
    compilation = CompileConfig(backend="eager", mode=None)
    plain, compiled = (
        generate(target, inputs, max_new_tokens=8, assistant_model=watch, **more)
        for watch, more in zip(watches, ({}, {"compile_config": compilation}), strict=True)
    )
    assert_same_tokens(plain, compiled)
    for (_, ours), (_, theirs) in zip(watches[0].trees, watches[1].trees, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
