"""What a step reads is counted from configurations, and the shapes suggested read less."""

import sys
from pathlib import Path

import pytest
import torch
from families import family
from transformers import PreTrainedConfig

from dream_hf import DreamConfig, DreamDrafter, suggested_shape, weight_ratio
from dream_hf.targets.target import Target
from dream_hf.training.run import shape_advice

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from engine_shapes import SHAPES


@pytest.mark.parametrize(
    ("name", "change", "ratio"),
    [
        ("llava-1.6-7b", {}, 1.67),
        ("llava-1.6-7b", {"tree_depth": 3}, 1.34),
        ("qwen2.5-vl-7b", {}, 2.06),
        ("qwen2.5-vl-7b", {"draft_vocab_size": 32000}, 1.69),
    ],
)
def test_full_size_shapes(name, change, ratio):
    target_config = SHAPES[name].make_config()
    assert weight_ratio(target_config, DreamConfig.from_target(target_config, **change)) == pytest.approx(
        ratio, abs=5e-3
    )


def test_weights_are_those_of_the_models():
    target = family("llava_clip_llama").make_target()
    drafter = DreamDrafter.for_target(target, tree_depth=5)
    view = Target(target)
    lent = view.embedding.weight
    decoder = sum(weight.numel() for weight in view.decoder.parameters() if weight is not lent)
    head = view.lm_head.weight.numel()
    drafted = sum(weight.numel() for weight in drafter.parameters()) + head
    expected = (decoder + head + 5 * drafted) / (decoder + head)
    assert weight_ratio(target.config, drafter.config) == pytest.approx(expected)
    assert not any(weight.is_meta for weight in drafter.parameters()) and torch.get_default_device().type == "cpu"


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_suggestions_read_less(name):
    target_config = SHAPES[name].make_config()
    full, shape = DreamConfig.from_target(target_config), suggested_shape(target_config)
    suggested = DreamConfig.from_target(target_config, **shape)
    ratio = weight_ratio(target_config, suggested)
    assert ratio <= 1.3 or shape["tree_depth"] == 3
    assert shape.keys() <= {"tree_depth", "draft_vocab_size", "intermediate_size"} and shape["tree_depth"] >= 3
    assert suggested_shape(target_config, most=100) == {"tree_depth": full.tree_depth}
    assert ("draft_vocab_size" in shape) <= (full.vocab_size > 64_000)
    advice = shape_advice(target_config, full)
    assert f"{weight_ratio(target_config, full):.2f} times" in advice and "--drafter_config" in advice
    assert ("--draft_vocab_size 32000" in advice) == ("draft_vocab_size" in shape)
    if ratio <= 1.3:
        assert "--drafter_config" not in shape_advice(target_config, suggested)


def test_unknown_targets_get_no_advice():
    class Unknown(PreTrainedConfig):
        model_type = "unknown_to_transformers"

    config = Unknown(vocab_size=8, hidden_size=8)
    with pytest.raises(ValueError, match="Unrecognized configuration"):
        weight_ratio(config, DreamConfig())
    assert "not known" in shape_advice(config, DreamConfig())
