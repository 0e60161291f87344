"""Text-only causal models of many families: exact, or refused because they place tokens by cache slot."""

import pytest
import torch
from double import doubled
from transformers import AutoConfig, AutoModelForCausalLM

import dream_hf  # noqa: F401
from dream_hf import DreamDrafter

LLAMA_LIKE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**LLAMA_LIKE, "num_key_value_heads": 2}
GPT_LIKE = {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}
SLIDING = {**GROUPED, "sliding_window": 8}
LATENT = {
    **LLAMA_LIKE,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
EXACT = {
    "gpt2": GPT_LIKE,
    "gptj": {**GPT_LIKE, "rotary_dim": 4},
    "codegen": {**GPT_LIKE, "rotary_dim": 4},
    "gpt_neox": LLAMA_LIKE,
    "opt": {**LLAMA_LIKE, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": LLAMA_LIKE,
    "phi": LLAMA_LIKE,
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "mixtral": {**GROUPED, "num_local_experts": 2},
    "starcoder2": SLIDING,
    "stablelm": GROUPED,
    "olmo2": GROUPED,
    "granite": {**GROUPED, "logits_scaling": 4.0},
    "deepseek_v3": LATENT,
    "smollm3": GROUPED,
    "glm4": {**GROUPED, "head_dim": 8},
    "cohere2": SLIDING,
    "exaone4": SLIDING,
    "ministral": {**SLIDING, "head_dim": 8},
    "modernbert-decoder": LLAMA_LIKE,
}
REFUSED = {
    "bloom": {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "falcon": {**LLAMA_LIKE, "alibi": True},
    "gpt_neo": {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
}


def make_target(model_type, settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = doubled(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval())
        with torch.no_grad():
            for weight in target.parameters():
                if weight.ndim > 1:
                    weight.mul_(8)
    target.set_experts_implementation("eager")  # the grouped product of others takes no float64
    target.generation_config.eos_token_id = None
    target.generation_config.pad_token_id = 0
    return target


@pytest.mark.parametrize("model_type", EXACT)
def test_exact(model_type):
    target = make_target(model_type, EXACT[model_type])
    ids = torch.randint(5, 90, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = ids[1, :7] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    drafted = target.generate(**inputs, assistant_model=DreamDrafter.for_target(target))
    assert torch.equal(drafted, target.generate(**inputs))


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused(model_type):
    target = make_target(model_type, REFUSED[model_type])
    drafter = DreamDrafter.for_target(target)
    with pytest.raises(ValueError, match=r"by their slot in the cache.*generate without"):
        target.generate(input_ids=torch.tensor([[5, 6, 7]]), assistant_model=drafter)
