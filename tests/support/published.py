"""A checkpoint in the layout that DREAM's authors published, small and random."""

import json

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, THETA, EPS = 32, 48, 4, 8, 5000.0, 1e-5


def published_config(num_key_value_heads):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": num_key_value_heads,
        "num_hidden_layers": 1,
        "rope_theta": THETA,
        "rope_scaling": None,
        "rms_norm_eps": EPS,
        "hidden_act": "silu",
        "vocab_size": 64,
        "torch_dtype": "float16",
    }


def published_weights(num_key_value_heads):
    keys = num_key_value_heads * HEAD_DIM
    shapes = {}
    for layer, attention in ((0, "self_attn"), (1, "cross_attn"), (2, "self_attn")):
        name = f"layers.{layer}"
        shapes |= {f"{name}.{attention}.{which}_proj.weight": (HIDDEN, HIDDEN) for which in "qo"}
        shapes |= {f"{name}.{attention}.{which}_proj.weight": (keys, HIDDEN) for which in "kv"}
        shapes |= {f"{name}.mlp.{which}_proj.weight": (INTERMEDIATE, HIDDEN) for which in ("gate", "up")}
        shapes |= {f"{name}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
        shapes |= {f"{name}.post_attention_layernorm.weight": (HIDDEN,)}
    shapes |= {f"layers.{layer}.input_layernorm.weight": (HIDDEN,) for layer in (1, 2)}
    shapes |= {f"layers.1.cross_attn.{which}_norm.weight": (HEAD_DIM,) for which in "qk"}
    shapes |= {"layers.1.cross_attn_attn_gate": (1,), "layers.1.cross_attn_mlp_gate": (1,), "norm.weight": (HIDDEN,)}
    generator = torch.Generator().manual_seed(num_key_value_heads)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 2 else 0.5) + ("norm" in name)
        for name, shape in shapes.items()
    }


def write_published(folder, weights, config, as_pickle=True):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if as_pickle:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return folder
