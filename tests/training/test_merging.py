"""Adapters and the drafter they were trained on become an ordinary drafter."""

import json
import shutil

import peft
import pytest
import torch
from command_line import refusal_in_one_line
from double import TIGHT
from safetensors.torch import load_file, save_file
from tiny_pair import tiny_drafter, tiny_processor, tiny_target

from dream_hf import DreamDrafter, EagleDrafter, load_drafter
from dream_hf.cli import main
from dream_hf.training.merging import CONFIG, WEIGHTS, merge_adapters


@pytest.fixture(scope="module")
def target():
    return tiny_target()


@pytest.fixture
def folders(target, tmp_path):
    """A base and adapters that change it, as the trainer leaves them."""
    tiny_drafter(target, tree_depth=3, tree_size=8).save_pretrained(tmp_path / "base")
    base = DreamDrafter.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter/recipe.yaml").write_text("license: mit\nuse_lora: true\n")
    return tmp_path


def test_the_merged_drafter_is_the_adapted_one(folders, target, capsys):
    adapted = peft.PeftModel.from_pretrained(DreamDrafter.from_pretrained(folders / "base"), folders / "adapter")
    assert main(["merge", str(folders / "adapter"), str(folders / "merged")]) == 0  # into what the adapters name
    assert str(folders / "merged") in capsys.readouterr().out
    merged = DreamDrafter.from_pretrained(folders / "merged")
    weights = dict(adapted.merge_and_unload().named_parameters())
    base = dict(DreamDrafter.from_pretrained(folders / "base").named_parameters())
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6)
    assert any(not torch.equal(weight, base[name]) for name, weight in merged.named_parameters())
    assert (merged.config.tree_depth, merged.config.target) == (3, adapted.config.target)
    card = (folders / "merged/README.md").read_text()
    assert "# merged" in card and "license: mit" in card and "use_lora: true" in card
    ids = tiny_processor().tokenizer("a red circle", return_tensors="pt")
    expected = target.generate(**ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(target.generate(**ids, assistant_model=merged, max_new_tokens=8, do_sample=False), expected)


def test_sums_are_made_in_float32_and_saved_in_the_dtype_of_the_base(folders):
    low = DreamDrafter.from_pretrained(folders / "base").bfloat16()
    low.save_pretrained(folders / "low")
    merge_adapters(folders / "adapter", folders / "merged", folders / "low")
    merged = load_file(folders / "merged/model.safetensors")
    adapted = peft.PeftModel.from_pretrained(low.float(), folders / "adapter").merge_and_unload()
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight, adapted.get_parameter(name).bfloat16(), **TIGHT)


def test_drafters_of_another_kind_are_merged(target, tmp_path, capsys):
    base = EagleDrafter.for_target(target)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(EagleDrafter.from_pretrained(tmp_path / "base"), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = load_drafter(tmp_path / "merged", target)
    weights = dict(adapted.merge_and_unload().named_parameters())
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6)
    assert any(not torch.equal(weight, base.get_parameter(name)) for name, weight in merged.named_parameters())
    capsys.readouterr()
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    message = refusal_in_one_line(capsys, "merge", str(tmp_path / "adapter"), str(tmp_path / "again"))
    assert "`base`" in message and "'llama'" in message


def test_what_cannot_be_merged_is_refused(folders, target, capsys):
    merge = ["merge", str(folders / "adapter"), str(folders / "merged")]
    assert "holds something already" in refusal_in_one_line(capsys, *merge[:2], str(folders / "base"))
    assert f"no {CONFIG}" in refusal_in_one_line(capsys, "merge", str(folders / "base"), merge[2])
    shutil.copytree(folders / "adapter", folders / "pickled")
    (folders / "pickled" / WEIGHTS).rename(folders / "pickled/adapter_model.bin")
    assert f"no {WEIGHTS}" in refusal_in_one_line(capsys, "merge", str(folders / "pickled"), merge[2])
    config = json.loads((folders / "adapter" / CONFIG).read_text())
    (folders / "adapter" / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "give it as `base`" in refusal_in_one_line(capsys, *merge)
    tiny_drafter(target, intermediate_size=24).save_pretrained(folders / "other")
    assert "do not fit `base`" in refusal_in_one_line(
        capsys, *merge, "--base", str(folders / "other"), is_last_line=True
    )
    weights = load_file(folders / "adapter" / WEIGHTS)
    save_file(
        {name.replace("layers.0", "layers.7"): weight for name, weight in weights.items()},
        folders / "adapter" / WEIGHTS,
    )
    message = refusal_in_one_line(capsys, *merge, "--base", str(folders / "base"), is_last_line=True)
    assert "are not of `base`" in message and not (folders / "merged").exists()
