"""Training arguments: the paper's defaults, refusals, command line and YAML."""

from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser

from dream_hf.training.arguments import DreamTrainingArguments


def arguments(tmp_path, **overrides):
    return DreamTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **overrides)


def test_defaults_are_the_paper_s(tmp_path):
    args = arguments(tmp_path)
    weights = (args.final_feature_loss_weight, args.mid_feature_loss_weight, args.kl_loss_weight)
    assert weights == (0.2, 0.2, 1.0)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2) == (3e-5, 0.9, 0.95)
    assert (args.max_grad_norm, args.weight_decay) == (0.5, 0.0)
    assert args.per_device_train_batch_size == 4
    assert (args.feature_noise, args.rollout_steps, args.rollout_decay) == (0.2, 1, 0.8)
    assert (args.metric_for_best_model, args.greater_is_better) == ("eval_tau", True)


def test_warm_up_is_a_share_of_any_run_and_the_paper_s_in_its_recipe(tmp_path):
    args = arguments(tmp_path)
    assert [args.get_warmup_steps(steps) for steps in (1, 30, 100, 68_000)] == [1, 1, 3, 2040]
    for name in ("paper", "rollout"):
        recipe = yaml.safe_load((Path(__file__).parents[2] / f"examples/recipes/{name}.yaml").read_text())
        assert recipe["warmup_steps"] == 2000


REFUSALS = {
    "negative weight": ({"kl_loss_weight": -1.0}, r"`kl_loss_weight` \(-1.0\) must be at least 0"),
    "NaN weight": ({"kl_loss_weight": float("nan")}, r"`kl_loss_weight` \(nan\) must be at least 0"),
    "infinite weight": (
        {"mid_feature_loss_weight": float("inf")},
        r"`mid_feature_loss_weight` \(inf\) must be .* finite",
    ),
    "negative noise": ({"feature_noise": -0.1}, r"`feature_noise` \(-0.1\) must be at least 0"),
    "no rollout step": ({"rollout_steps": 0}, r"`rollout_steps` \(0\) must be at least 1"),
    "growing rollout": ({"rollout_decay": 1.5}, r"`rollout_decay` \(1.5\) must be above 0 and at most 1"),
    "no chain": ({"rollout_share": 0.0}, r"`rollout_share` \(0.0\) must be above 0 and at most 1"),
    "unknown importance": ({"visual_importance": "size"}, r"`visual_importance` \('size'\) must be one of"),
    "less than nothing kept": (
        {"visual_keep_ratio": -0.1},
        r"`visual_keep_ratio` \(-0.1\) must be at least 0 and at most 1",
    ),
    "short rows": ({"max_length": 1}, r"`max_length` \(1\) must be at least 2"),
    "negative bad rows": ({"max_bad_rows": -1}, r"`max_bad_rows` \(-1\) must be at least 0"),
    "no cache space": ({"feature_cache_max_gb": 0.0}, r"`feature_cache_max_gb` \(0.0\) must be above 0"),
    "unknown selection": ({"feature_selection": "layer"}, r"`feature_selection` \('layer'\) must be one of \['token'"),
    "unknown loss": ({"acceptance_loss": "l2"}, r"`acceptance_loss` \('l2'\) must be one of"),
    "unknown norm": ({"feature_normalization": "final"}, r"`feature_normalization` \('final'\) must be one of"),
    "static without layer": ({"feature_selection": "static"}, "exactly one of .* got neither"),
    "static with two": (
        {"feature_selection": "static", "static_layer_index": 3, "static_layer_depth": 0.5},
        r"exactly one of .* got \['static_layer_index', 'static_layer_depth'\]",
    ),
    "layer without static": ({"static_layer_depth": 0.5}, r"`static_layer_depth` \(0.5\) has no effect with"),
    "nothing to learn": (
        {"kl_loss_weight": 0.0, "final_feature_loss_weight": 0.0, "feature_selection": "none"},
        "nothing to learn",
    ),
    "columns": ({"remove_unused_columns": True}, r"`remove_unused_columns` \(True\)"),
    "stopping without evaluation": (
        {"early_stopping_patience": 3},
        r"`early_stopping_patience` \(3\) needs evaluations",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_names_argument_and_value(tmp_path, case):
    overrides, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **overrides)


def test_early_stopping_ends_with_the_best_checkpoint(tmp_path):
    args = arguments(tmp_path, early_stopping_patience=2, eval_strategy="epoch", save_strategy="epoch")
    assert args.load_best_model_at_end and args.greater_is_better
    assert not arguments(tmp_path, metric_for_best_model="eval_loss").greater_is_better


def test_static_layer_either_way(tmp_path):
    assert arguments(tmp_path, feature_selection="static", static_layer_index=3).static_layer_index == 3
    assert arguments(tmp_path, feature_selection="static", static_layer_depth=0.25).static_layer_depth == 0.25


def test_command_line_and_yaml_agree(tmp_path):
    values = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "feature_selection": "static",
        "static_layer_depth": 0.5,
        "acceptance_loss": "tv",
        "feature_normalization": "none",
        "visual_keep_ratio": 0.5,
        "rollout_steps": 3,
        "max_length": 512,
        "feature_cache_dir": "cache",
        "learning_rate": 1e-4,
    }
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    (from_flags,) = HfArgumentParser(DreamTrainingArguments).parse_args_into_dataclasses(flags)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    (from_yaml,) = HfArgumentParser(DreamTrainingArguments).parse_yaml_file(tmp_path / "recipe.yaml")
    for name, value in values.items():
        assert getattr(from_flags, name) == getattr(from_yaml, name) == value
    assert from_flags.to_dict() == from_yaml.to_dict()


def test_arguments_survive_being_written_and_read(tmp_path):
    args = arguments(tmp_path, feature_selection="static", static_layer_index=2, rollout_steps=2)
    assert DreamTrainingArguments(**args.to_dict()).to_dict() == args.to_dict()


def test_every_argument_of_ours_is_documented():
    own = DreamTrainingArguments.__annotations__
    assert own and all(f"{name}" in DreamTrainingArguments.__doc__ for name in own if name != "greater_is_better")
    fields = DreamTrainingArguments.__dataclass_fields__
    assert all(fields[name].metadata["help"] for name in own)
