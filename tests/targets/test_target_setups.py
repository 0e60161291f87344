"""Targets as users load them: other attention kernels, offloaded weights, quantised heads, compressed prompts."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from families import family
from peft import LoraConfig, get_peft_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

import dream_hf
from dream_hf import DreamDrafter


def assert_same_as_plain(target, inputs, drafter, **kwargs):
    options = {"max_new_tokens": 32, "do_sample": False, **kwargs}
    plain = target.generate(**inputs, **options)
    drafted = target.generate(**inputs, assistant_model=drafter, **options)
    assert torch.equal(plain, drafted)


def flash_like_attention(module, query, key, value, attention_mask, **kwargs):
    """Takes what FlashAttention takes: no mask or a 2D one, causality from the lower right corner."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    positions = torch.arange(num_keys)
    own = positions[num_keys - num_queries :, None]
    visible = (positions <= own)[None, None].expand(query.shape[0], 1, -1, -1)
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, -num_keys:].bool() | (positions == own)
    kwargs.pop("is_causal", None)
    return sdpa_attention_forward(module, query, key, value, visible, **kwargs)


@pytest.fixture
def flash_like():
    name = "flash_like"
    AttentionInterface.register(name, flash_like_attention)
    AttentionMaskInterface.register(name, flash_attention_mask)
    yield name
    AttentionInterface._global_mapping.pop(name)
    AttentionMaskInterface._global_mapping.pop(name)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_attention_without_4d_masks_runs_trees_as_sdpa(flash_like, batch_size):
    target = family("llava_clip_llama").make_target()
    config = target.get_decoder().config
    config._attn_implementation = flash_like
    inputs = family("llava_clip_llama").make_inputs(target, batch_size=batch_size)
    assert_same_as_plain(target, inputs, DreamDrafter.for_target(target))
    assert config._attn_implementation == flash_like


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_targets(offload, tmp_path):
    made = family("qwen2_vl")
    target = made.make_target()
    inputs = made.make_inputs(target)
    drafter = DreamDrafter.for_target(target)
    if offload == "cpu":
        cpu_offload(target, execution_device=torch.device("cpu"))
    else:
        disk_offload(target, str(tmp_path), execution_device=torch.device("cpu"))
    assert_same_as_plain(target, inputs, drafter)


class QuantisedEmbedding(torch.nn.Module):
    """Keeps no float weight to read: 8-bit codes and a scale per row."""

    def __init__(self, embedding):
        super().__init__()
        scale = embedding.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (embedding.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, token_ids):
        return self.codes[token_ids] * self.scale[token_ids]


class QuantisedHead(QuantisedEmbedding):
    def forward(self, features):
        return features @ (self.codes * self.scale).T


def test_quantised_embedding_and_head_are_called_not_read():
    made = family("smolvlm")
    target = made.make_target()
    inputs = made.make_inputs(target)
    drafter = DreamDrafter.for_target(target)
    target.set_output_embeddings(QuantisedHead(target.get_output_embeddings()))
    target.set_input_embeddings(QuantisedEmbedding(target.get_input_embeddings()))
    assert_same_as_plain(target, inputs, drafter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_drafter_of_another_dtype(dtype):
    made = family("gemma3")
    target = made.make_target()
    drafter = DreamDrafter.for_target(target).to(dtype)
    assert_same_as_plain(target, made.make_inputs(target, batch_size=2), drafter)


def test_drafter_with_lora():
    made = family("llama")
    target = made.make_target()
    drafter = DreamDrafter.for_target(target)
    wrapped = get_peft_model(drafter, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    calls = []
    drafter.register_forward_hook(lambda *_: calls.append(1))
    assert_same_as_plain(target, made.make_inputs(target), wrapped)
    assert calls
    free = {"custom_generate": dream_hf.dream_generate, "drafter": wrapped, "max_new_tokens": 8, "do_sample": False}
    inputs = made.make_inputs(target)
    assert torch.equal(target.generate(**inputs, **free), target.generate(**inputs, max_new_tokens=8, do_sample=False))
    with pytest.raises(ValueError, match="`num_beams=2`"):
        target.generate(**made.make_inputs(target), assistant_model=wrapped, num_beams=2)
