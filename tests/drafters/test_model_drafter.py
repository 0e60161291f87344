"""A smaller model that drafts for the target: exact whatever it says, and right about all where it is the target itself."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from distributions import tiny_llama
from families import FAMILIES, INEXACT, family
from lossless import assert_counts_add_up, assert_same_tokens, gains, generate, seeded_runs, stop_tokens
from test_sampling import LIMIT, p_values
from transformers import AutoModelForCausalLM, LogitsProcessorList
from transformers.generation import NoRepeatNGramLogitsProcessor

from dream_hf import ModelDrafter
from dream_hf.compat import CACHE, cache_of
from dream_hf.decoding.drafter import DrafterAround
from dream_hf.decoding.settings import DraftSettings

NUM_NEW = 20
CHAIN = DraftSettings(tree_depth=4, tree_top_k=1)
TREE = DraftSettings(tree_depth=4, tree_top_k=3, tree_size=12)


def nearly(target, noise=0.05, seed=0):
    """A model that says much the same: the target with noise on its weights."""
    model, generator = copy.deepcopy(target), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            parameter.add_(noise * spread * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def text_model(target):
    """A text-only model of the target's vocabulary."""
    config = family("llama").make_config()
    config.vocab_size = target.config.get_text_config().vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("each", FAMILIES, ids=repr)
def test_every_family(each):
    target = each.make_target()
    inputs = each.make_inputs(target, 3, images=[1, 0, 2] if each.takes_images else 0, text_len=24)
    expected = generate(target, inputs, max_new_tokens=NUM_NEW)
    itself = generate(target, inputs, max_new_tokens=NUM_NEW, assistant_model=ModelDrafter(target, settings=CHAIN))
    assert_same_tokens(expected, itself)
    assert gains(itself) == [[5, 5, 5, 4]] * 3  # all that was drafted, up to the limit
    other = generate(
        target, inputs, max_new_tokens=NUM_NEW, assistant_model=ModelDrafter(nearly(target), settings=TREE)
    )
    assert_same_tokens(expected, other)
    assert_counts_add_up(other)
    assert max(map(max, gains(other))) > 1
    if each.takes_images:
        blind = ModelDrafter(text_model(target), settings=TREE)
        assert_same_tokens(expected, generate(target, inputs, max_new_tokens=NUM_NEW, assistant_model=blind))


@pytest.mark.parametrize("each", INEXACT, ids=repr)
def test_families_whose_padded_batches_are_inexact(each):
    target = each.make_target()
    inputs = each.make_inputs(target, text_len=40)
    out = generate(target, inputs, assistant_model=ModelDrafter(target, settings=CHAIN))
    assert_same_tokens(generate(target, inputs), out)
    assert set(gains(out)[0][:-1]) == {5}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llava_clip_llama", "gemma3", "qwen2_vl"])
def test_stops_processors_and_seeds(name, batch):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch, text_len=24)
    known = generate(target, inputs).sequences
    drafter = ModelDrafter(nearly(target), settings=TREE)
    for settings in (
        {"eos_token_id": stop_tokens(known)},
        {"repetition_penalty": 1.4, "logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])},
        {"max_new_tokens": 2},
    ):
        expected = generate(target, inputs, **settings)
        assert_same_tokens(expected, generate(target, inputs, assistant_model=drafter, **settings))
    runs = seeded_runs(target, inputs, [drafter, drafter])
    assert torch.equal(runs[0].sequences, runs[1].sequences) and gains(runs[0]) == gains(runs[1])


def test_samples_have_the_target_s_distribution():
    target = tiny_llama()
    drafter = ModelDrafter(nearly(target, 0.3), settings=DraftSettings(tree_depth=3, tree_top_k=2, tree_size=6))
    assert min(p_values(target, drafter, temperature=1.0)) > LIMIT


@pytest.mark.parametrize("name", ["llama", "llava_clip_llama", "gemma3", "qwen2_vl"])
def test_chats_go_on(name):
    """In and out of inference mode; the picture of the first turn is remembered, so that all drafts are right."""
    target = family(name).make_target()
    first = {key: torch.cat([value] * 2) for key, value in family(name).make_inputs(target, 1).items()}
    drafter = ModelDrafter(target, settings=CHAIN)
    with torch.inference_mode():
        ours = generate(target, first, max_new_tokens=NUM_NEW, assistant_model=drafter)
    ids, cache = torch.cat([ours.sequences, first["input_ids"][:, -5:]], dim=1), cache_of(ours)
    for mode in (False, True, False):
        longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole = {**first, **longer}
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in whole:
                whole[key] = torch.nn.functional.pad(whole[key], (0, ids.shape[1] - whole[key].shape[1]))
        expected = generate(target, whole, max_new_tokens=NUM_NEW)
        types = {key: whole[key] for key in ("token_type_ids", "mm_token_type_ids") if key in whole}
        with torch.inference_mode(mode):
            out = generate(
                target, {**longer, **types}, max_new_tokens=NUM_NEW, assistant_model=drafter, **{CACHE: cache}
            )
        assert_same_tokens(expected, out)
        assert gains(out) == [[5, 5, 5, 4]] * 2
        ids, cache = torch.cat([out.sequences, first["input_ids"][:, -4:]], dim=1), cache_of(out)


def test_a_turn_with_a_picture_of_its_own_is_read_anew():
    each = family("llava_clip_llama")
    target = each.make_target()
    first, second = each.make_inputs(target, 1), each.make_inputs(target, 1, seed=5)
    drafter = ModelDrafter(target, settings=TREE)
    ours = generate(target, first, max_new_tokens=NUM_NEW, assistant_model=drafter)
    ids = torch.cat([ours.sequences, second["input_ids"]], dim=1)
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    expected = generate(target, {"input_ids": ids, "pixel_values": pixels})
    turn = {"input_ids": ids, "pixel_values": second["pixel_values"]}
    assert_same_tokens(expected, generate(target, turn, assistant_model=drafter, **{CACHE: cache_of(ours)}))


@pytest.mark.parametrize("batch", [1, 2])
def test_prompts_without_tokens(batch):
    target = family("llama").make_target()
    ids = family("llama").make_inputs(target, 1)["input_ids"].repeat(batch, 1)
    inputs = {"inputs_embeds": target.get_input_embeddings()(ids)}
    drafter = ModelDrafter(target, settings=TREE)
    assert_same_tokens(generate(target, inputs), generate(target, inputs, assistant_model=drafter))


def test_a_pause_is_read_in_one_go():
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target, 3)
    drafter = ModelDrafter(text_model(target)).with_settings(pause_below=1.5)
    out = generate(target, inputs, assistant_model=drafter)
    assert_same_tokens(generate(target, inputs), out)
    assert (out.drafted_lengths == 0).any() and (out.drafted_lengths > 0).any()


def test_other_vocabularies_and_pictures_are_refused():
    each = family("qwen2_vl")
    target = each.make_target()
    inputs = each.make_inputs(target)
    config = each.make_config()
    config.vision_config.spatial_merge_size = 1
    coarser = type(target)(config)
    with pytest.raises(
        ValueError, match=r"`vision_config.spatial_merge_size` is 1 and the target's 2.*`use_pictures=False`"
    ):
        generate(target, inputs, assistant_model=ModelDrafter(coarser))
    blind = ModelDrafter(coarser, use_pictures=False)
    assert_same_tokens(generate(target, inputs), generate(target, inputs, assistant_model=blind))
    other = family("llava_clip_llama").make_target()
    with pytest.raises(ValueError, match="it is a 'llava' and the target a 'qwen2_vl'"):
        generate(target, inputs, assistant_model=ModelDrafter(other))
    config = family("llama").make_config()
    config.vocab_size += 5000
    larger = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"has a vocabulary of \d+ tokens and the target one of \d+"):
        generate(target, inputs, assistant_model=ModelDrafter(larger))
    with pytest.raises(ValueError, match=r"`tree_top_k` \(100000\) must not exceed"):
        generate(target, inputs, assistant_model=ModelDrafter(target).with_settings(tree_top_k=100_000))
    with pytest.raises(ValueError, match=r"`model` cannot draft: .*keeps a state"):
        ModelDrafter(family("lfm2_vl").make_target())


def test_nothing_of_a_call_stays_alive():
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    sessions = []

    class Watching(DrafterAround):
        def start(self, prefill, settings):
            session = super().start(prefill, settings)
            sessions.append(weakref.ref(session))
            return session

    generate(target, inputs, assistant_model=Watching(ModelDrafter(target, settings=CHAIN)))
    gc.collect()
    assert sessions[0]() is None
    assert "forward" not in vars(target)
