"""The wiring of every golden EAGLE-3 case is found again when its config does not say it, if the target says what it drafts."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from golden import MISSING, Case, cases
from test_eagle_golden import load_target
from test_probe import LEVELS, ROUNDS, foretold_by

import dream_hf

CASES = cases("eagle3")
STRIPPED = [
    "norm_before_residual", "norm_output", "eagle_aux_hidden_state_layer_ids", "aux_hidden_states_layer_ids", "eagle_config",
    "rope_scaling",
]  # fmt: skip
KEEPS_DOUBLE = False  # the cases are float32

if not CASES:
    pytest.skip(MISSING, allow_module_level=True)


def has(config: dict, name: str) -> bool:
    return name in config or name in config.get("transformer_layer_config", {})


def config_of(case: Case) -> dict:
    return json.loads((case.checkpoint / "config.json").read_text())


def inputs_of(case: Case) -> dict[str, torch.Tensor]:
    """Its prompt, with its picture if it has one."""
    length = case.expected["prompt_length"]
    ids = case.io["input_ids"][None, :length]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("pixel_values", "image_grid_thw"):
        if f"extra.{name}" in case.io:
            inputs[name] = case.io[f"extra.{name}"]
    if "extra.mm_token_type_ids" in case.io:
        inputs["mm_token_type_ids"] = case.io["extra.mm_token_type_ids"].flatten()[None, :length]
    return inputs


PAIRS = [(case, name) for case in CASES for name in STRIPPED if has(config_of(case), name)]


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=lambda value: repr(value).strip("'"))
def test_what_a_config_no_longer_says_is_found(case, name, tmp_path):
    target, inputs = copy.deepcopy(load_target(case.target_name)), inputs_of(case)
    right = dream_hf.load_drafter(case.checkpoint, target)
    foretold_by(right, target, inputs)
    folder = tmp_path / "stripped"
    shutil.copytree(case.checkpoint, folder)
    config = config_of(case)
    for holder in (config, config.get("transformer_layer_config", {})):
        holder.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    found = dream_hf.probe_drafter(folder, target, [inputs], num_tokens=LEVELS * ROUNDS).drafter.config
    for field in (
        "feature_layers", "norm_before_residual", "has_final_norm", "is_feedback_normed", "mrope_section",
        "is_mrope_interleaved", "image_rows",
    ):  # fmt: skip
        assert getattr(found, field) == getattr(right.config, field), field
