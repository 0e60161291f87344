"""Training EAGLE-3: what a step says is what decoding would draft, replayed steps are those of `generate()`, and it learns."""

from __future__ import annotations

import json

import pytest
import torch
from answered import answer
from families import family
from lossless import assert_same_tokens, generate
from trainable import arguments, make_rows, make_target, processor

import dream_hf
from dream_hf import DreamTrainer, EagleConfig, EagleDrafter
from dream_hf.demo import make_rows as make_demo_rows
from dream_hf.drafters.levels import TargetHead
from dream_hf.targets.target import Target
from dream_hf.training.acceptance_metrics import AcceptanceCounts, count_chain_hits, replay_decoding
from dream_hf.training.run import ModelDataArguments, run_training
from dream_hf.training.target_features import FeatureExtractor, LayerSelection
from dream_hf.training.ways import PAIRS

FAMILIES = ["llama", "llava_clip_llama", "qwen2_5_vl"]
LENGTHS = [14, 6, 20]
WAY = PAIRS


def untrained_eagle(target, **config) -> EagleDrafter:
    torch.manual_seed(1)
    drafter = EagleDrafter.for_target(target, initializer_range=0.2, **config)
    for weight in (drafter.norm.weight, drafter.layers[0].hidden_norm.weight):
        weight.data.uniform_(0.5, 2.0)
    return drafter


def batch_of(name, drafter, target):
    text = answer(family(name), target, LENGTHS)
    extractor = FeatureExtractor(
        Target(target), LayerSelection("none"), 1.0, layers=WAY.layers(drafter), has_placeholders=True
    )
    return text, extractor.drafter_batch(text.inputs, text.answer_mask), extractor.target


def head_of(drafter, view):
    return TargetHead(view.embed, WAY.logits(drafter, view.logits), drafter.draft_token_ids)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("config", [{}, {"is_feedback_normed": True, "has_head": False}, {"has_fc_norm": True}])
def test_steps_say_what_decoding_drafts(name, config):
    target = family(name).make_target()
    drafter = untrained_eagle(target, **config)
    text, batch, view = batch_of(name, drafter, target)
    logits = WAY.logits(drafter, view.logits)
    with torch.no_grad():
        steps = list(WAY.roll_out(drafter, batch, batch.text.features, 3))
    assert [len(step.predictions) for step in steps] == [sum(LENGTHS), sum(LENGTHS) - 3, sum(LENGTHS) - 6]
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    for row, answered in enumerate(text.answers):
        prompt = text.prompts[row]
        for place in (0, 2):  # tokens of the answer, below which a chain is drafted
            tokens = answered.tolist()
            ids = torch.cat([prompt["input_ids"], answered[None, :place]], dim=1)
            inputs = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for kind in (key for key in prompt if key.endswith("type_ids")):
                inputs[kind] = torch.nn.functional.pad(prompt[kind], (0, place))
            path = tokens[place + 1 : place + 3]
            said = dream_hf.draft_log_probs(target, drafter, inputs, tokens[place], path)
            for depth, step in enumerate(steps):
                # a prediction's number counts the tokens that are foretold: the answer's first one is number 0
                found = (step.predictions == starts[row] + place + 1 + depth).nonzero().flatten()
                ours = logits(step.hidden[found[0]]).log_softmax(-1)
                torch.testing.assert_close(ours.double(), said[depth].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_replayed_steps_are_those_of_generate(name):
    target = family(name).make_target()
    drafter = untrained_eagle(target, tree_depth=4, tree_top_k=8, tree_size=48)
    drafter.set_draft_vocabulary(range(5, 90))
    text, batch, view = batch_of(name, drafter, target)
    counts = AcceptanceCounts(4)
    gains = replay_decoding(drafter, head_of(drafter, view), batch, counts)
    for row, length in enumerate(LENGTHS):
        out = generate(target, text.prompts[row], max_new_tokens=length, assistant_model=drafter)
        assert gains[row] == out.accepted_lengths[0].tolist()
    assert len({gain for row in gains for gain in row}) > 1
    count_chain_hits(drafter, head_of(drafter, view), batch, counts)
    assert counts.asked == [sum(LENGTHS) - 3 * (1 + depth) for depth in range(4)]


def test_it_learns_and_is_saved_and_goes_on(tmp_path):
    target = make_target()
    drafter = EagleDrafter.for_target(target)
    rows = make_rows(8)
    options = {"max_steps": 60, "draft_vocab_size": 64, "rollout_steps": 3, "per_device_train_batch_size": 4}
    trainer = DreamTrainer(
        model=drafter, target=target, args=arguments(tmp_path, **options), train_dataset=rows, eval_dataset=rows,
        processing_class=processor(),
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert (
        after["eval_loss"] < 0.5 * before["eval_loss"] and after["eval_top_1_depth_1"] > before["eval_top_1_depth_1"]
    )
    logged = [entry for entry in trainer.state.log_history if "loss_kl_step_2" in entry]
    assert logged and "loss_mid" not in logged[0] and "loss_final" not in logged[0]
    trainer.save_model()
    saved = dream_hf.load_drafter(tmp_path, target)
    assert saved.lm_head.out_features == 64 and saved.config.draft_vocab_size == 64
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(drafter.parameters(), saved.parameters(), strict=True)
    )
    inputs = processor()(text="<image> What is in the image?", images=rows[0]["images"], return_tensors="pt")
    expected = generate(target, inputs, max_new_tokens=20)
    assert_same_tokens(expected, generate(target, inputs, max_new_tokens=20, assistant_model=saved))


def test_features_in_the_cache_train_alike(tmp_path):
    target, losses = make_target(), []
    for cache in (None, str(tmp_path / "cache")):
        torch.manual_seed(0)
        trainer = DreamTrainer(
            model=EagleDrafter.for_target(target), target=target, train_dataset=make_rows(4), processing_class=processor(),
            args=arguments(tmp_path / "run", feature_cache_dir=cache, max_steps=2, rollout_steps=2),
        )  # fmt: skip
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_from_the_command_line(tmp_path):
    given = ModelDataArguments(
        target="demo",
        train_dataset=str(rows_of_the_demo(tmp_path)),
        drafter_type="eagle3",
        drafter_config={"tree_depth": 3},
    )
    args = arguments(tmp_path / "out", max_steps=2, draft_vocab_size=64, per_device_train_batch_size=1)
    run_training(given, args)
    config = EagleConfig.from_pretrained(tmp_path / "out")
    assert config.tree_depth == 3 and config.draft_vocab_size == 64 and len(config.feature_layers) == 3
    again = ModelDataArguments(target="demo", train_dataset=given.train_dataset, drafter=str(tmp_path / "out"))
    run_training(again, arguments(tmp_path / "more", max_steps=1, per_device_train_batch_size=1))
    assert EagleConfig.from_pretrained(tmp_path / "more").draft_vocab_size == 64


def rows_of_the_demo(folder):
    rows = []
    for index, row in enumerate(make_demo_rows("scene", 2, seed=5)):
        row["images"][0].save(folder / f"{index}.png")
        rows.append(json.dumps({"messages": row["messages"], "images": [f"{index}.png"]}))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder / "rows.jsonl"


def test_what_is_not_trained_is_refused(tmp_path):
    target = make_target()
    fields = {"target": target, "train_dataset": make_rows(2), "processing_class": processor()}
    for config, reason in (({"image_rows": "merged"}, "image_rows"), ({"mrope_section": [2, 1, 1]}, "mrope_section")):
        with pytest.raises(ValueError, match=reason):
            DreamTrainer(model=EagleDrafter.for_target(target, **config), args=arguments(tmp_path), **fields)
    with pytest.raises(ValueError, match="visual_keep_ratio"):
        args = arguments(tmp_path, visual_keep_ratio=0.5)
        DreamTrainer(model=EagleDrafter.for_target(target), args=args, **fields)
    with pytest.raises(ValueError, match="drafter_type"):
        ModelDataArguments(target="demo", train_dataset="x", drafter_type="eagle9")
    with pytest.raises(ValueError, match=r"is `tree_depth` meant\? See `help\(EagleConfig\)`"):
        ModelDataArguments(target="demo", train_dataset="x", drafter_type="eagle3", drafter_config={"tree_dept": 3})
    drafter = EagleDrafter.for_target(target)
    drafter.set_draft_vocabulary([5, 6, 7])
    with pytest.raises(ValueError, match="chosen once"):
        drafter.set_draft_vocabulary([5, 6])
