"""Where drafted tokens might reach what plain decoding does not: other angles, missing positions, NaN embeddings."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers as hf
from families import Inputs, Target, family
from lossless import CHAIN, assert_same_tokens, generate, oracle

import dream_hf
from dream_hf import DreamDrafter

TINY = {
    "vocab_size": 104,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
NUM_POSITIONS = 32
PROMPT = 18
SHAPES: list[dict[str, Any]] = [{}, CHAIN, {"tree_depth": 12}, {"pause_below": 3.0}]


def make_target(model_class: Any, config: Any) -> Target:
    """A target in float64 whose weights have spread and which knows no end."""
    target = model_class._from_config(config, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in target.parameters():
            if weight.ndim > 1:
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_(2 * noise / weight.shape[-1] ** 0.5)
    target.generation_config = hf.GenerationConfig(pad_token_id=0, eos_token_id=None)
    return target


def make_inputs(batch_size: int, length: int = PROMPT) -> Inputs:
    """Prompts of `length` tokens, the second and third row padded on the left."""
    ids = torch.randint(5, 90, (batch_size, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(batch_size):
        mask[row, : 5 * row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def dynamic() -> Target:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = hf.LlamaConfig(**TINY, max_position_embeddings=NUM_POSITIONS, rope_parameters=rope)
    return make_target(hf.LlamaForCausalLM, config)


def longrope() -> Target:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope["original_max_position_embeddings"] = NUM_POSITIONS
    config = hf.LlamaConfig(**TINY, max_position_embeddings=128, rope_parameters=rope)
    return make_target(hf.LlamaForCausalLM, config)


def dynamic_by_layer_type() -> Target:
    full = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    config = hf.Gemma3TextConfig(
        **TINY, head_dim=8, num_key_value_heads=2, max_position_embeddings=NUM_POSITIONS, rope_parameters=rope,
        sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return make_target(hf.Gemma3ForCausalLM, config)


@pytest.mark.parametrize("length", [PROMPT, NUM_POSITIONS - 1, NUM_POSITIONS + 8])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("make", [dynamic, longrope, dynamic_by_layer_type])
def test_angles_that_depend_on_the_length(make, batch_size, length):
    """Transformers remembers the longest text it has seen: every call gets a target that has seen none."""
    target, inputs = make(), make_inputs(batch_size, length)
    expected = generate(deepcopy(target), inputs, max_new_tokens=28)
    for shape in SHAPES:
        drafter, _ = oracle(target, inputs, expected.sequences, **shape)
        assert_same_tokens(expected, generate(deepcopy(target), inputs, max_new_tokens=28, assistant_model=drafter))


def gpt2() -> Target:
    config = hf.GPT2Config(vocab_size=104, n_embd=32, n_layer=2, n_head=4, n_positions=NUM_POSITIONS)
    return make_target(hf.GPT2LMHeadModel, config)


def gptj() -> Target:
    config = hf.GPTJConfig(vocab_size=104, n_embd=32, n_layer=2, n_head=4, n_positions=NUM_POSITIONS, rotary_dim=4)
    return make_target(hf.GPTJForCausalLM, config)


def opt() -> Target:
    config = hf.OPTConfig(**TINY, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=NUM_POSITIONS)
    return make_target(hf.OPTForCausalLM, config)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("make", [gpt2, gptj, opt])
def test_drafts_end_at_the_last_position(make, batch_size):
    """The last token is never read, so that a text may have one more than there are positions."""
    target, inputs = make(), make_inputs(batch_size)
    longest = generate(target, inputs, max_new_tokens=None, max_length=NUM_POSITIONS + 1)
    for shape in SHAPES:
        drafter, _ = oracle(target, inputs, longest.sequences, **shape)
        for max_length in (NUM_POSITIONS, NUM_POSITIONS + 1):
            limit = {"max_new_tokens": None, "max_length": max_length}
            expected = generate(target, inputs, **limit)
            assert_same_tokens(expected, generate(target, inputs, **limit, assistant_model=drafter))


@pytest.mark.parametrize("make", [gpt2, gptj, opt])
def test_a_text_that_ends_just_before_the_last_position(make):
    """It may be longer, for all the settings say; plain decoding never gets there, and no draft does."""
    target, inputs = make(), make_inputs(1)
    longest = generate(target, inputs, max_new_tokens=None, max_length=NUM_POSITIONS + 1)
    end = longest.sequences[0, PROMPT:].tolist()
    last = max(end, key=end.index)  # the token that it writes for the first time last
    settings = {"max_new_tokens": 100, "eos_token_id": last}
    for shape in SHAPES:
        drafter, _ = oracle(target, inputs, longest.sequences, **shape)
        actual = generate(target, inputs, **settings, assistant_model=drafter)
        assert_same_tokens(generate(target, inputs, **settings), actual)
        chains = {"custom_generate": dream_hf.dream_chain_generate, "drafter": drafter}
        assert torch.equal(generate(target, inputs, **settings, **chains).sequences, actual.sequences)


def test_positions_that_a_family_takes_from_the_cache():
    """EXAONE 4.5 drops `position_ids` in decoding; a token's position is then its slot, padding included."""
    text = TINY | {
        "num_key_value_heads": 2,
        "model_type": "exaone4",
        "max_position_embeddings": 128,
        "sliding_window": 8,
    }
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "depth": 1, "num_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    config = hf.Exaone4_5_Config(text_config=text, vision_config=vision | {"out_hidden_size": 32})
    target = make_target(hf.Exaone4_5_ForConditionalGeneration, config)
    for batch_size in (1, 3):
        inputs = make_inputs(batch_size)
        expected = generate(target, inputs, max_new_tokens=24)
        for shape in SHAPES[:2]:
            drafter, _ = oracle(target, inputs, expected.sequences, **shape)
            assert_same_tokens(expected, generate(target, inputs, max_new_tokens=24, assistant_model=drafter))


@pytest.mark.parametrize("name", ["llama", "llava_clip_llama"])
def test_nan_embeddings_of_tokens_that_are_never_written(name):
    """A masked key weighs nothing, and nothing times NaN is NaN."""
    target = family(name).make_target(dtype=torch.float64)
    inputs = family(name).make_inputs(target, 3)
    expected = generate(target, inputs, max_new_tokens=24)
    drafter, _ = oracle(target, inputs, expected.sequences)  # it drafts wrong tokens now and then
    generate(target, inputs, max_new_tokens=4, assistant_model=drafter)  # what changes afterwards is seen
    read = torch.cat([expected.sequences.flatten(), inputs["input_ids"].flatten()]).unique()
    unread = torch.ones(target.config.get_text_config().vocab_size, dtype=torch.bool).index_fill(0, read, False)
    with torch.no_grad():
        target.get_input_embeddings().weight[unread] = float("nan")
    assert_same_tokens(expected, generate(target, inputs, max_new_tokens=24, assistant_model=drafter))


@pytest.mark.parametrize("setting", ["wrapped", "config without cache", "not checkpointing"])
def test_settings_of_a_target_that_change_nothing(setting):
    target: Any = family("llava_clip_llama").make_target(dtype=torch.float64)
    inputs = family("llava_clip_llama").make_inputs(target, 2)
    drafter = DreamDrafter.for_target(target)
    match setting:
        case "wrapped":  # its `generate()` is the model's own
            target = torch.compile(target, backend="eager")
        case "config without cache":  # the generation config decides
            target.config.use_cache = target.config.text_config.use_cache = False
        case "not checkpointing":
            target.gradient_checkpointing_enable()
    settings = {"max_new_tokens": 16, "do_sample": False}
    expected = target.generate(**inputs, **settings)
    assert torch.equal(target.generate(**inputs, **settings, assistant_model=drafter), expected)
