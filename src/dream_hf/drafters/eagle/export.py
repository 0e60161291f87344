"""EAGLE-3 drafters in the forms that vLLM and SGLang load: speculators' container, and that of EAGLE's authors."""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen3Config

from ...targets.target import Target
from .configuration import EagleConfig
from .drafter import EagleDrafter

SPECULATORS, EAGLE3 = "speculators", "eagle3"
SPECULATORS_VERSION = "0.9.0"  # whose form is written

Tensors = dict[str, torch.Tensor]


def export_drafter(drafter: Any, folder: str | PathLike, format: str, target: Any) -> Path:
    """Write an EAGLE-3 drafter as other programs read it: `config.json` and `model.safetensors`.

    Args:
        drafter (`EagleDrafter`): The drafter.
        folder (`str` or `os.PathLike`): Where to; made if it is not there.
        format (`str`): `"speculators"` (vLLM, and SGLang's loader for it) or `"eagle3"` (SafeAILab's and SpecForge's, which
            SGLang and vLLM load).
        target (`PreTrainedModel`): The model it drafts for. What the drafter borrows of it is written where the form asks for
            it.

    Returns:
        `Path`: The folder. [`load_drafter`] reads the same drafter back.

    Raises:
        TypeError: A drafter that is no EAGLE.
        ValueError: An unknown form, another target, or what the form has no word for.
    """
    if not isinstance(drafter, EagleDrafter):
        raise TypeError(
            f"`drafter` is a `{type(drafter).__name__}`: EAGLE-3 drafters can be exported, for no other program runs this one."
        )
    if format not in WRITERS:
        raise ValueError(f"`format` ({format!r}) must be {' or '.join(map(repr, WRITERS))}.")
    config = drafter.config
    drafter.check(target, drafter.settings)
    _check_expressible(config, format)
    fields, tensors = WRITERS[format](drafter, Target(target))
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, place / "model.safetensors"
    )
    (place / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return place


def _check_expressible(config: EagleConfig, format: str) -> None:
    lacking = {
        "generation": config.generation != 3,
        "image_rows": config.image_rows != "token",
        "mrope_section": config.mrope_section is not None,
        "rope_parameters": (config.rope_parameters or {}).get("rope_type", "default") != "default",
        "attention_output_bias": format == SPECULATORS and config.attention_output_bias != config.attention_bias,
        "feature_layers": format == SPECULATORS and len(set(config.feature_layers)) < len(config.feature_layers),
        "has_final_norm": format == SPECULATORS and not config.has_final_norm,
        "is_feedback_normed": format == EAGLE3 and config.is_feedback_normed,
        "num_hidden_layers": format == EAGLE3 and config.num_hidden_layers > 1,
        "has_qk_norm": format == EAGLE3 and config.has_qk_norm,
    }
    names = [name for name, is_lacking in lacking.items() if is_lacking]
    if names:
        told = ", ".join(f"`{name}` {getattr(config, name)}" for name in names)
        raise ValueError(f"The form {format!r} has no word for the drafter's {told}.")


def _speculators(drafter: EagleDrafter, target: Target) -> tuple[dict[str, Any], Tensors]:
    config = drafter.config
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": config.tree_depth,
        "accept_tolerance": 0.0,
        "verifier_accept_k": 1,
    }
    name = getattr(target.model.config, "_name_or_path", "") or None  # where its readers look for the target
    verifier = {"name_or_path": name, "architectures": [type(target.model).__name__]}
    layer = {
        **_shape(config),
        "model_type": (Qwen3Config if config.has_qk_norm else LlamaConfig).model_type,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_hidden_layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": _theta(config)},
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": False,
    }
    fields = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "target_hidden_size": None if config.target_hidden_size == config.hidden_size else config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": list(config.feature_layers),
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.has_fc_norm,
        "norm_output": config.is_feedback_normed,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "dtype": str(drafter.dtype).removeprefix("torch."),
    }
    tensors = _tensors(drafter, target)
    borrowed: Any = target.embedding.weight
    return fields, {"embed_tokens.weight": borrowed, **tensors}


def _eagle3(drafter: EagleDrafter, target: Target) -> tuple[dict[str, Any], Tensors]:
    config = drafter.config
    fields = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": LlamaConfig.model_type,
        **_shape(config),
        "head_dim": config.head_dim,
        "num_hidden_layers": 1,
        "rope_theta": _theta(config),
        "attention_bias": config.attention_bias,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "target_hidden_size": config.target_hidden_size,
        # These programs count what layers put out: one less than places in `hidden_states`.
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in config.feature_layers],
            "use_aux_hidden_state": True,
        },
        "eagle_aux_layer_semantics": "sglang",
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.has_fc_norm,
        "norm_output": config.has_final_norm,
        "tie_word_embeddings": False,
        "torch_dtype": str(drafter.dtype).removeprefix("torch."),
    }
    named = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in _tensors(drafter, target).items()}
    return fields, named


WRITERS: dict[str, Callable[[EagleDrafter, Target], tuple[dict[str, Any], Tensors]]] = {
    SPECULATORS: _speculators,
    EAGLE3: _eagle3,
}


def _shape(config: EagleConfig) -> dict[str, Any]:
    """Fields that go by the same names everywhere."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_act",
        "rms_norm_eps", "max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


def _theta(config: EagleConfig) -> float:
    return float((config.rope_parameters or {}).get("rope_theta", config.default_theta))


def _tensors(drafter: EagleDrafter, target: Target) -> Tensors:
    """All weights by speculators' names, a borrowed head among them, and which tokens the head knows if not all."""
    config = drafter.config
    ids = drafter.draft_token_ids
    ids = torch.arange(config.vocab_size) if ids is None else ids.cpu()
    head: Any = target.lm_head.weight
    tensors = {name: weight.data for name, weight in drafter.named_parameters()}
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = head.data.cpu()[ids].to(drafter.dtype)
    if drafter.draft_token_ids is not None:
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.isin(torch.arange(config.vocab_size), ids)
    return tensors
