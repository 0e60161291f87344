"""What training is given in other forms: several evaluation sets, devices without float64, adapters as target, wrong names."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainable import make_drafter, make_rows, make_target, make_trainer, processor

from dream_hf import DreamConfig, DreamDrafter
from dream_hf.load_models import load_models
from dream_hf.training.run import ModelDataArguments

STEPS = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}


def sets():
    rows = make_rows(3)
    return {"near": rows[:2], "far": rows[2:]}


# -- several evaluation sets ------------------------------------------------------------------------------------------


def test_several_evaluation_sets_without_a_best_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=sets(), **STEPS)
    trainer.train()
    assert {"eval_near_tau", "eval_far_tau"} <= {name for entry in trainer.state.log_history for name in entry}
    assert trainer.state.best_metric is None


@pytest.mark.parametrize("metric", ["eval_far_tau", "far_loss"])
def test_best_checkpoint_by_one_of_several_sets(tmp_path, metric):
    options = {"metric_for_best_model": metric, "early_stopping_patience": 5}
    trainer = make_trainer(tmp_path, eval_dataset=sets(), **STEPS, **options)
    trainer.train()
    metric = metric if metric.startswith("eval_") else f"eval_{metric}"
    found = [entry[metric] for entry in trainer.state.log_history if metric in entry]
    assert trainer.state.best_metric == (min(found) if metric.endswith("loss") else max(found))


@pytest.mark.parametrize(
    "options",
    [
        {"load_best_model_at_end": True},
        {"early_stopping_patience": 1},
        {"save_strategy": "best"},
        {"metric_for_best_model": "eval_loss"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_best_checkpoint_by_no_set_is_refused_before_any_work(tmp_path, options):
    with pytest.raises(ValueError, match=r"metric_for_best_model.*\['near', 'far'\].*'eval_near_tau'"):
        make_trainer(tmp_path, eval_dataset=sets(), **STEPS | options)


# -- devices without float64 ------------------------------------------------------------------------------------------


class NoFloat64(TorchDispatchMode):
    """A device that refuses float64, as MPS does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        found = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor) and x.dtype == torch.float64]
        if found:
            raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype ({function})")
        return out


def test_training_and_evaluation_need_no_float64(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=make_rows(2), max_steps=2, rollout_steps=2, feature_noise=0.1)
    expected = trainer.evaluate()
    with NoFloat64():
        found = trainer.evaluate()
        trainer.train()
    timed = ("runtime", "per_second")
    assert {k: v for k, v in found.items() if not k.endswith(timed)} == {
        k: v for k, v in expected.items() if not k.endswith(timed)
    }


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "near"), [("tree_detph", "tree_depth"), ("keep_ratio", "visual_keep_ratio")])
def test_unknown_names_of_a_new_drafter_are_refused(wrong, near):
    target = make_target()
    message = f"`{wrong}` is no argument of `DreamConfig`; is `{near}` meant"
    for config in ({wrong: 3}, json.dumps({"tree_size": 8, wrong: 3})):
        with pytest.raises(ValueError, match=message):
            ModelDataArguments(target="t", train_dataset="d", drafter_config=config)
    with pytest.raises(ValueError, match=message):
        DreamDrafter.for_target(target, **{wrong: 3})
    assert ModelDataArguments(target="t", train_dataset="d", drafter_config='{"tree_size": 8}').drafter_config
    with pytest.raises(ValueError, match="must be a mapping"):
        ModelDataArguments(target="t", train_dataset="d", drafter_config="[1]")
    assert DreamConfig(a_later_version_s=3).a_later_version_s == 3  # files may know more than this version


# -- adapters as target -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A base with its processor, and what trl saves of adapters trained on it: no `config.json`."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapters")
    base = make_target()
    base.save_pretrained(folder / "base")
    processor().save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    modules = r".*language_model.*\.(q_proj|down_proj)"
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False))
    model.save_pretrained(folder / "adapter")
    return folder, model.eval()


def test_adapters_are_merged_into_the_model_they_name(adapters):
    folder, expected = adapters
    found = load_models(str(folder / "adapter"), dtype="float32", device="cpu")
    inputs = found.processor(text="hello world", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(found.target(**inputs).logits, expected(**inputs).logits, atol=1e-4, rtol=1e-4)
        base = load_models(str(folder / "base"), dtype="float32", device="cpu").target
        assert (base(**inputs).logits - expected(**inputs).logits).abs().max() > 0.1
    assert not any("lora" in name for name, _ in found.target.named_parameters())
    assert make_drafter(found.target).config.target["name"] == str(folder / "adapter")
    plain = found.target.generate(**inputs, max_new_tokens=8, do_sample=False)
    drafted = found.target.generate(
        **inputs, max_new_tokens=8, do_sample=False, assistant_model=make_drafter(found.target)
    )
    assert torch.equal(plain, drafted)


def test_processor_beside_adapters_is_taken(adapters, tmp_path):
    folder, _ = adapters
    (tmp_path / "adapter").mkdir()
    for file in (folder / "adapter").iterdir():
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    base = load_models(str(folder / "base"), device="cpu").processor
    base.chat_template = "{{ 'mine' }}"
    base.save_pretrained(tmp_path / "adapter")
    assert load_models(str(tmp_path / "adapter"), device="cpu").processor.chat_template == "{{ 'mine' }}"
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")


def test_adapters_that_cannot_be_merged_are_refused(adapters, tmp_path):
    peft = pytest.importorskip("peft")
    folder, _ = adapters
    prompts = peft.PromptTuningConfig(num_virtual_tokens=4, base_model_name_or_path=str(folder / "base"))
    prompts.save_pretrained(tmp_path / "prompts")
    peft.LoraConfig().save_pretrained(tmp_path / "nameless")
    for name in ("prompts", "nameless"):
        with pytest.raises(ValueError, match=r"`target` .*cannot be merged into a model"):
            load_models(str(tmp_path / name), device="cpu")
