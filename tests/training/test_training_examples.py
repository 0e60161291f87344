"""The example, the recipes and the configurations for several processes are read by what they are written for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from trainable import make_rows, make_target, processor

from dream_hf.cli.train import parse

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted((EXAMPLES / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_is_read(path):
    given, args = parse([str(path), "--bf16", "false", "--use_cpu", "true", "--report_to", "none"])
    assert given.eval_dataset and args.metric_for_best_model == "eval_tau" and args.load_best_model_at_end
    assert args.save_steps == args.eval_steps and args.learning_rate == (
        5e-5 if given.drafter_type == "eagle3" else 3e-5
    )


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 4 and config.mixed_precision == "bf16"
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
    assert config.distributed_type.value == expected


def test_recipe_without_data_is_read():
    given, args = parse([str(EXAMPLES / "smollm2" / "train.yaml")])
    assert given.drafter_config["pause_below"] > 1 and args.draft_vocab_size and args.loss_vocabulary == "draft"


def test_weights_that_are_not_installed_are_named():
    script = EXAMPLES / "smollm2" / "prepare.py"
    code = (
        f"import runpy; find = runpy.run_path({str(script)!r})['find_weights']\n"
        "find.__globals__['PACKAGE'] = 'no-such-package'; find()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("The package no-such-package is not installed: pip install")


def test_example_trains_a_drafter(tmp_path):
    script = EXAMPLES / "train.py"
    assert len(script.read_text().splitlines()) <= 120
    make_target().save_pretrained(tmp_path / "target")
    processor().save_pretrained(tmp_path / "target")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for index, row in enumerate(make_rows(3)):
            row["images"][0].save(tmp_path / f"{index}.png")
            file.write(json.dumps({**row, "images": [f"{index}.png"]}) + "\n")
    command = [sys.executable, str(script), "--target", "target", "--train", "rows.jsonl", "--eval", "rows.jsonl"]
    done = subprocess.run([*command, "--epochs", "1"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "simulated tau" in done.stdout
    assert (tmp_path / "dream-drafter" / "model.safetensors").is_file()
