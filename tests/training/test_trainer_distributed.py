"""Two processes on gloo: the gradients of one process on the same global batch, FSDP2, evaluation in shares."""

import json
import os
import subprocess
import sys

import pytest
import torch
from double import tolerance
from folders import FOLDERS
from safetensors.torch import load_file
from trainable import make_drafter, make_rows, make_target, make_trainer

from dream_hf import DreamDrafter

# Answers of very different lengths: a mean of the processes' means would be far off.
UNEVEN = [
    *make_rows(1, answer="Yes."),
    *make_rows(1, answer="A {color} circle is left of a blue square; " * 3),
    *make_rows(1, answer="No, a circle."),
    *make_rows(1, answer="Three shapes are in the picture."),
    *make_rows(1, answer="{color}"),
]
SHARED = {
    "train_sampling_strategy": "sequential",
    "rollout_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_steps": 2,
}

RUN = """
import json, os, sys
import torch
sys.path[:0] = {tests!r}
torch.set_num_threads(1)
from trainable import make_drafter, make_target, make_trainer
from test_trainer_distributed import UNEVEN
from test_streamed_rows import Stream

target = make_target()
drafter = make_drafter(target)
with torch.no_grad():
    for layer in drafter.layers[1:2]:
        layer.cross_attn_attn_gate.fill_(0.5)
        layer.cross_attn_mlp_gate.fill_(0.5)
trainer = make_trainer({folder!r}, target, drafter, train_dataset={rows}, eval_dataset=UNEVEN, **{options!r})
assert trainer.accelerator.num_processes == {processes}
frozen = [value.clone() for value in target.parameters()]
trainer.train(resume_from_checkpoint=os.environ.get("RESUME"))
assert all(torch.equal(a, b) for a, b in zip(frozen, target.parameters()))
metrics = trainer.evaluate()
trainer.save_model(os.path.join({folder!r}, "final"))
if trainer.is_world_process_zero():
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    with open(os.path.join({folder!r}, "metrics.json"), "w") as file:
        json.dump({{"metrics": metrics, "logs": logs}}, file)
trainer.accelerator.wait_for_everyone()
sys.stdout.flush()
os._exit(0)  # gloo's threads now and then abort an interpreter that is shutting down, when all work is done
"""


def run(folder, processes, environment=None, rows="UNEVEN[:4]", **options):
    """Train in `processes` processes; returns the weights, the metrics and the logged losses."""
    folder.mkdir(exist_ok=True)
    script = folder / "run.py"
    values = {
        "tests": FOLDERS,
        "folder": str(folder),
        "options": SHARED | options,
        "processes": processes,
        "rows": rows,
    }
    script.write_text(RUN.format(**values))
    command = [sys.executable, str(script)]
    if processes > 1:  # what `accelerate launch` runs; its own command offers gloo only with MPI
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, "-m", *launcher, str(script)]
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=variables)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found = json.loads((folder / "metrics.json").read_text())
    return load_file(folder / "final" / "model.safetensors"), found["metrics"], found["logs"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), 1, per_device_train_batch_size=4)


def assert_same(found, expected):
    for name, weight in expected[0].items():
        torch.testing.assert_close(found[0][name], weight, **tolerance(weight, roundings=8), msg=name)
    assert found[2] == pytest.approx(expected[2], rel=1e-4)
    for name in ("eval_tau", "eval_loss", "eval_accept_depth_1", "eval_top_1_depth_1", "eval_top_k_depth_2"):
        assert found[1].get(name) == pytest.approx(expected[1].get(name), rel=1e-4), name


def test_two_processes_take_the_steps_of_one(tmp_path, alone):
    """After two steps of plain gradient descent with a rate of 0.1, weights agree as far as gradients do."""
    start = make_drafter(make_target()).state_dict()
    moved = max(float((weight - start[name]).abs().max()) for name, weight in alone[0].items() if "gate" not in name)
    assert moved > 1e-2  # so that an agreement of 1e-6 says something
    assert_same(run(tmp_path / "two", 2, per_device_train_batch_size=2), alone)


def test_two_processes_on_a_stream_take_the_steps_of_one(tmp_path, alone):
    rows = "Stream(UNEVEN[:4])"
    assert_same(run(tmp_path / "stream", 2, rows=rows, per_device_train_batch_size=2), alone)


def test_two_processes_with_accumulation_take_the_steps_of_one(tmp_path, alone):
    assert_same(run(tmp_path / "four", 2, per_device_train_batch_size=1, gradient_accumulation_steps=2), alone)


# The environment that `accelerate launch` makes of `examples/accelerate/fsdp2.yaml`.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def test_fsdp2_trains_saves_resumes_and_loads_in_one_process(tmp_path, alone):
    found = run(tmp_path / "fsdp", 2, FSDP, per_device_train_batch_size=2, save_strategy="steps", save_steps=1)
    assert_same(found, alone)
    loaded = DreamDrafter.from_pretrained(tmp_path / "fsdp" / "checkpoint-2")
    for name, weight in found[0].items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    trainer = make_trainer(tmp_path, make_target(), loaded, eval_dataset=UNEVEN, rollout_steps=2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-4)
    rest = {**FSDP, "RESUME": str(tmp_path / "fsdp" / "checkpoint-1")}
    resumed = run(tmp_path / "resumed", 2, rest, per_device_train_batch_size=2)
    for name, weight in found[0].items():
        assert torch.equal(resumed[0][name], weight), name
