"""Published EAGLE checkpoints in our terms: what a config says, what the names and shapes of the weights say.

Spellings and meanings were read off the programs that write them: SafeAILab's EAGLE, SpecForge, AngelSlim, speculators, NeMo
Automodel, ModelOpt. The weights decide wherever they can; what neither they nor the config settle is the `Wiring`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..published_fields import (
    DEFAULT_THETA,
    Fields,
    PublishedWiring,
    Tensors,
    layer_fields,
    renamed_tensors,
    rope_fields,
    rope_parameters_of,
    three_layers,
)
from .configuration import EagleConfig

# ViSpec's names that differ from ours in more than their beginning.
VISPEC_NAMES = {
    "imadpt.q": "image_adaptor.queries", "img_fc.weight": "image_fc.weight", "img_fc.bias": "image_fc.bias",
}  # fmt: skip


@dataclass(frozen=True)
class Wiring(PublishedWiring):
    """What an EAGLE checkpoint leaves open, see [`PublishedWiring`].

    Args:
        norm_before_residual (`bool`): As in [`EagleConfig`].
        has_final_norm (`bool`): As in [`EagleConfig`].
        is_feedback_normed (`bool`): As in [`EagleConfig`].
        rope_theta (`float`): Base of the rotary embedding.
        mrope_section (`tuple[int, ...]`, *optional*): As in [`EagleConfig`].
        is_mrope_interleaved (`bool`): As in [`EagleConfig`].
        image_rows (`str`): As in [`EagleConfig`].
    """

    norm_before_residual: bool = False
    has_final_norm: bool = True
    is_feedback_normed: bool = False
    rope_theta: float = DEFAULT_THETA
    mrope_section: tuple[int, ...] | None = None
    is_mrope_interleaved: bool = False
    image_rows: str = "token"


def refuse_unread(config: Fields) -> None:
    """Refuse what a config asks for and this package does not do.

    Raises:
        ValueError: Windows of attention, or a feature of one layer only.
    """
    windows = [kind for kind in config.get("layer_types") or () if "sliding" in str(kind)]
    if windows or config.get("sliding_window_indices"):
        raise ValueError("its layers look back a sliding window only (`layer_types`), which is not read yet")
    if (config.get("eagle_config") or {}).get("use_aux_hidden_state") is False:
        raise ValueError("it reads the last feature alone (`use_aux_hidden_state` is false), which is not read yet")


def renamed(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The same tensors by our names: `model.` goes, `midlayer` is the first of `layers`, `d2t` becomes token ids."""
    return renamed_tensors(tensors, _our_name)


def _our_name(key: str) -> str:
    name = re.sub(r"^midlayer\.", "layers.0.", re.sub(r"^model\.", "", key))
    return VISPEC_NAMES.get(name) or re.sub(r"^imadpt\.", "image_adaptor.", name)


def read_wiring(config: Fields, names: set[str], num_target_layers: int) -> Wiring:
    """What a config says, by the meanings of whoever wrote it; `names` are those of the tensors as published."""
    is_nemo = any(name.startswith("model.") for name in names)
    is_speculators = "speculators_model_type" in config
    is_angelslim = is_from_angelslim(config)
    is_first = is_first_generation(names)
    layers = (num_target_layers,) if is_first else _feature_layers(config, num_target_layers)
    wiring = Wiring(layers, norm_before_residual=bool(config.get("norm_before_residual", False)))
    wiring = replace(wiring, **_rope(config, is_angelslim, wants_planes=not (is_speculators or is_nemo or is_first)))
    has_norm = any(name.removeprefix("model.") == "norm.weight" for name in names)
    norm_output = config.get("norm_output")
    if is_first:
        rows = "compressed" if "imadpt.q" in names else "direct" if is_msd(config, names) else "token"
        return replace(wiring, has_final_norm=has_norm, is_feedback_normed=has_norm, image_rows=rows)
    if is_speculators or is_nemo:  # for which `norm_output` is about what the next level reads
        return replace(wiring, is_feedback_normed=bool(norm_output))
    return replace(wiring, has_final_norm=norm_output is not False)  # and for all others about the head


def is_from_angelslim(config: Fields) -> bool:
    """Whether a config was written by AngelSlim."""
    return "Eagle3LlamaForCausalLM" in (config.get("architectures") or ()) or config.get("modal_type") == "VLM"


def is_first_generation(names: set[str]) -> bool:
    """Whether tensors are of EAGLE-1 or EAGLE-2: no norm of features beside that of embeddings."""
    return not any(name.endswith(".hidden_norm.weight") for name in names)


def is_msd(config: Fields, names: set[str]) -> bool:
    """MSD: EAGLE-2's weights with a trained embedding. Its layer has an input norm, or its config is that of a LLaVA."""
    others = {"norm.weight", "layers.0.hidden_norm.weight", "imadpt.q"}
    if "embed_tokens.weight" not in names or names & others:
        return False
    return "layers.0.input_layernorm.weight" in names or "mm_projector_type" in config


def _feature_layers(config: Fields, num_layers: int) -> tuple[int, ...]:
    """Places in `hidden_states`, those of three layers where a config names none."""
    return declared_ids(config, num_layers)[0] or three_layers(num_layers)


def declared_ids(config: Fields, num_layers: int) -> tuple[tuple[int, ...], bool]:
    """The places in `hidden_states` that a config names, if any, and whether it says so beyond doubt.

    Some programs count what a layer puts out instead, under the same name.
    """
    nested = config.get("eagle_config") or {}
    name = "eagle_aux_hidden_state_layer_ids"
    by_place = config.get(name) if "speculators_model_type" in config else None
    by_output = config.get("aux_hidden_states_layer_ids")
    either = nested.get(name) or (None if by_place else config.get(name))
    if by_place:
        return tuple(by_place), True
    if by_output:
        return tuple(index + 1 for index in by_output), True
    if not either:
        return (), True
    ends = min(either), max(either)
    is_said = config.get("eagle_aux_layer_semantics") == "sglang"
    says_outputs = is_said or bool(nested.get(name))
    if ends == (1, num_layers - 4):
        says_outputs = is_said = True
    elif ends == (2, num_layers - 3):
        says_outputs, is_said = False, True
    return tuple(index + says_outputs for index in either), is_said


def _rope(config: Fields, is_angelslim: bool, wants_planes: bool) -> dict[str, Any]:
    """Base and planes of the rotary embedding."""
    rope = rope_fields(config)
    section = rope.get("mrope_section") if wants_planes else None
    theta = rope.get("rope_theta") or config.get("rope_theta") or DEFAULT_THETA
    if is_angelslim and section is None:
        theta = DEFAULT_THETA  # its trainer passes no other
    return {
        "rope_theta": float(theta),
        "mrope_section": None if section is None else tuple(section),
        "is_mrope_interleaved": section is not None and is_angelslim,
    }


def read_config(config: Fields, tensors: Tensors, wiring: Wiring, target: Fields) -> EagleConfig:
    """The config of a drafter with these tensors (by our names), for a target as `describe_target` describes it.

    Raises:
        ValueError: Shapes that fit no such drafter.
    """
    keys, is_first = set(tensors), is_first_generation(set(tensors))
    shape = layer_fields(config, tensors, target)
    if is_first:
        shape["fc_bias"] = bool(config.get("bias", config.get("fc_bias", not wiring.has_final_norm)))
    return EagleConfig(
        **shape,
        feature_layers=list(wiring.feature_layers),
        generation=1 if is_first else 3,
        rope_parameters=rope_parameters_of(rope_fields(config), wiring.rope_theta),
        has_input_norm=is_first and "layers.0.input_layernorm.weight" in keys,
        has_final_norm=wiring.has_final_norm,
        is_feedback_normed=wiring.is_feedback_normed,
        norm_before_residual=wiring.norm_before_residual,
        norm_before_fc=bool(config.get("norm_before_fc")) or "input_norm.weight" in keys,
        has_fc_norm=bool(config.get("fc_norm")) or "fc_norm.0.weight" in keys,
        mrope_section=wiring.mrope_section,
        is_mrope_interleaved=wiring.is_mrope_interleaved,
        image_rows=wiring.image_rows,
        num_image_queries=_num_image_queries(tensors),
        has_image_bias="image_adaptor.k_proj.bias" in keys,
    )


def _num_image_queries(tensors: Tensors) -> int:
    """How many queries ViSpec's adaptor has; no field of a config says it."""
    queries = tensors.get("image_adaptor.queries")
    if queries is None:
        return 0
    if queries.ndim != 3:
        raise ValueError(f"imadpt.q is of shape {tuple(queries.shape)}; it must be (queries, heads, head width)")
    return len(queries)
