"""DreamTrainer: what moves, what is minimised, what is measured, what is refused, and what is on disk."""

import errno
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from double import tolerance
from folders import FOLDERS
from processors import make_image
from safetensors.torch import load_file
from trainable import arguments, make_able, make_drafter, make_rows, make_target, make_trainer, processor
from transformers import TrainerCallback

from dream_hf import DreamDrafter, DreamTrainer


@pytest.fixture(scope="module")
def able():
    """A target that gives the rows' answers, and the rows."""
    rows = make_rows(4)
    target = make_target()
    make_able(target, rows)
    return target, rows


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def batch_for(trainer, indices=(0, 1, 2)):
    return trainer.data_collator([trainer.train_dataset[index] for index in indices])


# -- what moves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rollout_steps", [1, 3])
def test_every_drafter_parameter_moves_and_no_target_parameter(tmp_path, rollout_steps):
    target = make_target()
    drafter = make_drafter(target)
    # Behind a closed gate nothing has a gradient in the first step; there are four.
    trainer = make_trainer(tmp_path, target, drafter, rollout_steps=rollout_steps, visual_keep_ratio=0.5)
    before, frozen = weights(drafter), weights(target)
    trainer.train()
    assert [name for name, value in drafter.named_parameters() if torch.equal(before[name], value)] == []
    assert all(torch.equal(frozen[name], value) for name, value in target.named_parameters())
    assert not any(value.requires_grad or value.grad is not None for value in target.parameters())
    assert {id(p) for group in trainer.optimizer.param_groups for p in group["params"]} == {
        id(p) for p in drafter.parameters()
    }
    assert not target.training


def test_overfitting_raises_simulated_tau(tmp_path, able):
    target, rows = able
    drafter = make_drafter(target, tree_depth=4, tree_top_k=2, tree_size=8)
    trainer = make_trainer(
        tmp_path, target, drafter, train_dataset=rows, eval_dataset=rows, max_steps=120, per_device_train_batch_size=4
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_tau"] < 1.7 and after["eval_tau"] > before["eval_tau"] + 1.5
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_accept_depth_1"] > 0.8 and after["eval_top_1_depth_1"] > 0.8
    assert after["eval_top_k_depth_2"] >= after["eval_top_1_depth_2"]

    # Measured on the same prompts, with the same answers: within 5% (the answers come through the processor here).
    steps = []
    for row in rows:
        prompt = processor().apply_chat_template(as_parts(row["messages"][:1]), add_generation_prompt=True)
        inputs = processor()(text=[prompt], images=[row["images"]], return_tensors="pt")
        length = int(batch_for(trainer, [rows.index(row)])["answer_mask"].sum())
        out = target.generate(
            **inputs, assistant_model=drafter, max_new_tokens=length, do_sample=False, return_dict_in_generate=True
        )
        text = processor().batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        assert text.strip() == row["messages"][1]["content"]  # the target's own answer
        steps += [step for step in out.accepted_lengths[0].tolist() if step >= 0]
    assert after["eval_tau"] == pytest.approx(sum(steps) / len(steps), rel=0.05)


def as_parts(messages):
    return [
        {**m, "content": m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"]}]}
        for m in messages
    ]


# -- what is minimised ------------------------------------------------------------------------------------------------


def reference_loss(target, drafter, batch, args, layer):
    """The objective of the paper (section 3.2.1), row by row and position by position, in float64."""
    mask = batch["answer_mask"]
    inputs = {name: value for name, value in batch.items() if name != "answer_mask"}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    embeds = []
    hook = target.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        out = target(**inputs, output_hidden_states=True)
    hook.remove()
    total, count = 0.0, 0
    for row in range(len(mask)):
        length = int(inputs["attention_mask"][row].sum())
        features = out.hidden_states[-1][row, :length]
        drafted = drafter(embeds[0][row : row + 1, :length], features[None, :-1])
        final, mid = drafted.last_hidden_state[0], drafted.mid_hidden_state[0]
        for place in range(length - 1):
            if not mask[row, place + 1]:
                continue
            p = target.lm_head(features[place]).log_softmax(-1)
            q = target.lm_head(final[place]).log_softmax(-1)
            wanted = out.hidden_states[layer][row, place]
            total = total + args.kl_loss_weight * (p.exp() * (p - q)).sum()
            total = total + args.acceptance_loss_weight * (p.exp() - q.exp()).abs().sum() / 2
            total = total + args.final_feature_loss_weight * smooth(final[place] - features[place])
            scaled = [v / (v.square().mean() + 1e-6).sqrt() for v in (mid[place], wanted)]
            total = total + args.mid_feature_loss_weight * smooth(scaled[0] - scaled[1])
            count += 1
    return total / count


def smooth(difference):
    d = difference.abs()
    return torch.where(d < 1, 0.5 * d * d, d - 0.5).mean()


def test_loss_and_gradients_equal_a_float64_reference(tmp_path):
    target, layer = make_target(dtype=torch.float64), 2
    drafter = make_drafter(target)
    for parameter in drafter.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    options = {"feature_selection": "static", "static_layer_index": layer, "acceptance_loss": "tv"}
    weights = {"final_feature_loss_weight": 0.3, "mid_feature_loss_weight": 0.7, "acceptance_loss_weight": 0.4}
    trainer = make_trainer(tmp_path, target, drafter, visual_keep_ratio=1.0, **options, **weights)
    batch = batch_for(trainer)
    expected = reference_loss(target, drafter, batch, trainer.args, layer)
    names, parameters = zip(*drafter.named_parameters(), strict=True)
    expected_gradients = torch.autograd.grad(expected, parameters)
    batch["pixel_values"] = batch["pixel_values"].double()
    loss = trainer.compute_loss(drafter, batch)
    gradients = torch.autograd.grad(loss, parameters)
    cast = torch.float32  # of the head's logits, in training
    torch.testing.assert_close(loss, expected, **tolerance(expected, cast))
    for name, gradient, wanted in zip(names, gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, **tolerance(wanted, cast), msg=name)


def test_accumulated_batches_give_the_step_of_one(tmp_path):
    after = []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        target = make_target()
        drafter = make_drafter(target)
        make_trainer(
            tmp_path,
            target,
            drafter,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            rollout_steps=2,
            optim="sgd",
            learning_rate=0.1,
        ).train()
        after.append(weights(drafter))
    for other in after[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, after[0][name], **tolerance(after[0][name], roundings=8), msg=name)


def test_logs_hold_losses_and_scales(tmp_path):
    trainer = make_trainer(tmp_path, rollout_steps=2, max_steps=2, acceptance_loss="nla")
    trainer.train()
    (first, second, _) = trainer.state.log_history
    losses = {f"loss_{name}{step}" for name in ("kl", "final", "mid", "nla") for step in ("", "_step_1")}
    scales = {"text_embeds", "visual_embeds", "features", "mid_features", "drafted_features", "drafted_mid_features"}
    for logs in (first, second):
        assert losses | {f"rms_{name}" for name in scales} <= set(logs)
    both = {name: first[f"loss_{name}"] + 0.8 * first[f"loss_{name}_step_1"] for name in ("kl", "final", "mid", "nla")}
    # Steps have few positions less each, and all are divided by the first step's number.
    assert first["loss"] == pytest.approx(both["kl"] + both["nla"] + 0.2 * (both["final"] + both["mid"]), rel=0.1)
    embeds = trainer.target.model.get_input_embeddings().weight
    assert first["rms_text_embeds"] == pytest.approx(float(embeds.square().mean().sqrt()), rel=0.3)


def test_noise_is_the_published_codes_and_repeats(tmp_path):
    trainer = make_trainer(tmp_path, feature_noise=0.4)
    for block in trainer.model.layers[1:2]:
        block.cross_attn_attn_gate.data.fill_(1.0)
    batch = batch_for(trainer)
    values = [float(trainer.compute_loss(trainer.model, batch)) for _ in range(2)]
    assert values[0] == values[1]  # the noise of a step is its own, whatever was drawn before
    trainer.state.global_step = 1
    assert float(trainer.compute_loss(trainer.model, batch)) != values[0]
    from dream_hf.training.objective import add_noise

    noise = add_noise(torch.zeros(2, 300, 8), torch.tensor([256, 512]), 0.4, torch.Generator().manual_seed(0))
    assert 0.39 < float(noise[0].abs().max()) <= 0.4 and 0.19 < float(noise[1].abs().max()) <= 0.2
    assert abs(float(noise.mean())) < 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_checkpointing": True, "rollout_steps": 2},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["bf16", "checkpointing", "compile"],
)
def test_options_of_the_trainer_work(tmp_path, options):
    trainer = make_trainer(tmp_path, eval_dataset=make_rows(2), max_steps=2, **options)
    before = weights(trainer.model)
    trainer.train()
    assert all(math.isfinite(logs["loss"]) for logs in trainer.state.log_history if "loss" in logs)
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.named_parameters())
    assert trainer.evaluate()["eval_tau"] >= 1


def test_half_precision_drafter_is_trained_in_float32(tmp_path):
    target = make_target(dtype=torch.bfloat16)
    drafter = make_drafter(target)
    assert drafter.dtype == torch.bfloat16
    trainer = make_trainer(tmp_path, target, drafter, max_steps=2)
    trainer.train()
    assert trainer.model.dtype == torch.float32 and target.dtype == torch.bfloat16


# -- what is refused --------------------------------------------------------------------------------------------------


def no_answers():
    return [{"messages": [{"role": "user", "content": "hello"}]} for _ in range(40)]


def no_template():
    import copy

    other = copy.deepcopy(processor())
    other.chat_template = other.tokenizer.chat_template = None
    return other


REFUSALS = {
    "empty": (lambda: {"train_dataset": []}, ValueError, "`train_dataset` is empty"),
    "empty_eval": (lambda: {"eval_dataset": []}, ValueError, "`eval_dataset` is empty"),
    "nothing": (lambda: {"train_dataset": None}, ValueError, "`train_dataset` is missing"),
    "no_answers": (lambda: {"train_dataset": no_answers()}, ValueError, "(?s)`train_dataset`.*answer"),
    "no_template": (lambda: {"processing_class": no_template()}, ValueError, "chat template"),
    "no_processor": (lambda: {"processing_class": None}, ValueError, "`processing_class` is missing"),
    "all_cut": (lambda: {"max_length": 5}, ValueError, "(?s)max_length.*(5)"),
    "no_drafter": (lambda: {"drafter": torch.nn.Linear(2, 2)}, TypeError, "`model` is a `Linear`"),
    "layer": (lambda: {"feature_selection": "static", "static_layer_index": 9}, ValueError, "9.*4 layers"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_before_any_work(tmp_path, case):
    make, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, **{"drafter": None, **make()})


def test_drafter_for_another_target_is_refused(tmp_path):
    drafter = make_drafter(make_target(num_layers=3))
    with pytest.raises(ValueError, match=r"num_hidden_layers.*3.*4"):
        make_trainer(tmp_path, make_target(), drafter)
    with pytest.raises(TypeError, match="`target` is a `str`"):
        make_trainer(tmp_path, "llava", drafter)


def test_loss_that_is_no_number_names_the_step(tmp_path):
    target = make_target()
    drafter = make_drafter(target)

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                target.get_output_embeddings().weight.data[0, 0] = math.nan

    trainer = make_trainer(tmp_path, target, drafter, callbacks=[Poison()])
    with pytest.raises(ValueError, match=r"loss became nan in step 3.*learning_rate"):
        trainer.train()
    assert all(value.isfinite().all() for value in drafter.parameters())


def test_unusable_rows_are_skipped_up_to_a_number(tmp_path):
    rows = make_rows(4)
    rows[1] = {"messages": [{"role": "user", "content": "hello"}]}
    make_trainer(tmp_path, train_dataset=rows, max_bad_rows=1).train()
    with pytest.raises(ValueError, match="max_bad_rows"):
        make_trainer(tmp_path, train_dataset=rows, max_bad_rows=0).train()


def test_target_in_training_mode_and_endless_warm_up_are_said(tmp_path, caplog):
    target = make_target().train()
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        logging.getLogger("dream_hf").propagate = True
        trainer = make_trainer(tmp_path, target, warmup_steps=4)
        trainer.create_optimizer()
        trainer.create_scheduler(4)
    assert not target.training
    messages = "\n".join(record.message for record in caplog.records)
    assert "training mode" in messages and "`warmup_steps` (4)" in messages


def test_rows_without_pictures_and_of_several_turns(tmp_path):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "A red circle, thanks!"}]
    rows = [{"messages": turns * 2}, *make_rows(1)]
    rows.append({"messages": [*make_rows(1)[0]["messages"], *turns], "images": [make_image(28, 28)]})
    trainer = make_trainer(tmp_path, train_dataset=rows, eval_dataset={"one": rows[:1], "all": rows})
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_one_tau", "eval_all_tau", "eval_all_loss"} <= set(metrics)


# -- what is on disk --------------------------------------------------------------------------------------------------


def test_saved_drafter_loads_and_holds_nothing_of_the_target(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    loaded = DreamDrafter.from_pretrained(tmp_path / "checkpoint-4")
    for name, value in loaded.named_parameters():
        assert torch.equal(value, trainer.model.get_parameter(name)), name
    assert set(load_file(tmp_path / "checkpoint-4" / "model.safetensors")) == set(trainer.model.state_dict())
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_best_checkpoint_by_simulated_tau_and_early_stopping(tmp_path):
    scores = iter([1.5, 3.0, 2.0, 2.5, 2.0, 2.0])

    class Scored(DreamTrainer):
        def _gather_metrics(self, *args):
            return {**super()._gather_metrics(*args), "tau": next(scores)}

    target = make_target()
    drafter = make_drafter(target)
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = Scored(
        model=drafter,
        target=target,
        args=arguments(tmp_path, max_steps=6, early_stopping_patience=2, save_total_limit=2, **steps),
        train_dataset=make_rows(),
        eval_dataset=make_rows(2),
        processing_class=processor(),
    )
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.best_metric == 3.0
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    saved = DreamDrafter.from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(value, drafter.get_parameter(name)) for name, value in saved.named_parameters())


def test_full_disk_leaves_the_last_checkpoint_alone(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    save, calls = DreamTrainer._save_rng_state, []

    def full(self, folder):
        calls.append(folder)
        save(self, folder)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DreamTrainer, "_save_rng_state", full)
    with pytest.raises(OSError, match="no space left for the checkpoint checkpoint-4"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    monkeypatch.undo()
    again = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()


RUN = """
import os, signal, sys
sys.path[:0] = {tests!r}
from trainable import make_trainer
from transformers import TrainerCallback
from dream_hf import DreamTrainer

{kill}
make_trainer({folder!r}, **{options!r}, callbacks=CALLBACKS).train()
"""
KILL_IN_A_STEP = """
class Killer(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
CALLBACKS = [Killer()]
"""
KILL_WHILE_SAVING = """
save = DreamTrainer._save_rng_state
def killing(self, folder):
    if self.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, folder)
DreamTrainer._save_rng_state = killing
CALLBACKS = []
"""


@pytest.mark.parametrize("kill", [KILL_IN_A_STEP, KILL_WHILE_SAVING], ids=["in_a_step", "while_saving"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, kill):
    """Weights, optimizer, schedule, order of the data and noise: bit for bit."""
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "feature_noise": 0.2, "rollout_steps": 2}
    options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "warmup_steps": 3}
    folder = str(tmp_path / "killed")
    script = RUN.format(tests=FOLDERS, kill=kill, folder=folder, options=options)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr[-2000:]
    left = sorted(path.name for path in Path(folder).iterdir())
    assert "checkpoint-4" in left and "checkpoint-6" not in left
    resumed = make_trainer(folder, **options)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    for name, value in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), value), name
    assert resumed.state.log_history[-2]["loss"] == whole.state.log_history[-2]["loss"]
    assert not list(Path(folder).glob("incomplete-*"))


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_train_save_load_merge_and_decode(tmp_path):
    peft = pytest.importorskip("peft")
    target = make_target()
    drafter = make_drafter(target)
    before = weights(drafter)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    trainer = make_trainer(
        tmp_path, target, drafter, peft_config=config, save_strategy="steps", save_steps=4, eval_dataset=make_rows(2)
    )
    trainer.train()
    tau = trainer.evaluate()["eval_tau"]
    trainable = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
    assert trainable and all("lora" in name for name in trainable)
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()
    card = (tmp_path / "checkpoint-4" / "README.md").read_text()
    assert "dream-hf merge FOLDER" in card and "More Information Needed" not in card and "library_name: peft" in card

    fresh = make_drafter(target)
    assert all(torch.equal(value, fresh.get_parameter(name)) for name, value in before.items())
    merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "checkpoint-4").merge_and_unload()
    assert isinstance(merged, DreamDrafter)
    assert not torch.equal(merged.layers[0].self_attn.q_proj.weight, before["layers.0.self_attn.q_proj.weight"])
    merged.save_pretrained(tmp_path / "merged")
    loaded = DreamDrafter.from_pretrained(tmp_path / "merged")
    metrics = make_trainer(tmp_path, target, loaded, eval_dataset=make_rows(2)).evaluate()
    assert metrics["eval_tau"] == pytest.approx(tau)
    inputs = {name: value[:1] for name, value in batch_for(trainer, [0]).items() if name != "answer_mask"}
    plain = target.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(target.generate(**inputs, assistant_model=loaded, max_new_tokens=8, do_sample=False), plain)


def test_distributions_are_compared_over_the_tokens_that_may_be_drafted(tmp_path):
    """Over all of them nothing changes; over some, each side's probabilities are renormalised to these."""
    target, drafter = make_target(dtype=torch.float64), None
    kl_only = {"final_feature_loss_weight": 0.0, "mid_feature_loss_weight": 0.0, "feature_selection": "none"}
    losses = {}
    for size in (None, drafter_vocabulary := target.config.get_text_config().vocab_size, 24):
        for which in ("all", "draft"):
            drafter = make_drafter(target).double()
            if size is not None:
                drafter.set_draft_vocabulary(torch.arange(size))
            trainer = make_trainer(tmp_path, target, drafter, loss_vocabulary=which, **kl_only)
            losses[size, which] = trainer.compute_loss(drafter, batch_for(trainer), return_outputs=True)
    value = losses[None, "all"][0]
    for key in ((None, "draft"), (drafter_vocabulary, "draft"), (24, "all")):
        assert abs(losses[key][0] - value) < 1e-9
    inputs = batch_for(trainer)
    batch = trainer._drafter_batch(inputs)
    log_p, log_q = (
        trainer.logits(features)[:, :24].log_softmax(-1)
        for features in (batch.text.features[batch.predicts], losses[24, "draft"][1].first.hidden)
    )
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert abs(losses[24, "draft"][0] - expected) < 1e-6 < abs(expected - value)
    losses[24, "draft"][0].backward()
    assert all(weight.grad is not None for weight in drafter.parameters() if weight.requires_grad)
