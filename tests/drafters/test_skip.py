"""The target without some of its sublayers drafts for the whole: exact whatever is left out, right about all if nothing is."""

from __future__ import annotations

import json

import pytest
import torch
from distributions import tiny_llama
from double import TIGHT
from families import FAMILIES, INEXACT, family
from lossless import assert_counts_add_up, assert_same_tokens, gains, generate, seeded_runs, stop_tokens
from test_sampling import LIMIT, p_values
from transformers import AutoModelForCausalLM, GPT2Config

import dream_hf
from dream_hf import LayerSkipDrafter
from dream_hf.compat import CACHE, cache_of
from dream_hf.decoding.settings import DraftSettings
from dream_hf.drafters.skip.search import SkipSearch
from dream_hf.targets.sublayers import leaving_out, sublayers

NUM_NEW = 24
CHAIN = DraftSettings(tree_depth=4, tree_top_k=1)
TREE = DraftSettings(tree_depth=4, tree_top_k=3, tree_size=12)


@pytest.mark.parametrize("each", FAMILIES + INEXACT, ids=repr)
def test_every_family(each):
    target = each.make_target()
    batch = 3 if each.batch_is_exact else 1
    inputs = each.make_inputs(target, batch, text_len=24)
    expected = generate(target, inputs, max_new_tokens=NUM_NEW)

    def drafted(**how):
        out = generate(target, inputs, max_new_tokens=NUM_NEW, assistant_model=LayerSkipDrafter(target, **how))
        assert_same_tokens(expected, out)
        assert_counts_add_up(out)
        return out

    assert (
        gains(drafted(skip=[], settings=CHAIN)) == [[5, 5, 5, 5, 3]] * batch
    )  # all that was drafted, up to the limit
    drafted(skip=list(sublayers(dream_hf.targets.target.Target(target).decoder)), settings=TREE)
    out = drafted(settings=TREE)  # searching
    for cache, plain in zip(cache_of(out).layers, cache_of(expected).layers, strict=True):
        if plain.keys is not None and each.batch_is_exact:
            torch.testing.assert_close(cache.keys, plain.keys, **TIGHT)
    assert all("forward" not in vars(module) for module in target.modules())


def test_keys_that_other_layers_read_are_never_left_out():
    target = family("gemma4_shared").make_target()
    found = sublayers(dream_hf.targets.target.Target(target).decoder)
    layers = target.config.get_text_config().num_hidden_layers
    assert len([name for name in found if name.endswith("mlp")]) == layers
    kept = {f"{index}.attention" for index in range(layers)} - found.keys()
    storing = {
        f"{index}.attention"
        for index, layer in enumerate(target.get_decoder().layers)
        if getattr(layer.self_attn, "store_full_length_kv", False)
    }
    assert kept == storing and storing


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llava_clip_llama", "gemma3", "qwen2_vl"])
def test_stops_processors_and_seeds(name, batch):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch, text_len=24)
    known = generate(target, inputs).sequences
    for settings in ({"eos_token_id": stop_tokens(known)}, {"repetition_penalty": 1.4}, {"max_new_tokens": 2}):
        expected = generate(target, inputs, **settings)
        drafter = LayerSkipDrafter(target, skip=["1.mlp"], settings=TREE)
        assert_same_tokens(expected, generate(target, inputs, assistant_model=drafter, **settings))
    drafters = [LayerSkipDrafter(target, seed=3, settings=TREE) for _ in range(2)]
    runs = seeded_runs(target, inputs, drafters)
    assert torch.equal(runs[0].sequences, runs[1].sequences) and gains(runs[0]) == gains(runs[1])
    assert (
        drafters[0].skip == drafters[1].skip
        and drafters[0].choice.search.num_tries == drafters[1].choice.search.num_tries > 0
    )


def test_samples_have_the_target_s_distribution():
    target = tiny_llama()
    drafter = LayerSkipDrafter(target, skip=["0.mlp"], settings=DraftSettings(tree_depth=3, tree_top_k=2, tree_size=6))
    assert min(p_values(target, drafter, temperature=1.0)) > LIMIT


def test_chats_go_on():
    target = family("llama").make_target()
    first = family("llama").make_inputs(target, 1)
    drafter = LayerSkipDrafter(target, skip=[1], settings=TREE)
    ours = generate(target, first, max_new_tokens=NUM_NEW, assistant_model=drafter)
    ids = torch.cat([ours.sequences, first["input_ids"][:, -5:]], dim=1)
    cache = {CACHE: cache_of(ours)}
    expected = generate(target, {"input_ids": ids})
    assert_same_tokens(expected, generate(target, {"input_ids": ids}, assistant_model=drafter, **cache))


def test_what_is_left_out_adds_nothing():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    layers = target.model.layers
    everything = frozenset(sublayers(target.model).values())
    assert len(everything) == 2 * len(layers)
    with leaving_out(everything):
        skipped = target(**inputs).logits
    bare = target.lm_head(target.model.norm(target.get_input_embeddings()(inputs["input_ids"])))
    torch.testing.assert_close(skipped, bare)
    assert not torch.allclose(target(**inputs).logits, bare)


def test_numbers_that_drafts_spoil_stay_where_they_are(monkeypatch):
    """A draft may overflow; what it wrote must not reach a row that is shorter than others."""
    from dream_hf.decoding.target_forward import TargetForward

    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target, 3)
    expected = generate(target, inputs)
    draft = TargetForward.draft

    def spoiling(self, *args):
        outputs = draft(self, *args)
        for layer in self.layers:
            start, end = self.slots.shortest, self.slots.end
            for row, length in enumerate(self.slots.lengths):
                layer.values[row, :, max(length, start) : end] = torch.nan
        return outputs

    monkeypatch.setattr(TargetForward, "draft", spoiling)
    drafter = LayerSkipDrafter(target, skip=["1.mlp"], settings=TREE)
    out = generate(target, inputs, assistant_model=drafter)
    assert_same_tokens(expected, out)
    assert len({len(row) for row in gains(out)}) > 1  # rows have stood at different places


def test_the_search_finds_what_can_be_spared():
    target = family("llama").make_target()
    with torch.no_grad():  # all layers but the first do nothing
        for layer in target.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    inputs = family("llama").make_inputs(target)
    num_layers = len(target.model.layers)
    drafter = LayerSkipDrafter(target, ratio=(num_layers - 1) / num_layers, settings=TREE, seed=1)
    before = drafter.choice.search.best
    for _ in range(4):
        assert_same_tokens(generate(target, inputs), generate(target, inputs, assistant_model=drafter))
    assert drafter.choice.search.is_over and drafter.choice.search.best_match >= 0.98
    assert not {name for name in drafter.skip if name.startswith("0.")}
    assert drafter.choice.search.num_tries > 1 or drafter.choice.search.best == before


def test_tries_are_seeded_and_keep_their_size():
    names = [f"{layer}.{part}" for layer in range(10) for part in ("attention", "mlp")]
    searches = [SkipSearch(names, ratio=0.4, seed=7) for _ in range(2)]
    for step in range(30):
        tried = [search.candidate() for search in searches]
        assert tried[0] == tried[1] and len(tried[0]) == 8 and tried[0] <= set(names)
        for search, candidate in zip(searches, tried, strict=True):
            search.note(candidate, (step * 7 % 11) / 20)
    assert searches[0].best_match == 0.5 and not {"0.mlp", "9.mlp"} & SkipSearch(names).best


def test_the_set_is_kept_in_a_file(tmp_path):
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    path = tmp_path / "deep" / "skip.json"
    drafter = LayerSkipDrafter(target, path=path, settings=TREE)
    generate(target, inputs, assistant_model=drafter)
    again = LayerSkipDrafter(target, path=path)
    assert again.skip == drafter.skip and again.choice.search.is_over
    assert json.loads(path.read_text())["skip"] == sorted(drafter.skip)
    assert [file.name for file in path.parent.iterdir()] == ["skip.json"]
    with pytest.raises(ValueError, match=r"`path` .* was written for the target"):
        LayerSkipDrafter(family("gemma2").make_target(), path=path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds no set of sublayers"):
        LayerSkipDrafter(target, path=path)


def test_what_cannot_be_is_refused():
    target = family("llama").make_target()
    with pytest.raises(ValueError, match=r"`skip` names '9.mlp'; the target's sublayers are 0.attention, 0.mlp"):
        LayerSkipDrafter(target, skip=["9.mlp"])
    with pytest.raises(ValueError, match=r"`ratio` \(1.0\)"):
        LayerSkipDrafter(target, ratio=1.0)
    other = family("llama").make_target(seed=1)
    with pytest.raises(ValueError, match="asked to draft for another model"):
        generate(other, family("llama").make_inputs(other), assistant_model=LayerSkipDrafter(target))
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    assert len(LayerSkipDrafter(gpt2, skip=[0, 1]).skip) == 4  # layers by another name
    assert LayerSkipDrafter(target, skip=[1]).skip == ["1.attention", "1.mlp"]
    with pytest.raises(ValueError, match=r"keeps to itself\. Pass it to `generate\(assistant_model=\.\.\.\)`"):
        target.generate(
            **family("llama").make_inputs(target),
            max_new_tokens=8,
            custom_generate=dream_hf.dream_chain_generate,
            drafter=LayerSkipDrafter(target),
        )
