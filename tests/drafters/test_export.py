"""EAGLE-3 drafters written as other programs read them, and read back."""

from __future__ import annotations

import json

import pytest
import torch
from eagle_reference import Layout
from families import family
from safetensors.torch import load_file

import dream_hf
from dream_hf import EagleDrafter, export_drafter
from dream_hf.cli.main import main
from dream_hf.demo import load_pair
from dream_hf.targets.target import Target

FORMS = ["speculators", "eagle3"]
PATH = [7, 50, 33]
CONFIGS = {
    "plain": {},
    "one head for all": {"has_head": False},
    "norms": {"has_fc_norm": True, "norm_before_residual": True},
    "norm before fc": {
        "norm_before_fc": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    },
}


def make(target, **config) -> EagleDrafter:
    torch.manual_seed(3)
    drafter = EagleDrafter.for_target(
        target, initializer_range=0.2, feature_layers=config.pop("feature_layers", [1, 2, 3]), **config
    )
    for name, weight in drafter.named_parameters():
        if "norm" in name or "bias" in name:
            weight.data.uniform_(0.5, 1.5)
    return drafter


@pytest.mark.parametrize("is_reduced", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_read_back_is_the_same_drafter(form, config, is_reduced, tmp_path):
    if form == "eagle3" and config == "norm before fc":
        config = "plain"  # biases are speculators' alone
    target = family("llama").make_target()
    drafter = make(target, **CONFIGS[config])
    if is_reduced:
        drafter.set_draft_vocabulary(range(3, 80, 2))
    again = dream_hf.load_drafter(export_drafter(drafter, tmp_path / "out", form, target), target)
    assert again.config.draft_vocab_size == (39 if is_reduced else None)
    inputs = family("llama").make_inputs(target)
    said, expected = (dream_hf.draft_log_probs(target, each, inputs, 5, PATH) for each in (again, drafter))
    assert torch.equal(said.isfinite(), expected.isfinite())
    torch.testing.assert_close(said[said.isfinite()], expected[expected.isfinite()], rtol=0, atol=1e-5)


def test_the_form_of_speculators(tmp_path):
    target = family("llama").make_target()
    drafter = make(target, has_qk_norm=True, is_feedback_normed=True, tree_depth=5)
    drafter.set_draft_vocabulary([4, 9, 11, 30])
    folder = export_drafter(drafter, tmp_path, "speculators", target)
    fields, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    assert (
        fields["speculators_model_type"] == "eagle3" and fields["norm_output"] and not fields["norm_before_residual"]
    )
    assert fields["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3] and fields["draft_vocab_size"] == 4
    assert fields["transformer_layer_config"]["model_type"] == "qwen3"
    assert fields["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
    assert fields["speculators_config"]["verifier"]["architectures"] == ["LlamaForCausalLM"]
    assert tensors["d2t"].tolist() == [4, 8, 9, 27] and tensors["t2d"].nonzero().flatten().tolist() == [4, 9, 11, 30]
    assert torch.equal(tensors["embed_tokens.weight"], Target(target).embedding.weight)
    assert tensors["lm_head.weight"].shape == (4, 32) and "layers.0.self_attn.q_norm.weight" in tensors


def test_a_published_drafter_leaves_as_it_came(tmp_path):
    layout = Layout("x", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}})
    target, folder = family("llama").make_target(), layout.publish(tmp_path / "published")
    drafter = dream_hf.load_drafter(folder, target)
    out = export_drafter(drafter, tmp_path / "out", "eagle3", target)
    ours, theirs = (load_file(each / "model.safetensors") for each in (out, folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in ours)


@pytest.mark.parametrize(
    ("form", "config", "reason"),
    [
        ("speculators", {"has_final_norm": False}, "has_final_norm"),
        ("speculators", {"feature_layers": [1, 2, 2]}, "feature_layers"),
        ("speculators", {"image_rows": "merged"}, "image_rows"),
        ("eagle3", {"is_feedback_normed": True}, "is_feedback_normed"),
        ("eagle3", {"num_hidden_layers": 2}, "num_hidden_layers"),
        ("gguf", {}, "must be 'speculators' or 'eagle3'"),
    ],
)
def test_what_a_form_has_no_word_for_is_refused(form, config, reason, tmp_path):
    target = family("llama").make_target()
    with pytest.raises(ValueError, match=reason):
        export_drafter(make(target, **config), tmp_path / "out", form, target)
    assert not (tmp_path / "out").exists()


def test_other_drafters_are_refused_and_the_command_says_where_it_wrote(tmp_path, capsys):
    target = family("llama").make_target()
    with pytest.raises(TypeError, match="EAGLE-3 drafters can be exported"):
        export_drafter(dream_hf.DreamDrafter.for_target(target), tmp_path, "speculators", target)
    demo, *_ = load_pair()
    EagleDrafter.for_target(demo).save_pretrained(tmp_path / "drafter")
    assert (
        main(["export", str(tmp_path / "drafter"), str(tmp_path / "out"), "--target", "demo", "--format", "eagle3"])
        == 0
    )
    assert capsys.readouterr().out.strip().endswith("out")
    assert isinstance(dream_hf.load_drafter(tmp_path / "out", demo), EagleDrafter)
