"""Every refusal of the contract: before any work, naming the argument, its value and the remedy."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import family_configs as configs
import peft
import pytest
import torch
import transformers as hf
from families import REFUSED, Target, family
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import HQQQuantizedLayer
from transformers.utils import logging as hf_logging

import dream_hf
from dream_hf import DreamConfig, DreamDrafter
from dream_hf.compat import CACHE
from dream_hf.decoding.requests import check_cache, check_target
from dream_hf.drafters.dream.checks import check_fit
from dream_hf.targets.target import Target as TargetView

WAYS = ("assistant_model", "drafter")


@pytest.fixture(scope="module")
def target() -> Target:
    return family("llava_clip_llama").make_target()


def make_drafter(target: Target, **overrides) -> DreamDrafter:
    torch.manual_seed(0)
    return DreamDrafter.for_target(target, **overrides)


def generate(target: Target, drafter, way: str = "assistant_model", **kwargs):
    inputs = family("llava_clip_llama").make_inputs(target) | kwargs
    custom = {"custom_generate": dream_hf.dream_generate} if way == "drafter" else {}
    return target.generate(**inputs, **custom, **{way: drafter}, max_new_tokens=4)


@contextmanager
def refusal(target: Target, *words: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Expect a refusal whose message has all `words`, without one forward of the target."""
    forwards = []
    handle = target.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        with pytest.raises(kind) as caught:
            yield
    finally:
        handle.remove()
    assert not forwards, "the target ran"
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {str(caught.value)!r}"


@pytest.mark.parametrize("way", WAYS)
def test_what_is_refused_below_would_run_otherwise(target, way):
    assert generate(target, make_drafter(target), way).shape[1] > 4


# --- arguments of generate() ---

SETTINGS = {
    "use_cache": ({"use_cache": False}, ("use_cache=False", "leave `use_cache` out")),
    "static": ({"cache_implementation": "static"}, ("cache_implementation='static'", "leave it out")),
    "quantized": ({"cache_implementation": "quantized"}, ("cache_implementation='quantized'", "leave it out")),
    "offloaded": ({"cache_implementation": "offloaded"}, ("cache_implementation='offloaded'", "leave it out")),
    "beams": ({"num_beams": 2}, ("num_beams=2", "set it to 1")),
    "several sequences": (
        {"num_return_sequences": 2, "do_sample": True}, ("num_return_sequences=2", "set it to 1", "repeat the prompt")
    ),
}  # fmt: skip


# With `custom_generate`, transformers itself asks for a quantisation library before we are called.
CASES = [(way, name) for way in WAYS for name in SETTINGS if (way, name) != ("drafter", "quantized")]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_settings_that_cannot_be_served(target, way, name):
    settings, words = SETTINGS[name]
    with refusal(target, *words):
        generate(target, make_drafter(target), way, **settings)


def test_settings_are_refused_in_a_generation_config_too(target):
    config = hf.GenerationConfig(num_beams=3, max_new_tokens=4)
    inputs = family("llava_clip_llama").make_inputs(target)
    with refusal(target, "num_beams=3"):
        target.generate(**inputs, assistant_model=make_drafter(target), generation_config=config)


class CacheOfOurOwn(hf.cache_utils.DynamicLayer):
    """A layer that may hold more state than keys and values."""


def caches(target: Target) -> dict:
    config = target.config.get_text_config()
    odd = DynamicCache(config=config)
    odd.layers[1] = CacheOfOurOwn()
    return {
        "StaticCache": StaticCache(config=config, max_cache_len=64),
        "offloaded": DynamicCache(config=config, offloading=True),
        "CacheOfOurOwn": odd,
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["StaticCache", "offloaded", "CacheOfOurOwn"])
def test_caches_that_cannot_take_tokens_back(target, name, way, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)  # an offloaded cache asks for one
    with refusal(target, f"`{CACHE}`", name, "DynamicCache(config=model.config)"):
        generate(target, make_drafter(target), way, past_key_values=caches(target)[name])


def test_quantized_cache_layers_are_refused():
    # Making one needs a quantisation library; its layer types are what is looked at.
    cache = DynamicCache()
    cache.layers = [HQQQuantizedLayer.__new__(HQQQuantizedLayer)]
    with pytest.raises(ValueError, match=r"HQQQuantizedLayer.*DynamicCache"):
        check_cache(cache)


def test_the_old_tuple_of_keys_and_values_is_refused(target):
    with refusal(target, CACHE, "`Cache` instance"):  # transformers' own words
        generate(target, make_drafter(target), "drafter", past_key_values=((torch.zeros(1), torch.zeros(1)),))


# --- targets ---


@pytest.mark.parametrize("refused", REFUSED, ids=repr)
def test_targets_whose_states_cannot_follow_trees(refused):
    target = refused.make_target()
    text = target.config.get_text_config()
    drafter = DreamDrafter(
        DreamConfig(vocab_size=text.vocab_size, hidden_size=32, intermediate_size=64, num_attention_heads=4)
    )
    inputs = refused.make_inputs(target)
    for arguments in (
        {"assistant_model": drafter},
        {"custom_generate": dream_hf.dream_generate, "drafter": drafter},
    ):
        with refusal(target, type(target).__name__, "state", "without `assistant_model`"):
            target.generate(**inputs, **arguments, max_new_tokens=4)


def test_encoder_decoder_targets():
    size = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    target = hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=104, **size, **heads)).eval()
    drafter = DreamDrafter(DreamConfig(vocab_size=104, hidden_size=32, intermediate_size=64, num_attention_heads=4))
    with refusal(target, "BartForConditionalGeneration", "encoder-decoder", "decoder-only"):
        target.generate(input_ids=torch.tensor([[5, 6, 2]]), assistant_model=drafter, max_new_tokens=4)


def causal(model_class, config) -> Target:
    target = model_class(config).eval()
    target.generation_config.pad_token_id = 0
    return target


SMALL = {
    "vocab_size": 104,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def mllama() -> Target:
    vision = VISION | {"vision_output_dim": 32, "num_global_layers": 1, "intermediate_layers_indices": [0]}
    config = hf.MllamaConfig(
        text_config=SMALL | {"cross_attention_layers": [1], "pad_token_id": 0},
        vision_config=vision,
        image_token_index=100,
    )
    return causal(hf.MllamaForConditionalGeneration, config)


def opt_of_two_widths() -> Target:
    config = hf.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=16)
    return causal(hf.OPTForCausalLM, config)


def llama() -> Target:
    return family("llama").make_target()


def compiled_forward() -> Target:
    target = llama()
    target.forward = torch.compile(target.forward, backend="eager")
    return target


def compiled_in_place() -> Target:
    target = llama()
    target.compile(backend="eager")
    return target


def compiled_decoder() -> Target:
    target = llama()
    target.model = torch.compile(target.model, backend="eager")
    return target


def checkpointing() -> Target:
    target = llama()
    target.gradient_checkpointing_enable()
    return target.train()


def adapted(adapter: peft.PeftConfig) -> Target:
    return peft.get_peft_model(llama(), adapter).eval()


VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
ALORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "alora_invocation_tokens": [7, 8]}
# By name: what makes the target, and words of the refusal.
UNSUITABLE = {
    "cross-attention": (mllama, ("cross_attention_layers", "generate without")),
    "pictures outside the prompt": (
        lambda: causal(hf.GitForCausalLM, hf.GitConfig(**SMALL, vision_config=VISION)), ("in front of the prompt",)
    ),
    "no cache": (
        lambda: causal(hf.OpenAIGPTLMHeadModel, hf.OpenAIGPTConfig(vocab_size=104, n_embd=32, n_layer=2, n_head=4)),
        ("no key/value cache", "generate without"),
    ),
    "both ways": (lambda: causal(hf.BertLMHeadModel, hf.BertConfig(**SMALL)), ("is_decoder=False", "is_decoder=True")),
    "two widths": (opt_of_two_widths, ("width 16", "`hidden_size` is 32")),
    "compiled forward": (compiled_forward, ("target's `forward` is compiled", "drafter.config.compile")),
    "compiled in place": (compiled_in_place, ("target's `forward` is compiled", "drafter.config.compile")),
    "compiled decoder": (compiled_decoder, ("target's `model.forward` is compiled", "drafter.config.compile")),
    "checkpointing": (checkpointing, ("gradient checkpointing", ".eval()")),
    "prompt tuning": (lambda: adapted(peft.PromptTuningConfig(**VIRTUAL)), ("virtual tokens", "PromptTuningConfig")),
    "p-tuning": (
        lambda: adapted(peft.PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=8)), ("virtual tokens", "PromptEncoderConfig")
    ),
    "prefix tuning": (lambda: adapted(peft.PrefixTuningConfig(**VIRTUAL)), ("virtual tokens", "PrefixTuningConfig")),
    "activated LoRA": (lambda: adapted(peft.LoraConfig(**ALORA)), ("alora_invocation_tokens", "plain LoRA")),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUITABLE)
def test_targets_that_cannot_be_exact(name):
    make, words = UNSUITABLE[name]
    target = make()
    drafter = DreamDrafter(DreamConfig(vocab_size=104, hidden_size=32, intermediate_size=64, num_attention_heads=4))
    ids = torch.tensor([[5, 6, 7]])
    for arguments in (
        {"assistant_model": drafter},
        {"custom_generate": dream_hf.dream_generate, "drafter": drafter},
        {"custom_generate": dream_hf.dream_chain_generate, "drafter": drafter},
    ):
        with refusal(target, *words):
            target.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments, max_new_tokens=4)


def longrope(model_class, config_class) -> Target:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = config_class(
        **SMALL, rope_parameters=rope, max_position_embeddings=96, original_max_position_embeddings=40, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    return causal(model_class, config)


def test_a_text_that_is_read_anew_in_the_middle():
    """Phi-3 does at `original_max_position_embeddings`; texts that stay on one side of it are exact."""
    target = longrope(hf.Phi3ForCausalLM, hf.Phi3Config)
    drafter = DreamDrafter.for_target(target)
    for length, max_length in ((30, 41), (41, 60)):
        inputs = {"input_ids": torch.arange(5, 5 + length)[None], "max_length": max_length, "do_sample": False}
        assert torch.equal(target.generate(**inputs, assistant_model=drafter), target.generate(**inputs))
    with refusal(target, "beyond 40 tokens", "from 40 to 42", "`max_length` to 41"):
        target.generate(input_ids=torch.arange(5, 45)[None], assistant_model=drafter, max_length=42)


def test_chains_of_transformers_own_loop_change_length_dependent_angles():
    target = longrope(hf.LlamaForCausalLM, hf.LlamaConfig)
    drafter = DreamDrafter.for_target(target)
    with refusal(target, "longrope", "custom_generate=dream_generate"):
        target.generate(
            input_ids=torch.tensor([[5, 6]]),
            custom_generate=dream_hf.dream_chain_generate,
            drafter=drafter,
            max_length=9,
        )


# --- drafters ---


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size"])
def test_shapes_of_another_target(target, name, way):
    drafter = make_drafter(target, **{name: 64})
    drafter.config.target = None
    actual = str(getattr(target.config.get_text_config(), name))
    with refusal(target, f"`{name}` (64)", actual, "DreamDrafter.for_target(target)"):
        generate(target, drafter, way)


@pytest.mark.parametrize(("name", "value"), [("model_type", "qwen2_vl"), ("num_hidden_layers", 5)])
def test_drafters_of_another_target(target, name, value):
    drafter = make_drafter(target)
    actual = drafter.config.target[name]
    drafter.config.target = drafter.config.target | {name: value}
    with refusal(target, f"config.target['{name}']", repr(value), repr(actual), "made for this target"):
        generate(target, drafter)


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def test_another_name_is_a_warning_only(target, monkeypatch):
    drafter = make_drafter(target)
    drafter.config.target = drafter.config.target | {"name": "org/the-target-it-was-trained-for"}
    monkeypatch.setattr(target.config, "_name_or_path", "org/a-finetuned-target")
    warnings = Warnings()
    logger = hf_logging.get_logger("dream_hf.drafters.fit")
    logger.addHandler(warnings)
    try:
        generate(target, drafter)
        assert any(
            "the-target-it-was-trained-for" in text and "a-finetuned-target" in text for text in warnings.messages
        )
        warnings.messages.clear()
        generate(target, make_drafter(target))
        assert not warnings.messages
    finally:
        logger.removeHandler(warnings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(target, value):
    drafter = make_drafter(target)
    generate(target, drafter)  # fine so far; what changes afterwards is seen
    with torch.no_grad():
        drafter.layers[1].mlp.up_proj.weight[3, 4] = value
    with refusal(target, "layers.1.mlp.up_proj.weight", "NaN or infinite", "load another checkpoint"):
        generate(target, drafter)


BAD_TREES = [
    ("tree_depth", 0),
    ("tree_top_k", -1),
    ("tree_size", 2.5),
    ("tree_top_k", 105),
    ("visual_keep_ratio", -0.1),
    ("pause_below", -1.0),
]


@pytest.mark.parametrize(("name", "value"), BAD_TREES)
def test_trees_that_draft_nothing(target, name, value):
    drafter = make_drafter(target)
    with refusal(target, f"`{name}`", str(value)):
        setattr(drafter.config, name, value)  # a value of the wrong type is refused here already
        generate(target, drafter)


@pytest.mark.parametrize("other", [None, "org/drafter"])
def test_what_is_no_drafter(target, other):
    with refusal(target, "`drafter`", type(other).__name__, "DreamDrafter.from_pretrained", kind=TypeError):
        generate(target, other, "drafter")


def test_custom_generate_without_a_drafter(target):
    inputs = family("llava_clip_llama").make_inputs(target)
    with refusal(target, "`drafter`", "DreamDrafter", kind=TypeError):
        target.generate(**inputs, custom_generate=dream_hf.dream_generate, max_new_tokens=4)


def test_another_model_as_drafter(target):
    other = hf.LlamaForCausalLM(configs.llama())
    with refusal(target, "`drafter`", "LlamaForCausalLM", kind=TypeError):
        generate(target, other, "drafter")


def test_a_model_without_a_head_is_no_target():
    model = hf.LlamaModel(configs.llama())
    drafter = DreamDrafter.for_target(model)
    check_target(model)
    check_fit(drafter, model)
    with pytest.raises(TypeError, match="LM head"):
        TargetView(model)
