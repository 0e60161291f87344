"""The tiny targets are fit to test with: they run, their batches are exact, their pictures matter and their tokens vary."""

import families
import pytest
import torch
from double import TIGHT
from families import FAMILIES, HYBRIDS, INEXACT, Family, Inputs, Target
from family_configs import IMAGE, PLACEHOLDERS, VIDEO
from torch import Tensor

EVERY = FAMILIES + HYBRIDS + INEXACT
each_family = pytest.mark.parametrize("family", EVERY, ids=repr)
WITH_PICTURES = [family for family in EVERY if family.takes_images]
ALTERNATING = [
    "gemma3", "gemma4", "gemma4_shared", "paligemma2", "qwen2_vl_sliding", "aya_vision", "llama4", "gemma2"
]  # fmt: skip


def new_tokens(target: Target, inputs: Inputs, num_tokens: int = 8) -> Tensor:  # (rows, num_tokens)
    sequences = target.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    assert sequences.shape[1] == inputs["input_ids"].shape[1] + num_tokens
    return sequences[:, -num_tokens:]


def first_logits(target: Target, inputs: Inputs) -> Tensor:  # (rows, vocabulary)
    logits: list[Tensor] = []  # in the target's dtype: `generate()` returns them in float32
    with target.register_forward_hook(lambda module, arguments, out: logits.append(out.logits[:, -1])):
        target.generate(**inputs, max_new_tokens=1, do_sample=False)
    return logits[0]


def rows_alone(family: Family, target: Target, num_tokens: int = 8, **prompt) -> tuple[Tensor, Tensor]:
    """Decode three ragged rows together and each alone."""
    rows = family.make_rows(target, 3, **prompt)
    together = new_tokens(target, family.collate(rows), num_tokens)
    return together, torch.cat([new_tokens(target, row, num_tokens) for row in rows])


@pytest.mark.parametrize("family", FAMILIES + HYBRIDS, ids=repr)
def test_padded_rows_decode_as_alone(family):
    target = family.make_target()
    inputs = family.make_inputs(target, 3)
    assert len(set(inputs["attention_mask"].sum(1).tolist())) == 3
    assert inputs["attention_mask"][:, -1].all()
    together, alone = rows_alone(family, target)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("family", INEXACT, ids=repr)
def test_inexact_families_say_why(family):
    assert family.note and not family.batch_is_exact
    target = family.make_target()
    rows = family.make_rows(target, 3)
    together = first_logits(target, family.collate(rows))
    alone = torch.cat([first_logits(target, row) for row in rows])
    torch.testing.assert_close(together[0], alone[0], **TIGHT)  # the one row without padding
    assert ((together - alone)[1:].abs().amax(1) > 1e-2).all()


@pytest.mark.parametrize("images", [0, 2, [1, 0, 2]], ids=["none", "two", "mixed"])
@pytest.mark.parametrize("family", [family for family in WITH_PICTURES if family.batch_is_exact], ids=repr)
def test_any_number_of_pictures(family, images):
    if not (family.supports_no_image and family.supports_multi_image):
        pytest.skip(family.note)
    target = family.make_target()
    together, alone = rows_alone(family, target, images=images)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("family", WITH_PICTURES, ids=repr)
def test_the_picture_changes_the_first_token(family):
    target = family.make_target()
    inputs = family.make_inputs(target)
    change = first_logits(target, inputs | {"pixel_values": -inputs["pixel_values"]}) - first_logits(target, inputs)
    assert change.abs().max() > 0.1


@pytest.mark.parametrize("family", WITH_PICTURES, ids=repr)
def test_each_of_two_pictures_matters(family):
    # Logits of every position: with sliding windows only, the first picture is out of the last token's reach.
    target = family.make_target()
    inputs = family.make_inputs(target, images=2)
    before = target(**inputs).logits
    for entry in (0, -1):
        pixels = inputs["pixel_values"].clone()
        pixels.select(family.pictures_axis, entry).mul_(-1)
        assert (target(**inputs | {"pixel_values": pixels}).logits - before).abs().max() > 1e-2


@pytest.mark.parametrize("family", [family for family in EVERY if family.make_video_inputs], ids=repr)
def test_clips(family):
    target = family.make_target()
    inputs = family.make_video_inputs(target, 3)
    assert (inputs["input_ids"] == VIDEO).any(1).all() and not (inputs["input_ids"] == IMAGE).any()
    before = first_logits(target, inputs)
    clip = {"pixel_values_videos": -inputs["pixel_values_videos"]}
    assert ((first_logits(target, inputs | clip) - before).abs().amax(1) > 1e-2).all()
    assert family.make_video_inputs(target)["input_ids"].shape[0] == 1


@each_family
def test_tokens_vary_and_logits_are_apart(family):
    target = family.make_target()
    inputs = family.make_inputs(target, 3)
    out = target.generate(
        **inputs, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = out.sequences[:, -24:]
    assert all(len(set(row)) >= 6 for row in tokens.tolist())
    assert len(set(map(tuple, tokens.tolist()))) == 3
    assert not torch.isin(tokens, torch.tensor(PLACEHOLDERS)).any()
    best = torch.stack(out.logits).topk(2, dim=-1).values  # (steps, rows, 2)
    assert (best[..., 0] - best[..., 1]).median() > 0.05


@each_family
def test_eager_attention_agrees(family):
    target = family.make_target()
    implementation = target.get_decoder().config._attn_implementation
    assert implementation == ("sdpa" if family.supports_sdpa else "eager")
    inputs = family.make_inputs(target, 3)
    eager = family.make_target(attn_implementation="eager")
    torch.testing.assert_close(first_logits(eager, inputs), first_logits(target, inputs), **TIGHT)


@each_family
def test_targets_depend_on_the_seed_alone(family):
    first = family.make_target()
    torch.rand(1)  # another global state
    state = torch.random.get_rng_state()
    again, other = family.make_target(), family.make_target(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = first.state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert not torch.equal(other.get_output_embeddings().weight, first.get_output_embeddings().weight)
    assert not first.training and not any(parameter.requires_grad for parameter in first.parameters())
    inputs, same = family.make_inputs(first, 2), family.make_inputs(first, 2)
    assert all(torch.equal(same[name], value) for name, value in inputs.items())
    assert not torch.equal(family.make_inputs(first, seed=1)["input_ids"], inputs["input_ids"][:1])


@each_family
def test_half_precision_rounds_the_same_weights(family):
    target = family.make_target(dtype=torch.bfloat16)
    head = family.make_target().get_output_embeddings().weight
    torch.testing.assert_close(target.get_output_embeddings().weight.double(), head, rtol=2**-7, atol=1e-6)
    assert first_logits(target, family.make_inputs(target, 3)).isfinite().all()


@pytest.mark.parametrize("name", ALTERNATING)
def test_narrow_layers_alternate_with_full_ones(name):
    kinds = families.family(name).make_target().get_decoder().config.layer_types
    assert "full_attention" in kinds and len(set(kinds)) == 2


def test_family_looks_up_every_list_and_names_what_exists():
    assert all(families.family(family.name) is family for family in EVERY)
    with pytest.raises(KeyError, match="llava_clip_llama"):
        families.family("absent")


def test_text_only_families_refuse_pictures():
    llama = families.family("llama")
    with pytest.raises(ValueError, match="takes no such visual"):
        llama.make_rows(llama.make_target(), images=[1])
