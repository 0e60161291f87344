"""MTP heads are read out of targets' own files, and out of speculators' container: what is found, and what is refused."""

from __future__ import annotations

import json
import shutil

import hybrid_configs
import mtp_reference as reference
import pytest
import torch
import transformers as hf
from command_line import refusal
from families import family
from lossless import assert_same_tokens, gains, generate
from processors import train_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_attaching import trusting
from test_mtp import FAMILIES, publish, target_of

import dream_hf
from dream_hf import MTPDrafter
from dream_hf.cli import main
from dream_hf.drafters import checkpoint_files, published_files
from dream_hf.drafters.agreement import agreements, write_texts
from dream_hf.targets.target import Target

__all__ = ["publish", "trusting"]  # fixtures

PATH = [7, 50, 33, 12]
SHARD = "model-2.safetensors"


def said(target, drafter, name):
    return dream_hf.draft_log_probs(target, drafter, family(name).make_inputs(target), 5, PATH)


# --- from a folder to tokens ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text target that was saved in shards, with an MTP head in some of them and a tokenizer beside."""
    place, tokenizer = tmp_path_factory.mktemp("target"), train_tokenizer(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(place)
    config = hf.Qwen3NextConfig(**hybrid_configs.qwen3_next().to_dict() | {"vocab_size": len(tokenizer)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.Qwen3NextForCausalLM(config).save_pretrained(place, max_shard_size="40KB")
    index = json.loads((place / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    for number, name in enumerate(reference.weights(config)):
        index["weight_map"][name] = shards[number % 2]  # not in all of them
    for shard in shards[:2]:
        added = {k: v.float() for k, v in reference.weights(config).items() if index["weight_map"][k] == shard}
        save_file(load_file(place / shard) | added, place / shard, metadata={"format": "pt"})
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return place


def test_from_a_folder_to_tokens(folder, monkeypatch):
    target = hf.AutoModelForCausalLM.from_pretrained(folder)
    opened = []
    monkeypatch.setattr(
        published_files, "safe_open", lambda file, **more: opened.append(file.name) or safe_open(file, **more)
    )
    drafter = dream_hf.load_drafter(folder, target)
    assert isinstance(drafter, MTPDrafter) and sorted(opened) == sorted(set(opened)) and len(opened) == 2
    ids = torch.tensor([[5, 9, 42, 17]])
    assert torch.equal(
        target.generate(ids, max_new_tokens=24, do_sample=False, assistant_model=drafter),
        target.generate(ids, max_new_tokens=24, do_sample=False),
    )
    assert drafter.state_dict().keys() == dream_hf.load_drafter("mtp", target).state_dict().keys()
    assert sum(weight.numel() for weight in drafter.parameters()) == sum(
        weight.numel() for weight in reference.weights(target.config).values()
    )


def test_commands_take_the_target_s_own_head(folder, capsys, tmp_path):
    assert main(["info", "mtp", "--target", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "MTPDrafter" and told["fits"] == "yes" and told["weights"] > 10_000
    assert told["made_for"]["model_type"] == "qwen3_next"
    command = ["generate", "--target", str(folder), "--prompt", "hello", "--max-new-tokens", "8"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    for drafter in ("mtp", "retrieval+mtp", str(folder)):
        assert main([*command, "--drafter", drafter]) == 0
        assert capsys.readouterr().out.splitlines()[0] == plain.splitlines()[0]
    bare = tmp_path / "bare"
    hf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(bare)  # transformers left the head out
    hf.AutoTokenizer.from_pretrained(folder).save_pretrained(bare)
    message = refusal(capsys, *[str(bare) if part == str(folder) else part for part in command], "--drafter", "mtp")
    assert "no drafter that can be told" in message and "`mtp.` tensors" in message and str(bare) in message


def test_a_folder_that_decodes_with_its_own_head(folder, trusting, tmp_path, caplog):
    assert main(["attach", str(folder), "mtp", str(tmp_path / "both")]) == 0
    ids, more = torch.tensor([[5, 9, 42, 17]]), {"max_new_tokens": 12, "do_sample": False}
    target = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "both", trust_remote_code=True)
    with caplog.at_level("INFO", "dream_hf"):
        answer = target.generate(ids, **more)
    assert any("tau" in record.getMessage() for record in caplog.records)
    assert torch.equal(answer, hf.AutoModelForCausalLM.from_pretrained(folder).generate(ids, **more))


def test_a_target_in_the_cache_is_enough(folder, monkeypatch):
    """Offline nobody knows whether the Hub has what the cache has not; the target's index and shards are there."""
    target = hf.AutoModelForCausalLM.from_pretrained(folder)
    target.config._name_or_path, target.config._commit_hash = "Qwen/something", "abc"
    asked = []

    def fetch(source, name, is_optional=False, **hub):
        asked.append((source, hub["revision"]))
        if not (folder / name).is_file() and not is_optional:
            raise OSError("the Hub could not be reached")
        return folder / name if (folder / name).is_file() else None

    monkeypatch.setattr(published_files, "fetch_file", fetch)
    monkeypatch.setattr(checkpoint_files, "fetch_file", fetch)
    assert isinstance(dream_hf.load_drafter("mtp", target), MTPDrafter)
    assert set(asked) == {("Qwen/something", "abc")}
    monkeypatch.setattr(published_files, "WEIGHTS", ("a.safetensors",))
    monkeypatch.setattr(published_files, "INDEX", "b.json")
    with pytest.raises(OSError, match="the Hub could not be reached"):
        dream_hf.load_drafter("mtp", target)


def test_a_target_that_came_from_no_files_has_no_head_of_its_own():
    with pytest.raises(ValueError, match=r"`drafter` \('mtp'\) is read from the target's own files"):
        dream_hf.load_drafter("mtp", target_of("qwen3_next"))


def test_the_target_tells_how_its_head_is_wired(publish):
    """All four ways on pictures, one on text, each as well as a drafter that is wired so."""
    target, folder, _ = publish("qwen3_5")
    prompts = [family("qwen3_5").make_inputs(target, seed=seed) for seed in range(2)]
    probe = dream_hf.probe_drafter(folder, target, prompts, num_tokens=16)
    assert len({trial.agreement.log_prob for trial in probe.trials}) == len(probe.trials) == 4
    texts = write_texts(target, prompts, 16)
    for trial in probe.trials:
        assert (
            trial.agreement
            == agreements(target, [dream_hf.load_drafter(folder, target, wiring=trial.wiring)], texts)[0]
        )
        assert trial.agreement.gain <= probe.best.agreement.gain
    assert probe.drafter.wiring == probe.best.wiring and {"row_positions": "token"} in [
        each.changes for each in probe.trials
    ]
    assert dream_hf.load_drafter(folder, target, wiring="probe").wiring == {
        "image_rows": "merged",
        "row_positions": "feature",
    }
    text = [family("qwen3_5").make_inputs(target, images=0)]
    assert len(dream_hf.probe_drafter(folder, target, text, num_tokens=16).trials) == 1


# --- spellings ---


@pytest.mark.parametrize("name", FAMILIES)
def test_other_spellings_say_the_same(name, publish, tmp_path):
    target, folder, tensors = publish(name)
    merged, by_tokens = (
        said(target, dream_hf.load_drafter(folder, target, wiring={"image_rows": rows}), name)
        for rows in ("merged", "token")
    )
    if name != "qwen3_5":
        stacked = reference.publish(tmp_path / "stacked", target, reference.stacked(tensors))
        assert torch.equal(said(target, dream_hf.load_drafter(stacked, target), name), merged)
    text = Target(target).text_config
    config = {
        "speculators_model_type": "mtp", "architectures": ["MTPDraftModel"], "num_nextn_predict_layers": 1,
        "transformer_layer_config": text.to_diff_dict() | {"model_type": text.model_type},
    }  # fmt: skip
    container = tmp_path / "speculators"
    container.mkdir()
    (container / "config.json").write_text(json.dumps(config))
    renamed = reference.as_speculators(tensors)
    save_file(renamed | {"embed_tokens.weight": torch.zeros(3)}, container / "model.safetensors")
    assert torch.equal(said(target, dream_hf.load_drafter(container, target), name), by_tokens)
    save_file(renamed | {"d2t": torch.zeros(3)}, container / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: mtp\.d2t"):
        dream_hf.load_drafter(container, target)


def test_qwen3_next_may_have_an_mlp_in_place_of_experts(tmp_path):
    target = target_of("qwen3_next")
    tensors = reference.weights(Target(target).text_config, is_dense=True)
    drafter = dream_hf.load_drafter(reference.publish(tmp_path, target, tensors), target)
    assert {f"mtp.{name}" for name in drafter.state_dict()} == tensors.keys()
    drafter.config.tree_depth = 2
    assert drafter.settings.tree_depth == 2 and not hasattr(Target(target).text_config, "tree_depth")


# --- refusals ---


def without(*parts):
    return lambda tensors, config: {k: v for k, v in tensors.items() if not any(part in k for part in parts)}


def changed(name, change):
    return lambda tensors, config: tensors | {name: change(tensors[name])}


def text_config(**fields):
    return lambda tensors, config: config["text_config"].update(fields) or tensors


EXPERTS = "mtp.layers.0.mlp.experts"
LLAMA = hf.LlamaConfig().to_dict()
BROKEN = {
    "no head": (without("mtp."), "no drafter that can be told.*`mtp.` tensors"),
    "a projection missing": (without("mtp.layers.0.self_attn.k_proj"), r"missing: mtp\.layers\.0\.self_attn\.k_proj\.weight"),
    "no fc": (without("mtp.fc"), r"missing: mtp\.fc\.weight"),
    "a layer without its last norm": (without("mtp.norm"), r"missing: mtp\.norm\.weight"),
    "a tensor too many": (lambda t, c: t | {"mtp.embed_tokens.weight": torch.zeros(2, 2)}, r"unexpected: mtp\.embed_tokens"),
    "scales": (lambda t, c: t | {"mtp.fc.weight_scale_inv": torch.zeros(1, 1)}, r"unexpected: mtp\.fc\.weight_scale_inv"),
    "a narrow fc": (changed("mtp.fc.weight", lambda w: w[:, :32].clone()), r"mtp\.fc\.weight is \(32, 32\) in the file"),
    "whole numbers": (changed("mtp.fc.weight", lambda w: w.to(torch.int8)), r"mtp\.fc\.weight is torch\.int8; quantised"),
    "queries without gates": (
        changed("mtp.layers.0.self_attn.q_proj.weight", lambda w: w[:32].clone()), r"q_proj\.weight is \(32, 32\)"),
    "two layers": (lambda t, c: t | {"mtp.layers.1.mlp.w": torch.zeros(2, 2)}, "it has 2 layers"),
    "two layers by the config": (text_config(mtp_num_hidden_layers=2), "`mtp_num_hidden_layers`"),
    "an embedding of its own": (text_config(mtp_use_dedicated_embeddings=True), "mtp_use_dedicated_embeddings"),
    "two names for one": (lambda t, c: t | {"mtp_layers.0.input_proj.weight": t["mtp.fc.weight"] + 0}, "same meaning"),
    "an expert missing": (without(f"{EXPERTS}.2."), "lacks the gate_proj of some expert"),
    "half an expert": (without(f"{EXPERTS}.2.up"), "lacks the up_proj of some expert"),
    "the last expert missing": (without(f"{EXPERTS}.3."), r"gate_up_proj is \(3, 32, 32\) in the file and \(4, 32, 32\)"),
    "an expert of another width": (
        changed(f"{EXPERTS}.2.up_proj.weight", lambda w: w[:8].clone()), "lacks the up_proj of some expert, or has one of"),
    "flat experts": (changed(f"{EXPERTS}.0.up_proj.weight", lambda w: w[0].clone()), "has one of another shape"),
    "another width": (text_config(hidden_size=64), "a model with `hidden_size` 64, and this target's is 32"),
    "another vocabulary": (text_config(vocab_size=999), "a model with `vocab_size` 999"),
    "another depth": (text_config(num_hidden_layers=2, layer_types=["full_attention"] * 2), "`num_hidden_layers` 2"),
    "another family": (lambda t, c: c.clear() or c.update(LLAMA) or t, "`model_type` 'llama', and this"),
    "a family nobody knows": (lambda t, c: c.update(model_type="nobody_knows") or t, "has no MTP head for this target"),
    "a config that says nothing": (lambda t, c: c.clear() or t, "has no MTP head for this target"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_refused(what, publish, tmp_path):
    target, folder, _ = publish("qwen3_5_moe")
    change, message = BROKEN[what]
    config = json.loads((folder / "config.json").read_text())
    tensors = change(load_file(folder / SHARD), config)
    reference.publish(tmp_path, target, {k: v for k, v in tensors.items() if k.startswith("mtp")}, config)
    with pytest.raises(ValueError, match=message) as error:
        dream_hf.load_drafter(tmp_path, target)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_shards_and_other_targets_are_refused(publish, tmp_path):
    target, folder, tensors = publish("qwen3_5")
    place = shutil.copytree(folder, tmp_path / "copy")
    (place / "model-1.safetensors").unlink()  # none of the head's is in it
    drafter = dream_hf.load_drafter(place, target)
    (place / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{SHARD} of .* can't be read as plain tensors"):
        dream_hf.load_drafter(place, target)
    save_file({name: tensor for name, tensor in tensors.items() if name != "mtp.fc.weight"}, place / SHARD)
    with pytest.raises(ValueError, match=r"can't be read as plain tensors.*mtp\.fc\.weight"):
        dream_hf.load_drafter(place, target)
    (place / SHARD).unlink()
    with pytest.raises(OSError, match=f"lacks the shard '{SHARD}'"):
        dream_hf.load_drafter(place, target)
    with pytest.raises(ValueError, match="names rope_theta; what can be said of an MTP head is image_rows"):
        dream_hf.load_drafter(folder, target, wiring={"rope_theta": 3.0})
    with pytest.raises(ValueError, match=r"`image_rows` \('compressed'\) must be one of merged, token"):
        dream_hf.load_drafter(folder, target, wiring={"image_rows": "compressed"})
    other = target_of("qwen3_next")
    with pytest.raises(ValueError, match="it belongs to a model with `model_type` 'qwen3_5_text'"):
        dream_hf.load_drafter(folder, other)
    with pytest.raises(ValueError, match="trained for another target"):
        generate(other, family("qwen3_next").make_inputs(other), assistant_model=drafter)
    with pytest.raises(ValueError, match=r"`tree_top_k` \(105\) must not exceed"):
        wide = drafter.with_settings(tree_top_k=105)
        generate(target, family("qwen3_5").make_inputs(target), assistant_model=wide)


def test_a_text_model_of_a_target_with_pictures(publish):
    """A checkpoint with pictures that was loaded as a text model: the head is the same."""
    target, folder, _ = publish("qwen3_5")
    text = hf.Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    drafter = dream_hf.load_drafter(folder, text)
    inputs = {"input_ids": torch.tensor([[1, 7, 50, 33, 12]])}
    out = generate(text, inputs, max_new_tokens=16, assistant_model=drafter)
    assert_same_tokens(generate(text, inputs, max_new_tokens=16), out)
    whole = generate(target, inputs, max_new_tokens=16, assistant_model=dream_hf.load_drafter(folder, target))
    assert gains(whole) == gains(out)
