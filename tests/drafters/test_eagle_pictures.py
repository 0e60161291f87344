"""EAGLE drafters that read pictures (MSD, ViSpec): any number of them, in later turns, in every wiring, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from eagle_reference import LAYOUTS, VOCAB
from families import family
from lossless import assert_same_tokens, generate
from safetensors.torch import load_file, save_file
from test_eagle import NAMED, PATH, Watch, drafter_for, expected_log_probs, publish, target_of

import dream_hf
from dream_hf.compat import CACHE, cache_of

__all__ = ["publish"]  # a fixture

READING_PICTURES = [each for each in LAYOUTS if each.image_rows != "token"]


@pytest.mark.parametrize("num_pictures", [0, 2])
@pytest.mark.parametrize("layout", READING_PICTURES, ids=repr)
def test_any_number_of_pictures(layout, num_pictures, publish):
    """None, or two with text between them."""
    target, folder = publish(layout)
    drafter = dream_hf.load_drafter(folder, target)
    inputs = with_pictures(family(layout.family), target, num_pictures)
    said = dream_hf.draft_log_probs(target, drafter, inputs, 5, PATH)
    expected = expected_log_probs(layout, target, inputs, 5)
    torch.testing.assert_close(said.double(), expected, rtol=1e-5, atol=1e-4)


TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")


def joined(first, second):
    """Inputs of one row each behind one another."""
    tokens = {name: first[name].new_zeros(1, second["input_ids"].shape[1]) for name in TEXT if name in first}
    own = second["input_ids"].shape[1]
    for name, values in tokens.items():
        given = second[name]
        values[:, own - given.shape[1] :] = given
    tokens["attention_mask"] = torch.ones_like(second["input_ids"])
    both = {name: torch.cat([first[name], tokens[name]], dim=1) for name in tokens}
    return both | {name: torch.cat([first[name], second[name]]) for name in first if name not in TEXT}


def with_pictures(kind, target, num_pictures):
    """Inputs of one row in which text stands between two pictures."""
    if num_pictures < 2:
        return kind.make_inputs(target, images=num_pictures)
    return joined(kind.make_inputs(target), kind.make_inputs(target, seed=1))


class WatchState(Watch):
    """One whose last session is kept, too."""

    def start(self, prefill, settings):
        self.session = super().start(prefill, settings)
        return self.session

    def read(self):
        """Keys and values of all rows that were read."""
        state = self.session.state
        return [
            part[:, :, : state.slots.longest] for part in (state.cache.layers[0].keys, state.cache.layers[0].values)
        ]


@pytest.mark.parametrize("layout", [NAMED["vispec"], NAMED["msd"]], ids=repr)
def test_a_second_picture_in_a_later_turn(layout, publish):
    """What was read of the first picture holds until the second comes (a LLaVA: Qwen's positions want all pictures anew)."""
    kind, target = family(layout.family), target_of(layout.family)
    watch = WatchState(drafter_for(layout, layout.family, publish))
    first, more = kind.make_inputs(target), kind.make_inputs(target, seed=1)
    answer = generate(target, first, max_new_tokens=20, assistant_model=watch)
    num_new = answer.sequences.shape[1] - first["input_ids"].shape[1]
    more = {**more, "input_ids": torch.cat([answer.sequences[:, -num_new:], more["input_ids"]], dim=1)}
    whole = joined(first, more)
    expected = generate(target, whole, max_new_tokens=20)
    watch.trees.clear()
    later = {"input_ids": whole["input_ids"], "pixel_values": more["pixel_values"]}
    out = generate(target, later, max_new_tokens=20, assistant_model=watch, **{CACHE: cache_of(answer)})
    anew = WatchState(drafter_for(layout, layout.family, publish))
    assert_same_tokens(expected, generate(target, whole, max_new_tokens=20, assistant_model=anew))
    assert_same_tokens(expected, out)
    assert torch.equal(watch.trees[0][1].tokens, anew.trees[0][1].tokens)
    for ours, theirs in zip(watch.read(), anew.read(), strict=True):  # it has read the whole text
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows", ["token", "merged", "direct"])
@pytest.mark.parametrize("name", ["vispec", "msd", "eagle3"])
def test_wiring_says_what_is_read_of_pictures(name, rows, publish):
    target, folder = target_of("llava_clip_llama"), publish(NAMED[name])[1]
    wiring = {"image_rows": rows}
    if (name, rows) == ("eagle3", "direct"):
        with pytest.raises(ValueError, match="`generation` 3 has no rows past its `fc`"):
            dream_hf.load_drafter(folder, target, wiring=wiring)
        return
    drafter = dream_hf.load_drafter(folder, target, wiring=wiring)
    inputs = family("llava_clip_llama").make_inputs(target)
    said = dream_hf.draft_log_probs(target, drafter, inputs, 5, PATH)
    expected = expected_log_probs(replace(NAMED[name], image_rows=rows), target, inputs, 5)
    torch.testing.assert_close(said[said.isfinite()].double(), expected[expected.isfinite()], rtol=1e-5, atol=1e-4)


def test_an_embedding_for_the_tokens_of_the_original_llava(publish, tmp_path):
    """Hugging Face's has 64 more, or here 4; what was trained stays as it was."""
    target, folder = publish(NAMED["msd"])
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"][: VOCAB - 4].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB - 4}))
    drafter = dream_hf.load_drafter(tmp_path, target)
    inputs = family("llava_clip_llama").make_inputs(target)
    expected = dream_hf.draft_log_probs(target, dream_hf.load_drafter(folder, target), inputs, 5, PATH)
    assert torch.equal(dream_hf.draft_log_probs(target, drafter, inputs, 5, PATH), expected)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB - 70}))
    with pytest.raises(ValueError, match="its vocabulary has 34 tokens and the target's 104"):
        dream_hf.load_drafter(tmp_path, target)


BROKEN_VISPEC = {
    "no queries": (lambda t: t.pop("imadpt.q"), r"unexpected: image_"),
    "queries of another form": (lambda t: t.update({"imadpt.q": t["imadpt.q"].flatten(1)}), r"imadpt\.q is of shape \(2, 32\)"),
    "queries of other heads": (lambda t: t.update({"imadpt.q": t["imadpt.q"][:, :2].clone()}), "image_adaptor.queries"),
    "no img_fc": (lambda t: t.pop("img_fc.weight"), "missing: image_fc.weight"),
    "a narrow img_fc": (lambda t: t.update({"img_fc.weight": t["img_fc.weight"][:, :32].clone()}), "image_fc.weight"),
    "no bias": (lambda t: t.pop("img_fc.bias"), "missing: image_fc.bias"),
    "no values": (lambda t: t.pop("imadpt.v_proj.weight"), "missing: image_adaptor.v_proj.weight"),
    "a key that is not known": (lambda t: t.update({"imadpt.gate": t["fc.bias"] + 0}), "unexpected: image_adaptor.gate"),
    "a narrow fc": (lambda t: t.update({"fc.weight": t["fc.weight"][:, :32].clone()}), "fc reads 32 numbers, and 64"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN_VISPEC)
def test_what_is_refused_of_vispec(what, publish, tmp_path):
    target, folder = publish(NAMED["vispec"])
    change, message = BROKEN_VISPEC[what]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=message) as error:
        dream_hf.load_drafter(tmp_path, target)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
