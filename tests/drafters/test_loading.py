"""Loading is strict: whole safetensors files with exactly the config's tensors, and nothing a file says is believed."""

import json
import pickle
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from dream_hf import DreamConfig, DreamDrafter
from dream_hf.drafters.checkpoint_files import DamagedFileError

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    DreamDrafter(DreamConfig(**SHAPE)).save_pretrained(tmp_path / "drafter")
    return tmp_path / "drafter"


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


KEYS = {
    "missing": (lambda w: w.pop("layers.1.cross_attn_mlp_gate"), "missing: layers.1.cross_attn_mlp_gate"),
    "unexpected": (lambda w: w.update(extra=torch.ones(2)), "unexpected: extra"),
    "mismatched": (
        lambda w: w.update({"norm.weight": torch.ones(5)}),
        r"norm.weight is \(5,\) .* \(32,\) by the config",
    ),
    "integers": (lambda w: w.update({"norm.weight": torch.ones(32, dtype=torch.int64)}), r"norm.weight \(I64\)"),
}


@pytest.mark.parametrize("auto_class", [DreamDrafter, AutoModel])
@pytest.mark.parametrize("change, message", KEYS.values(), ids=KEYS)
def test_keys_are_strict(folder, change, message, auto_class):
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        auto_class.from_pretrained(folder)


def test_keys_are_strict_without_a_folder():
    drafter = DreamDrafter(DreamConfig(**SHAPE))
    weights = drafter.state_dict()
    loaded = DreamDrafter.from_pretrained(None, config=drafter.config, state_dict=weights)
    assert torch.equal(loaded.norm.weight, drafter.norm.weight)
    with pytest.raises(ValueError, match=r"missing: norm.weight"):
        DreamDrafter.from_pretrained(
            None, config=drafter.config, state_dict={k: v for k, v in weights.items() if k != "norm.weight"}
        )


@pytest.mark.parametrize(
    "arguments", [{"use_safetensors": False}, {"ignore_mismatched_sizes": True}, {"gguf_file": "a"}]
)
def test_refuses_arguments_that_would_loosen_it(folder, arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        DreamDrafter.from_pretrained(folder, **arguments)
    with pytest.raises(ValueError, match="`safe_serialization`"):
        DreamDrafter.from_pretrained(folder).save_pretrained(folder, safe_serialization=False)


class Bomb:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('executed').touch()",)


@pytest.mark.parametrize("auto_class", [DreamDrafter, AutoModel])
def test_pickles_are_never_read(folder, monkeypatch, tmp_path, auto_class):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"safetensors only.*dream-hf convert"):
        auto_class.from_pretrained(folder)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder)})
    )
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"adapter.*peft.PeftModel.from_pretrained"):
        auto_class.from_pretrained(folder)
    assert not (tmp_path / "executed").exists()


ABSURD = {
    "too many parameters": {"hidden_size": 1 << 20, "intermediate_size": 1 << 24},
    "more than the file holds": {"hidden_size": 1 << 15, "intermediate_size": 1 << 16},
    "a wide head": {"head_dim": 1 << 24},
    "many blocks": {"block_types": ["initial"] * 1000, "hidden_size": 2, "intermediate_size": 1},
    "negative": {"intermediate_size": -1},
    "a string": {"hidden_size": "32"},
    "an unknown activation": {"hidden_act": "boom"},
    "an unknown rotary embedding": {"rope_parameters": {"rope_type": "boom", "rope_theta": 1.0}},
    "a property": {"num_parameters": 1},
}


@pytest.mark.parametrize("fields", ABSURD.values(), ids=ABSURD)
def test_absurd_configs_are_refused_before_memory_is_taken(folder, fields):
    change_config(folder, **fields)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError):
        DreamDrafter.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


@pytest.mark.parametrize("field", ["transformers_weights", "quantization_config", "auto_map", "attn_implementation"])
def test_configs_that_lead_elsewhere_are_refused(folder, field):
    change_config(folder, **{field: "../elsewhere.safetensors"})
    with pytest.raises(ValueError, match=field):
        DreamDrafter.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "a/b.safetensors", "x.bin", ".safetensors", 3],
)
def test_shards_outside_the_folder_are_refused(folder, tmp_path, name):
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names the shard|no index of shards"):
        DreamDrafter.from_pretrained(folder)


def test_incomplete_shards(folder):
    drafter = DreamDrafter.from_pretrained(folder)
    drafter.save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    assert torch.equal(DreamDrafter.from_pretrained(folder).norm.weight, drafter.norm.weight)
    shard = sorted(folder.glob("model-*"))[1]
    twice = folder / "model-00001-of-00001.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(OSError, match=f"lacks the shard '{shard.name}'"):
        DreamDrafter.from_pretrained(folder)
    shard.write_bytes(content)
    twice.write_bytes(content)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["more"] = twice.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="more than one shard holds"):
        DreamDrafter.from_pretrained(folder)


def test_saving_over_a_sharded_save(folder):
    """What loads is what was saved last, whichever way round."""
    for seed, size in enumerate(("20KB", "1GB", "20KB")):
        torch.manual_seed(seed)
        drafter = DreamDrafter(DreamConfig(**SHAPE))
        drafter.save_pretrained(folder, max_shard_size=size)
        loaded = DreamDrafter.from_pretrained(folder)
        assert torch.equal(loaded.layers[0].mlp.up_proj.weight, drafter.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    "spoil", [lambda b: b[:100], lambda b: b[:-4], lambda b: b + b"more", lambda b: b"\xff" * 8 + b[8:]]
)
def test_damaged_files_are_named(folder, spoil):
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DamagedFileError, match=r"model.safetensors of .* is damaged"):
        DreamDrafter.from_pretrained(folder)
    assert path.exists()


def test_other_models_and_no_models_are_named(folder, tmp_path):
    change_config(folder, model_type="llama")
    with pytest.raises(ValueError, match=r"'llama' model.*dream-hf convert"):
        DreamDrafter.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(DamagedFileError, match=r"config.json"):
        DreamDrafter.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=r"has no config.json"):
        DreamDrafter.from_pretrained(folder)
    with pytest.raises(OSError, match="neither a folder on this machine nor a Hub id"):
        DreamDrafter.from_pretrained(str(tmp_path / "nothing"))


def test_variants_and_overrides(folder):
    drafter = DreamDrafter.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    drafter.half().save_pretrained(folder, variant="fp16")
    loaded = DreamDrafter.from_pretrained(folder, variant="fp16", dtype="float32", tree_depth=9, visual_keep_ratio=0.5)
    assert loaded.dtype == torch.float32 and torch.equal(loaded.norm.weight, drafter.norm.weight.float())
    assert loaded.config.tree_depth == 9 and loaded.config.visual_keep_ratio == 0.5
    for auto_class in (DreamDrafter, AutoModel):
        with pytest.raises(ValueError, match="`tree_depth`"):
            auto_class.from_pretrained(folder, variant="fp16", tree_depth=0)
    with pytest.raises(OSError, match=r"has no model.safetensors"):
        DreamDrafter.from_pretrained(folder)
