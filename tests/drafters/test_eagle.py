"""EAGLE drafters: every published layout computes what plain tensor operations do, and refuses what it is not."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from eagle_reference import LAYOUTS, VOCAB, Layout, log_probs
from families import family
from lossless import assert_counts_add_up, assert_same_tokens, gains, generate, stop_tokens, untrained
from published import published_config, published_weights, write_published
from safetensors.torch import load_file, save_file

import dream_hf
from dream_hf import EagleDrafter
from dream_hf.cli import options
from dream_hf.compat import CACHE, cache_of
from dream_hf.decoding.drafter import DrafterAround
from dream_hf.drafters import published_files
from dream_hf.drafters.eagle.published import read_wiring
from dream_hf.drafters.retrieval.lookup import PromptLookupDrafter
from dream_hf.targets.target import Target

every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
SOME = [each for each in LAYOUTS if each.name in ("eagle1", "vispec", "msd", "eagle3", "speculators-3.1")]
NAMED = {layout.name: layout for layout in LAYOUTS}
PATH = [7, 50, 33, 12]


@functools.cache
def target_of(name):
    return family(name).make_target()


@pytest.fixture(scope="module")
def publish(tmp_path_factory):
    """Layout -> its target and the folder it was published to."""

    @functools.cache
    def published(layout: Layout):
        return target_of(layout.family), layout.publish(tmp_path_factory.mktemp("published") / layout.name)

    return published


def expected_log_probs(layout: Layout, target, inputs, first_token: int) -> torch.Tensor:
    """By the plain reference, from the target's own hidden states."""
    view = Target(target)
    with view.recording(positions=True) as record, torch.no_grad():
        states = target(**inputs, output_hidden_states=True).hidden_states
    length = inputs["input_ids"].shape[1]
    positions = torch.arange(length).expand(3, -1) if layout.planes is None else record.positions[0][:, 0]
    tokens = torch.cat([inputs["input_ids"][0, 1:], torch.tensor([first_token])])
    features = torch.cat([states[index][0] for index in layout.layers], dim=-1)
    text = torch.zeros(1, dtype=torch.bool)
    is_image = torch.cat([view.is_visual(inputs["input_ids"])[0, 1:], text])
    merged = torch.cat([states[0][0, 1:], states[0][0, :1]])
    rows = {"tokens": tokens, "features": features, "positions": positions, "merged": merged, "is_image": is_image}
    return log_probs(layout, view.embedding.weight, view.lm_head.weight, rows, PATH)


@every_layout
def test_every_layout_says_what_the_reference_says(layout, publish):
    target, folder = publish(layout)
    drafter = dream_hf.load_drafter(folder, target)
    assert drafter.dtype == target.dtype and drafter.config.feature_layers == list(layout.layers)
    inputs = family(layout.family).make_inputs(target)
    said = dream_hf.draft_log_probs(target, drafter, inputs, 5, PATH)
    expected = expected_log_probs(layout, target, inputs, 5)
    assert torch.equal(said.isfinite(), expected.isfinite())
    torch.testing.assert_close(said[said.isfinite()].double(), expected[expected.isfinite()], rtol=1e-5, atol=1e-4)


# --- generate ---


class Watch(DrafterAround):
    """A drafter whose trees are noted, by how long the texts were."""

    def __init__(self, drafter):
        super().__init__(drafter)
        self.trees = []

    def start(self, prefill, settings):
        session = self.inner.start(prefill, settings)
        draft = session.draft

        def noted(root_tokens, max_depth=None):
            tree = draft(root_tokens, max_depth)
            self.trees.append((root_tokens.flatten().tolist(), tree))
            return tree

        session.draft = noted
        return session


WIDE = {"tree_depth": 3, "tree_top_k": 10, "tree_size": 40}
FAMILIES = ["llama", "llava_clip_llama", "gemma3", "qwen2_vl", "qwen3_vl"]


def drafter_for(layout, name, publish):
    return dream_hf.load_drafter(publish(layout)[1], target_of(name)).with_settings(**WIDE)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", SOME, ids=repr)
def test_the_output_is_the_target_s(layout, name, batch, publish):
    target, drafter = target_of(name), drafter_for(layout, name, publish)
    inputs = family(name).make_inputs(target, batch, text_len=20)
    expected = generate(target, inputs, max_new_tokens=40)
    out = generate(target, inputs, max_new_tokens=40, assistant_model=drafter)
    assert_same_tokens(expected, out)
    assert_counts_add_up(out, target.generation_config.pad_token_id)
    stops = {"eos_token_id": stop_tokens(expected.sequences, 40, (5, 11, 17)), "max_new_tokens": 40}
    assert_same_tokens(generate(target, inputs, **stops), generate(target, inputs, assistant_model=drafter, **stops))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", "eagle3"),
        ("qwen3_vl", "angelslim-interleaved"),
        ("llava_clip_llama", "vispec"),
        ("qwen2_vl", "msd-qwen"),
    ],
)
def test_rows_of_a_batch_are_drafted_as_if_alone(name, layout, publish):
    target, layout = target_of(name), NAMED[layout]
    rows = family(name).make_rows(target, 3, text_len=20)
    together = Watch(drafter_for(layout, name, publish))
    out = generate(target, family(name).collate(rows), max_new_tokens=40, assistant_model=together)
    assert max(gain for row in gains(out) for gain in row) > 1
    for row, inputs in enumerate(rows):
        alone = Watch(drafter_for(layout, name, publish))
        single = generate(target, inputs, max_new_tokens=40, assistant_model=alone)
        steps = len(gains(single)[0])
        assert gains(single)[0] == gains(out)[row]
        for (_, ours), (_, theirs) in zip(alone.trees[: steps - 4], together.trees, strict=False):
            assert ours.tokens[0].tolist() == theirs.tokens[row].tolist()  # the same trees at the same lengths


@pytest.mark.parametrize("prompt", ["embeddings", "in chunks", "one token", "padding behind"])
@pytest.mark.parametrize("layout", SOME, ids=repr)
def test_prompts_of_any_kind(layout, prompt, publish):
    target, drafter = target_of("llama"), drafter_for(layout, "llama", publish)
    inputs, more = family("llama").make_inputs(target, 3), {"max_new_tokens": 16}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if prompt == "embeddings":
        inputs = {"inputs_embeds": target.get_input_embeddings()(ids), "attention_mask": mask}
    elif prompt == "in chunks":
        more["prefill_chunk_size"] = 4
    elif prompt == "one token":
        inputs = {"input_ids": ids[:, -1:]}
    else:
        inputs = {"input_ids": ids, "attention_mask": mask.flip(1)}
    assert_same_tokens(generate(target, inputs, **more), generate(target, inputs, assistant_model=drafter, **more))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", SOME, ids=repr)
def test_a_chat_goes_on(layout, batch, publish):
    target, watch = target_of("llama"), Watch(drafter_for(layout, "llama", publish))
    inputs = {"input_ids": family("llama").make_inputs(target)["input_ids"].expand(batch, -1)}
    first = generate(target, inputs, max_new_tokens=20, assistant_model=watch)
    ids = torch.cat([first.sequences, inputs["input_ids"][:, 2:7]], dim=1)
    watch.trees.clear()
    text, mask = {"input_ids": ids}, {"attention_mask": torch.ones_like(ids)}
    expected = generate(target, text | mask, max_new_tokens=20)
    out = generate(target, text, max_new_tokens=20, assistant_model=watch, **{CACHE: cache_of(first)})
    assert_same_tokens(expected, out)
    anew = Watch(drafter_for(layout, "llama", publish))
    generate(target, text | mask, max_new_tokens=20, assistant_model=anew)
    assert torch.equal(watch.trees[0][1].tokens, anew.trees[0][1].tokens)  # it has read the whole text


def test_chains_in_transformers_own_loop(publish):
    for name, layout in (("llama", "eagle3"), ("qwen3_vl", "angelslim-interleaved")):
        target, drafter = target_of(name), drafter_for(NAMED[layout], name, publish)
        inputs = family(name).make_inputs(target)
        expected = generate(target, inputs, max_new_tokens=20)
        chained = {"custom_generate": dream_hf.dream_chain_generate, "drafter": drafter}
        assert torch.equal(generate(target, inputs, max_new_tokens=20, **chained).sequences, expected.sequences)


def test_sampling_draws_from_the_target(publish):
    """Exact distributions are shown for any tree elsewhere; here, that nothing of a call is in the way."""
    target, drafter = target_of("llama"), drafter_for(NAMED["eagle3"], "llama", publish)
    inputs = family("llama").make_inputs(target, 3)
    for seed in range(3):
        torch.manual_seed(seed)
        out = generate(target, inputs, max_new_tokens=12, do_sample=True, top_k=5, assistant_model=drafter)
        scores = target(out.sequences[:1, inputs["input_ids"].shape[1] - 12 :]).logits  # row 0 has no padding
        for step in range(12):
            token = int(out.sequences[0, inputs["input_ids"].shape[1] + step])
            assert token in scores[0, 11 + step].topk(5).indices.tolist()


# --- wiring and refusals ---


def test_wiring_overrides_what_a_config_says(publish):
    target, folder = publish(NAMED["eagle3"])
    wiring = {"feature_layers": (1, 1, 2), "norm_before_residual": True, "rope_theta": 77.0}
    drafter = dream_hf.load_drafter(folder, target, wiring=wiring)
    config = drafter.config
    assert config.feature_layers == [1, 1, 2] and config.norm_before_residual
    assert config.rope_parameters["rope_theta"] == 77.0
    other = replace(NAMED["eagle3"], layers=(1, 1, 2), norm_before_residual=True, theta=77.0)
    inputs = family("llama").make_inputs(target)
    said = dream_hf.draft_log_probs(target, drafter, inputs, 5, PATH)
    expected = expected_log_probs(other, target, inputs, 5)
    torch.testing.assert_close(said[said.isfinite()].double(), expected[expected.isfinite()], rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"`wiring` \('guess'\) must be a mapping"):
        dream_hf.load_drafter(folder, target, wiring="guess")
    with pytest.raises(ValueError, match="names layers; what can be said is feature_layers"):
        dream_hf.load_drafter(folder, target, wiring={"layers": (1, 2, 3)})


BROKEN = {
    "a tensor too many": (lambda t, c: t | {"midlayer.bias": t["norm.weight"] + 0}, "unexpected: layers.0.bias"),
    "a tensor missing": (lambda t, c: {k: v for k, v in t.items() if "down_proj" not in k}, "missing: layers.0.mlp.down"),
    "no d2t": (lambda t, c: {k: v for k, v in t.items() if k != "d2t"}, "t2d and no d2t"),
    "neither d2t nor t2d": (lambda t, c: {k: v for k, v in t.items() if k[1:] != "2d" and k != "d2t"}, "48 rows, and with"),
    "ids instead of differences": (lambda t, c: t | {"d2t": t["d2t"] + torch.arange(48)}, "d2t and t2d name different"),
    "a wrong t2d": (lambda t, c: t | {"t2d": ~t["t2d"]}, "d2t and t2d name different"),
    "fc of another width": (lambda t, c: t | {"fc.weight": t["fc.weight"][:, :64].clone()}, "fc reads 64 numbers, and 96"),
    "another vocabulary": (lambda t, c: c.update(vocab_size=99) or t, "99 tokens and the target's 104"),
    "layers that are not there": (
        lambda t, c: c.update(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}) or t, "reads layers .2, 3, 10."),
    "heads that do not fit": (lambda t, c: c.update(num_attention_heads=7) or t, "does not divide"),
    "angles that change": (lambda t, c: c.update(rope_scaling={"rope_type": "dynamic", "factor": 2.0}) or t, "depend on"),
    "a window": (lambda t, c: c.update(layer_types=["sliding_attention"]) or t, "sliding"),
    "a single feature": (lambda t, c: c.update(eagle_config={"use_aux_hidden_state": False}) or t, "use_aux_hidden_state"),
    "an absurd width": (lambda t, c: c.update(intermediate_size=10**12) or t, "parameters"),
    "no heads": (lambda t, c: c.pop("num_attention_heads") and t, "has no `num_attention_heads`"),
    "layers without end": (lambda t, c: t | {f"layers.{10**8}.mlp.w": t["norm.weight"] + 0}, "more than the 64"),
    "a config in a config that is none": (lambda t, c: c.update(transformer_layer_config=3) or t, "no EAGLE drafter"),
    "a list for an object": (lambda t, c: c.update(eagle_config=[1, 2]) or t, "no EAGLE drafter"),
    "words for layers": (lambda t, c: c.update(aux_hidden_states_layer_ids="abc") or t, "no EAGLE drafter"),
    "no drafter": (lambda t, c: {"weight": t["fc.weight"]}, "no drafter that can be told"),
    "an adaptor too many": (lambda t, c: t | {"imadpt.q": t["norm.weight"][:32].view(2, 4, 4) + 0}, "has no rows past"),
    "ViSpec of NeMo's": (lambda t, c: t | {"img_adaptor.query": t["norm.weight"] + 0}, "a ViSpec drafter of NeMo's"),
    "DFlash": (lambda t, c: t | {"hidden_norm.weight": t["norm.weight"] + 0}, "no DFlash drafter"),
    "another algorithm": (lambda t, c: c.update(speculators_model_type="other") or t, "'other' drafter"),
    "P-EAGLE": (lambda t, c: c.update(speculators_model_type="peagle") or t, "a parallel .P-EAGLE. drafter"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_refused(what, publish, tmp_path):
    target, folder = publish(NAMED["eagle3"])
    change, message = BROKEN[what]
    config = json.loads((folder / "config.json").read_text())
    tensors = change(load_file(folder / "model.safetensors"), config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        dream_hf.load_drafter(tmp_path, target)
    assert str(tmp_path) in str(error.value)


def test_damaged_files_and_pickles_are_refused(publish, tmp_path):
    target, folder = publish(NAMED["eagle3"])
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(OSError, match=r"has none of model\.safetensors, pytorch_model\.bin"):
        dream_hf.load_drafter(tmp_path, target)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="can't be read as plain tensors"):
        dream_hf.load_drafter(tmp_path, target)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"fc.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="can't be read as plain tensors"):
        dream_hf.load_drafter(tmp_path, target)
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match=r"no config\.json"):
        dream_hf.load_drafter(tmp_path, target)
    with pytest.raises(OSError, match="neither a folder on this machine nor a Hub id"):
        dream_hf.load_drafter(tmp_path / "nothing", target)


def test_another_target_is_refused_in_generate(publish):
    drafter = dream_hf.load_drafter(publish(NAMED["eagle3"])[1], target_of("llama"))
    target = target_of("qwen3_vl")
    with pytest.raises(ValueError, match="trained for another target"):
        generate(target, family("qwen3_vl").make_inputs(target), assistant_model=drafter)
    with pytest.raises(ValueError, match=r"`tree_top_k` \(60\) must not exceed the 48 tokens"):
        wide = drafter.with_settings(tree_top_k=60)
        generate(target_of("llama"), family("llama").make_inputs(target_of("llama")), assistant_model=wide)


@pytest.mark.parametrize("name", ["speculators-3.1", "vispec", "msd-qwen"])
def test_saved_and_loaded_it_says_the_same(name, publish, tmp_path):
    target, folder = publish(NAMED[name])
    drafter = dream_hf.load_drafter(folder, target)
    drafter.save_pretrained(tmp_path)
    again = dream_hf.load_drafter(tmp_path, target)
    inputs = family("llama").make_inputs(target)
    asked = [dream_hf.draft_log_probs(target, each, inputs, 5, PATH) for each in (drafter, again)]
    assert isinstance(again, EagleDrafter) and torch.equal(*asked)
    with pytest.raises(ValueError, match="is for published EAGLE and DFlash drafters"):
        dream_hf.load_drafter(tmp_path, target, wiring={"rope_theta": 3.0})


def test_dream_drafters_are_loaded_and_asked_too(tmp_path):
    target = target_of("llama")
    drafter = untrained(target)
    drafter.save_pretrained(tmp_path)
    loaded = dream_hf.load_drafter(tmp_path, target)
    inputs = family("llama").make_inputs(target)
    said = [dream_hf.draft_log_probs(target, each, inputs, 5, PATH) for each in (drafter, loaded)]
    assert type(loaded) is type(drafter) and said[0].shape == (len(PATH) + 1, VOCAB)
    torch.testing.assert_close(*said)
    torch.testing.assert_close(said[0].logsumexp(-1), torch.zeros(len(PATH) + 1))
    config = published_config(2) | {"hidden_size": 32, "vocab_size": VOCAB}
    folder = write_published(tmp_path / "published", published_weights(2), config)
    assert dream_hf.load_drafter(folder, target).config.legacy


def test_only_what_drafts_by_levels_can_be_asked():
    target = target_of("llama")
    inputs = family("llama").make_inputs(target, 2)
    with pytest.raises(TypeError, match="does not grow trees by levels"):
        dream_hf.draft_log_probs(target, PromptLookupDrafter(), {k: v[:1] for k, v in inputs.items()}, 5)
    with pytest.raises(ValueError, match="2 rows"):
        dream_hf.draft_log_probs(target, PromptLookupDrafter(), inputs, 5)
    with pytest.raises(ValueError, match="one of them is 104"):
        dream_hf.draft_log_probs(target, PromptLookupDrafter(), {k: v[:1] for k, v in inputs.items()}, 5, [104])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_of_the_drafter(implementation, publish):
    target, folder = publish(NAMED["speculators-3.1"])
    drafter = dream_hf.load_drafter(folder, target)
    drafter.set_attn_implementation(implementation)
    inputs = family("llama").make_inputs(target)
    said = dream_hf.draft_log_probs(target, drafter, inputs, 5, PATH)
    expected = expected_log_probs(NAMED["speculators-3.1"], target, inputs, 5)
    torch.testing.assert_close(said[said.isfinite()].double(), expected[expected.isfinite()], rtol=1e-5, atol=1e-4)
    assert_same_tokens(generate(target, inputs), generate(target, inputs, assistant_model=drafter))


@pytest.mark.parametrize(
    ("config", "names", "num_layers", "expected"),
    [
        ({}, (), 36, (2, 18, 33)),
        ({"eagle_aux_hidden_state_layer_ids": None, "speculators_model_type": "eagle3"}, (), 36, (2, 18, 33)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 17, 32], "speculators_model_type": "eagle3"}, (), 36, (1, 17, 32)),
        ({"eagle_aux_hidden_state_layer_ids": [2, 18, 33]}, (), 36, (2, 18, 33)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 17, 32]}, (), 36, (2, 18, 33)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 17, 32]}}, (), 36, (2, 18, 33)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 18, 33]}}, (), 36, (2, 18, 33)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [3, 9, 20]}}, (), 36, (4, 10, 21)),
        ({"eagle_aux_hidden_state_layer_ids": [3, 9], "eagle_aux_layer_semantics": "sglang"}, (), 36, (4, 10)),
        ({"aux_hidden_states_layer_ids": [0, 3, 6]}, (), 8, (1, 4, 7)),
    ],
)
def test_layers_are_told_by_whoever_wrote_the_config(config, names, num_layers, expected):
    names = {"midlayer.hidden_norm.weight", "norm.weight", *names}
    assert read_wiring(config, names, num_layers).feature_layers == expected
    assert read_wiring({**config, "norm_output": True}, names, num_layers).is_feedback_normed == (
        "speculators_model_type" in config
    )


def test_a_drafter_by_a_hub_id(publish, tmp_path, monkeypatch):
    target, folder = publish(NAMED["eagle3"])
    fetched = []

    def fetch(source, name, is_optional=False, **hub):
        fetched.append((str(source), name, hub["revision"]))
        return folder / name if (folder / name).is_file() else None

    monkeypatch.setattr(published_files, "fetch_file", fetch)
    drafter = dream_hf.load_drafter("someone/something", target, revision="v2")
    assert drafter.config.generation == 3 and {(source, rev) for source, _, rev in fetched} == {
        ("someone/something", "v2")
    }


def test_measuring_commands_take_dream_s_drafters_only(publish, monkeypatch):
    target, folder = publish(NAMED["eagle3"])
    models = SimpleNamespace(drafter=dream_hf.load_drafter(folder, target))
    monkeypatch.setattr(options, "load", lambda args: models)
    with pytest.raises(ValueError, match=r"`--drafter`.*measures DREAM drafters only"):
        options.load_dream(SimpleNamespace(drafter="x/y"))
