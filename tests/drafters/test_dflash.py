"""DFlash drafters: every published layout computes what plain tensor operations do, and refuses what it is not."""

from __future__ import annotations

import functools
import json

import dflash_reference as reference
import pytest
import torch
import transformers as hf
from dflash_reference import LAYOUTS, Layout
from distributions import NUM_TOKENS, extended, repeated, tiny_llama, tiny_qwen2_vl
from double import TIGHT
from families import family
from family_configs import TEXT_IDS, VOCAB_SIZE
from lossless import assert_counts_add_up, assert_same_tokens, gains, generate, seeded_runs, stop_tokens
from safetensors.torch import load_file, save_file
from test_eagle import Watch
from test_probe import foretold_by
from test_sampling import LIMIT, PICTURE_TOKENS, p_values

import dream_hf
from dream_hf import DFlashDrafter
from dream_hf.compat import CACHE, cache_of
from dream_hf.decoding.drafter import Prefill
from dream_hf.drafters.dflash.loading import load_dflash
from dream_hf.drafters.dflash.published import feature_layers
from dream_hf.drafters.dflash.session import ContextState
from dream_hf.targets.target import Target

NAMED = {layout.name: layout for layout in LAYOUTS}
SOME = [NAMED[name] for name in ("zlab", "zlab-sliding", "speculators-anchored")]
FAMILIES = ["llama", "llava_clip_llama", "gemma3", "qwen2_vl", "qwen3_vl"]
SMALL = {"tree_depth": 3, "tree_top_k": 3, "tree_size": 9}
WIDE = {"tree_top_k": 10, "tree_size": 40}
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=repr)


@functools.cache
def target_of(name):
    return family(name).make_target()


@pytest.fixture(scope="module")
def publish(tmp_path_factory):
    """Layout -> the folder it was published to."""

    @functools.cache
    def published(layout: Layout):
        return layout.publish(tmp_path_factory.mktemp("published") / layout.name)

    return published


def drafter_for(layout, name, publish, **settings):
    target, fields = target_of(name), json.loads((publish(layout) / "config.json").read_text())
    fields["num_target_layers"] = Target(target).text_config.num_hidden_layers  # of other depths, too
    path = publish(layout) / "model.safetensors"
    tensors = load_file(path) if path.is_file() else torch.load(publish(layout) / "pytorch_model.bin")
    return load_dflash(str(path), fields, tensors, target).with_settings(**settings)


def features_of(target, inputs, layout):
    """The target's own hidden states of one row's text, (L, layers * 32)."""
    with torch.no_grad():
        states = target(**inputs, output_hidden_states=True).hidden_states
    return torch.cat([states[index][0] for index in layout.layers], dim=-1)


def marginals_of(target, layout, features, root):
    view = Target(target)
    return reference.log_probs(layout, view.embedding.weight, view.lm_head.weight, features, root)


def check_trees(watch, target, layout, out, rows, settings):
    """Every tree is made of the best paths of the reference's marginals, in every row, step by step."""
    num_trees = 0
    for row, inputs in enumerate(rows):
        new = out.sequences.shape[1] - max(each["input_ids"].shape[1] for each in rows)
        ids = out.sequences[row : row + 1, -new:]
        features = features_of(target, extended(inputs, ids), layout)
        ids, length = torch.cat([inputs["input_ids"], ids], dim=1)[0], inputs["input_ids"].shape[1]
        for gain, (roots, tree) in zip(gains(out)[row], watch.trees, strict=False):
            assert roots[row] == int(ids[length])
            depth = min(tree.max_depth, settings["tree_depth"])
            marginals = marginals_of(target, layout, features[:length], roots[row])[:depth]
            best = reference.best_paths(marginals, settings["tree_top_k"], settings["tree_size"])
            paths = [
                tuple(tree.tokens[row, tree.ancestors[row, node]].tolist()[1:]) for node in range(1, tree.num_nodes)
            ]
            found = dict(zip(paths, tree.log_probs[row, 1:].tolist() if paths else [], strict=True))
            assert found.keys() == {path for _, path in best}
            for log_prob, path in best:
                assert abs(found[path] - log_prob) < 1e-9
            num_trees += 1
            length += gain
    return num_trees


# --- arithmetic ---


@every_layout
def test_the_full_pass_and_the_cached_one_are_the_reference_s(layout, publish):
    target = target_of("llama")
    drafter = dream_hf.load_drafter(publish(layout), target)
    assert isinstance(drafter, DFlashDrafter) and drafter.dtype == target.dtype
    assert drafter.config.feature_layers == list(layout.layers) and drafter.config.num_drafted == layout.depth
    features = features_of(target, family("llama").make_inputs(target, text_len=20), layout)[None]
    table = drafter.embed_tokens.weight if layout.own_embedding else target.get_input_embeddings().weight
    blocks = layout.scale * table[[5] + [reference.MASK] * (layout.block - 1)][None]
    state = ContextState(drafter, 1)
    with torch.no_grad():
        for count in (14, 1, 5):  # a prompt, and steps; a block is drafted after each
            done = state.slots.longest
            state.read(features[:, done : done + count], [count])
            expected = reference.run(layout, target.get_input_embeddings().weight, features[0, : done + count], 5)
            torch.testing.assert_close(state.block(blocks)[0], expected, **TIGHT)
            cache = hf.DynamicCache()
            rows = torch.arange(done + count)
            drafter.remember(drafter.context(features[:, : done + count]), rows[None], cache)
            whole = drafter(blocks, cache, torch.tensor([done + count]))
            torch.testing.assert_close(whole[0], expected, **TIGHT)


@every_layout
def test_what_it_says_is_what_the_reference_says(layout, publish):
    target = target_of("llama")
    drafter = dream_hf.load_drafter(publish(layout), target)
    inputs = family("llama").make_inputs(target)
    said = dream_hf.draft_log_probs(target, drafter, inputs, 5, [7] * (layout.depth - 1))
    expected = marginals_of(target, layout, features_of(target, inputs, layout), 5)
    assert torch.equal(said.isfinite(), expected.isfinite())
    torch.testing.assert_close(said.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "name"),
    [*((each, "llama") for each in LAYOUTS), *((each, name) for each in SOME for name in FAMILIES[1:])],
)
def test_trees_of_a_ragged_batch_are_the_reference_s(layout, name, publish):
    target, settings = target_of(name), SMALL
    rows = family(name).make_rows(target, 3, text_len=17)
    watch = Watch(drafter_for(layout, name, publish, **settings))
    out = generate(target, family(name).collate(rows), max_new_tokens=10, assistant_model=watch)
    assert check_trees(watch, target, layout, out, rows, settings) >= 12


def test_what_padding_has_is_not_read(publish):
    target, layout = target_of("llama"), NAMED["zlab"]
    drafter, inputs = drafter_for(layout, "llama", publish), family("llama").make_inputs(target, 4, text_len=20)
    states = target(**inputs, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].bool()
    features = torch.cat([states[index] for index in layout.layers], dim=-1).masked_fill(~real[..., None], torch.nan)
    prefill = Prefill(Target(target), inputs["input_ids"], real, ~real, torch.tensor([[5]] * 4), features=features)
    tree = drafter.start(prefill, drafter.settings).draft(prefill.first_tokens)
    assert tree.num_nodes == 33 and tree.log_probs.isfinite().all()


# --- generate ---


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", SOME, ids=repr)
def test_the_output_is_the_target_s(layout, name, batch, publish):
    target, drafter = target_of(name), drafter_for(layout, name, publish, **WIDE)
    inputs = family(name).make_inputs(target, batch, text_len=20)
    expected = generate(target, inputs, max_new_tokens=32)
    out = generate(target, inputs, max_new_tokens=32, assistant_model=drafter)
    assert_same_tokens(expected, out)
    assert_counts_add_up(out, target.generation_config.pad_token_id)
    stops = {"eos_token_id": stop_tokens(expected.sequences, 32, (5, 11, 17)), "max_new_tokens": 32}
    assert_same_tokens(generate(target, inputs, **stops), generate(target, inputs, assistant_model=drafter, **stops))
    runs = seeded_runs(target, inputs, [drafter, drafter])
    assert torch.equal(runs[0].sequences, runs[1].sequences) and gains(runs[0]) == gains(runs[1])


@pytest.mark.parametrize("make_target", [tiny_llama, tiny_qwen2_vl])
def test_samples_have_the_target_s_distribution(make_target):
    target = make_target()
    layout = NAMED["zlab-sliding"]
    text = Target(target).text_config
    fields = {**layout.fields(), "vocab_size": text.vocab_size, "num_target_layers": text.num_hidden_layers}
    fields["dflash_config"] = {**fields["dflash_config"], "mask_token_id": NUM_TOKENS - 1}
    drafter = load_dflash("here", fields, layout.weights(), target)
    drafter = drafter.with_settings(tree_depth=3, tree_top_k=2, tree_size=6)
    more = PICTURE_TOKENS if make_target is tiny_qwen2_vl else {}
    assert min(p_values(target, drafter, num_draws=1024, temperature=1.0, **more)) > LIMIT


@pytest.mark.parametrize("prompt", ["embeddings", "in chunks", "one token", "padding behind"])
def test_prompts_of_any_kind(prompt, publish):
    target = target_of("llama")
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
    for layout in SOME:
        drafter = drafter_for(layout, "llama", publish, **WIDE)
        assert_same_tokens(generate(target, inputs, **more), generate(target, inputs, assistant_model=drafter, **more))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen2_vl"])
def test_a_chat_goes_on(name, batch, publish):
    """Two turns, a picture in the first: the second drafts as if all were read at once."""
    target, watch = target_of(name), Watch(drafter_for(NAMED["zlab-sliding"], name, publish, **WIDE))
    inputs = repeated(family(name).make_inputs(target), batch)
    first = generate(target, inputs, max_new_tokens=20, assistant_model=watch)
    ids = torch.cat([first.sequences, inputs["input_ids"][:, -5:]], dim=1)
    whole = extended(inputs, ids[:, inputs["input_ids"].shape[1] :])
    expected = generate(target, whole, max_new_tokens=20)
    watch.trees.clear()
    out = generate(target, {"input_ids": ids}, max_new_tokens=20, assistant_model=watch, **{CACHE: cache_of(first)})
    assert_same_tokens(expected, out)
    anew = Watch(drafter_for(NAMED["zlab-sliding"], name, publish, **WIDE))
    assert_same_tokens(expected, generate(target, whole, max_new_tokens=20, assistant_model=anew))
    ours, theirs = watch.trees[0][1], anew.trees[0][1]
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, **TIGHT)


def test_a_block_that_knows_is_believed():
    """Weights with which the last token's row says the token that a target writes behind it: every step gains two."""
    target = family("llama").make_target(seed=1)
    first, stop = TEXT_IDS
    steps = torch.arange(1, 17).double() * 2 * torch.pi / (stop - first)
    angles = torch.arange(stop - first)[:, None] * steps
    table = torch.zeros(VOCAB_SIZE, 32, dtype=torch.float64)
    table[first:stop] = torch.cat([angles.cos(), angles.sin()], dim=1)
    cos, sin = steps.cos().diag(), steps.sin().diag()
    back = torch.cat([torch.cat([cos, sin], dim=1), torch.cat([-sin, cos], dim=1)])  # an embedding to the one before
    for part, parameter in target.get_decoder().named_parameters():
        if part.removesuffix(".weight").split(".")[-1] in ("o_proj", "down_proj"):
            parameter.zero_()
    target.get_input_embeddings().weight.copy_(table)
    target.get_output_embeddings().weight.copy_(table @ back.T)
    layout = NAMED["speculators-anchored"]
    weights = {
        name: 0 * part if "o_proj" in name or "down_proj" in name else part for name, part in layout.weights().items()
    }
    weights["norm.weight"] = torch.ones(32, dtype=torch.float64)
    drafter = load_dflash("here", layout.fields(), weights, target).with_settings(tree_depth=3, tree_top_k=2)
    inputs = family("llama").make_inputs(target, 3)
    expected = generate(target, inputs, max_new_tokens=31)
    out = generate(target, inputs, max_new_tokens=31, assistant_model=drafter)
    assert_same_tokens(expected, out)
    assert gains(out) == [[2] * 15] * 3


# --- what is told and refused ---


def test_layers_are_told_by_whoever_wrote_the_config():
    assert feature_layers({"dflash_config": {"target_layer_ids": [1, 17, 33]}}, 5, 36) == (2, 18, 34)
    assert feature_layers({"target_layer_ids": [1, 17, 33]}, 5, 36) == (2, 18, 34)
    assert feature_layers({"speculators_model_type": "dflash", "aux_hidden_state_layer_ids": [2, 18]}, 5, 36) == (
        2,
        18,
    )
    assert feature_layers({}, 5, 36) == (2, 10, 18, 26, 34)
    assert feature_layers({}, 3, 8) == (2, 4, 6)
    assert feature_layers({}, 1, 8) == (5,)
    assert feature_layers({"speculators_model_type": "dflash"}, 5, 36) == (2, 18, 33)


BROKEN = {
    "a tensor too many": (lambda t, c: t | {"layers.0.gate": t["norm.weight"] + 0}, "unexpected: layers.0.gate"),
    "a tensor missing": (lambda t, c: {k: v for k, v in t.items() if "down_proj" not in k}, "missing: layers.0.mlp.down"),
    "a norm missing": (lambda t, c: {k: v for k, v in t.items() if k != "norm.weight"}, "missing: norm.weight"),
    "fc of another width": (lambda t, c: t | {"fc.weight": t["fc.weight"][:, :64].clone()}, "fc reads 64 numbers, and 96"),
    "another vocabulary": (lambda t, c: c.update(vocab_size=99) or t, "99 tokens and the target's 104"),
    "a target of other depth": (lambda t, c: c.update(num_target_layers=36) or t, "target of 36 layers, and this one has 3"),
    "a narrower drafter": (
        lambda t, c: {k: v[:24].clone() if k == "fc.weight" else v for k, v in t.items()}, "cannot borrow the embedding"),
    "layers that are not there": (
        lambda t, c: c["dflash_config"].update(target_layer_ids=[0, 1, 9]) or t, "reads layers .1, 2, 10. of a target"),
    "no mask": (lambda t, c: c["dflash_config"].pop("mask_token_id") and t, "has no `mask_token_id`"),
    "a mask beyond the vocabulary": (
        lambda t, c: c["dflash_config"].update(mask_token_id=104) or t, r"`mask_token_id` \(104\) must be a token"),
    "an absurd block": (lambda t, c: c.update(block_size=10**6) or t, r"`block_size` \(1000000\) must lie between"),
    "a block of one": (lambda t, c: c.update(block_size=1) or t, r"`block_size` \(1\) must lie between"),
    "no window": (lambda t, c: c.update(sliding_window=0, use_sliding_window=True) or t, "`sliding_window` .0. must be"),
    "kinds of other layers": (lambda t, c: c.update(layer_types=["full_attention"]) or t, "names 1 layers, and its weights"),
    "layers of another kind": (lambda t, c: c.update(layer_types=["linear_attention"] * 2) or t, "of other kinds than"),
    "heads that turn in part": (lambda t, c: c.update(partial_rotary_factor=0.5) or t, "part of each head"),
    "angles that change": (lambda t, c: c.update(rope_scaling={"rope_type": "dynamic", "factor": 2.0}) or t, "depend on"),
    "heads that do not fit": (lambda t, c: c.update(num_attention_heads=7) or t, "does not divide"),
    "a d2t without a head": (lambda t, c: t | {"d2t": torch.arange(9)}, "no head of its own"),
    "a list for an object": (lambda t, c: c.update(dflash_config=[1, 2]) or t, "no DFlash drafter"),
    "words for layers": (lambda t, c: c["dflash_config"].update(target_layer_ids="abc") or t, "no DFlash drafter"),
    "DFlash 2": (
        lambda t, c: t | {"candidate_selector.predecessor_codebook": t["fc.weight"] + 0}, "a DFlash 2 drafter .a selector"),
    "DFlash 2 by its layers": (
        lambda t, c: t | {"layers.0.attention_conv.kernel_projection.weight": t["fc.weight"] + 0}, "a DFlash 2 drafter"),
    "DFlash 2 by its class": (lambda t, c: c.update(architectures=["DFlash2DraftModel"]) or t, "a DFlash 2 drafter"),
    "DSpark": (lambda t, c: t | {"markov_head.markov_w2.weight": t["fc.weight"] + 0}, "a DSpark drafter .a Markov head"),
    "DSpark by its name": (lambda t, c: c.update(speculators_model_type="dspark") or t, "a DSpark drafter"),
    "XPress": (lambda t, c: t | {"refiner.mix_l": t["fc.weight"] + 0}, "an XPress drafter"),
    "DFlare": (lambda t, c: t | {"layer_fusion_weights": t["fc.weight"] + 0}, "a DFlare drafter"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_refused(what, publish, tmp_path):
    folder = publish(NAMED["zlab"])
    change, message = BROKEN[what]
    config = json.loads((folder / "config.json").read_text())
    save_file(change(load_file(folder / "model.safetensors"), config), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        dream_hf.load_drafter(tmp_path, target_of("llama"))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_other_faults_are_one_line_too(publish, tmp_path):
    target, folder = target_of("llama"), publish(NAMED["zlab"])
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="can't be read as plain tensors"):
        dream_hf.load_drafter(tmp_path, target)
    with pytest.raises(ValueError, match="names layers; what can be said is feature_layers, drafts_from_anchor"):
        dream_hf.load_drafter(folder, target, wiring={"layers": (1, 2, 3)})
    drafter, other = dream_hf.load_drafter(folder, target), target_of("qwen3_vl")
    with pytest.raises(ValueError, match="trained for another target"):
        generate(other, family("qwen3_vl").make_inputs(other), assistant_model=drafter)
    with pytest.raises(ValueError, match=r"`tree_top_k` \(105\) must not exceed the 104 tokens"):
        generate(target, family("llama").make_inputs(target), assistant_model=drafter.with_settings(tree_top_k=105))


@pytest.mark.parametrize("name", ["zlab-sliding", "speculators-anchored-both-ways"])
def test_saved_and_loaded_it_says_the_same(name, publish, tmp_path):
    target = target_of("llama")
    drafter = dream_hf.load_drafter(publish(NAMED[name]), target)
    drafter.save_pretrained(tmp_path)
    again = dream_hf.load_drafter(tmp_path, target)
    inputs = family("llama").make_inputs(target)
    asked = [dream_hf.draft_log_probs(target, each, inputs, 5, [7, 7]) for each in (drafter, again)]
    assert isinstance(again, DFlashDrafter) and torch.equal(*asked)
    with pytest.raises(ValueError, match="is for published EAGLE and DFlash drafters"):
        dream_hf.load_drafter(tmp_path, target, wiring={"rope_theta": 3.0})


CONTAINER = {"speculators_model_type": "dflash", "aux_hidden_state_layer_ids": [1, 3]}
WIRED = {
    # name: the drafter as it is, what its config says instead, what is to be found
    "layers": ("zlab-default-layers", {"target_layer_ids": [0, 1]}, {"feature_layers": (2, 1)}),
    "a layer": ("zlab-causal", {"dflash_config": {"mask_token_id": reference.MASK, "target_layer_ids": [0, 0, 2]}},
                {"feature_layers": (1, 2, 3)}),
    "base": ("zlab-causal", {"rope_theta": 300.0}, {"rope_theta": 10000.0}),
    "the anchor": ("speculators-anchored", {"sample_from_anchor": False}, {"drafts_from_anchor": True}),
    "inside a block": ("zlab-causal", {"is_causal": None}, {"causal_layers": (0, 1)}),
    "from where a window counts": ("zlab-sliding", CONTAINER, {"is_window_anchored": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", WIRED)
def test_the_right_wiring_is_found_by_asking_the_target(case, tmp_path):
    name, instead, found = WIRED[case]
    layout = NAMED[name]
    target = family("llama").make_target()
    folder, inputs = layout.publish(tmp_path / "drafter"), family("llama").make_inputs(target)
    foretold_by(dream_hf.load_drafter(folder, target), target, inputs, levels=1, rounds=20)
    fields = {name: value for name, value in {**layout.fields(), **instead}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    probe = dream_hf.probe_drafter(folder, target, [inputs], num_tokens=21)
    assert found.items() <= probe.best.wiring.items()
    assert probe.best.agreement.gain > max(1.3, probe.trials[-1].agreement.gain)
    assert_same_tokens(
        generate(target, inputs, max_new_tokens=20),
        generate(target, inputs, max_new_tokens=20, assistant_model=probe.drafter),
    )
