"""What published checkpoints of drafters with Llama's layers say alike: configs, names of tensors, shapes.

The weights decide wherever they can.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch

Tensors = Mapping[str, torch.Tensor]
Fields = Mapping[str, Any]

DEFAULT_THETA = 10000.0
THETAS = (DEFAULT_THETA, 500_000.0, 1_000_000.0, 5_000_000.0)  # that models have
# Fields of published configs that ours have under the same name.
SHARED_FIELDS = (
    "intermediate_size", "num_attention_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class PublishedWiring:
    """What a checkpoint leaves open, so that one file's weights can be read in several ways.

    Args:
        feature_layers (`tuple[int, ...]`): Which of the target's `hidden_states` are read.
    """

    feature_layers: tuple[int, ...]

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """The same but for `changes`.

        Raises:
            ValueError: A name that is none of its fields.
        """
        names = [field.name for field in fields(self)]
        if unknown := sorted(changes.keys() - set(names)):
            raise ValueError(f"`wiring` names {', '.join(unknown)}; what can be said is {', '.join(names)}.")
        return replace(self, **changes)


def read_fields(config: Fields) -> dict[str, Any]:
    """A config.json with the fields of a nested `transformer_layer_config` beside its own, which win."""
    return {**(config.get("transformer_layer_config") or {}), **config}


def rope_fields(config: Fields) -> dict[str, Any]:
    """What a config says of its rotary embedding, under either name."""
    return {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def rope_parameters_of(rope: Fields, theta: float) -> dict[str, Any]:
    """The same as `rope_parameters` of one-dimensional positions, with this base."""
    rope = dict(rope)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind in ("default", "mrope"):
        return {"rope_type": "default", "rope_theta": theta}
    rope.pop("type", None)
    return {**rope, "rope_type": kind, "rope_theta": theta}


def other_bases(rope: Fields, config: Fields, text_config: Any) -> list[dict[str, Any]]:
    """Changes of a wiring to rotary bases: what a config (`rope` is a part of it) or the target says, and usual ones."""
    target_rope = getattr(text_config, "rope_parameters", None) or {}
    said = (rope.get("rope_theta"), config.get("rope_theta"), target_rope.get("rope_theta"))
    return [{"rope_theta": float(theta)} for theta in dict.fromkeys((*said, *THETAS)) if theta]


def three_layers(num_target_layers: int) -> tuple[int, int, int]:
    """A low, a middle and a high place in `hidden_states`, as EAGLE-3's authors and speculators take them."""
    return 2, num_target_layers // 2, num_target_layers - 3


def renamed_tensors(tensors: Tensors, our_name: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """The same tensors by our names; `d2t` becomes token ids, and rotary frequencies, which follow from the config, go.

    Raises:
        ValueError: What is no tensor, two of one meaning, or a `d2t` that says nothing.
    """
    ours: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{key} is a {type(value).__name__}, no tensor")
        name = our_name(key)
        if name in ours:
            raise ValueError(f"the tensors {key} and another one are both {name}")
        if not re.fullmatch(r".*rotary_emb\.inv_freq", name):
            ours[name] = value
    deltas, is_drafted = ours.pop("d2t", None), ours.pop("t2d", None)
    if deltas is not None:
        ours["draft_token_ids"] = _token_ids(deltas, is_drafted)
    elif is_drafted is not None:
        raise ValueError("there is a t2d and no d2t, so that nobody knows which tokens its head drafts")
    return ours


def _token_ids(deltas: torch.Tensor, is_drafted: torch.Tensor | None) -> torch.Tensor:
    """Tokens of the target that drafted ids stand for: d2t holds differences."""
    if deltas.is_floating_point() or deltas.ndim != 1:
        raise ValueError(f"d2t is {deltas.dtype} of shape {tuple(deltas.shape)}; it must be a row of integers")
    ids = deltas.long() + torch.arange(len(deltas))
    if is_drafted is not None and sorted(ids.tolist()) != is_drafted.nonzero().flatten().tolist():
        raise ValueError("d2t and t2d name different tokens")
    return ids


def layer_fields(config: Fields, tensors: Tensors, target: Fields) -> dict[str, Any]:
    """Arguments of a [`LayerConfig`] that tensors (by our names) and a config tell, for a target as `describe_target` has it.

    Raises:
        ValueError: Shapes that fit no drafter.
    """
    keys = set(tensors)
    query, key = (rows_of(tensors, f"layers.0.self_attn.{part}_proj.weight") for part in "qk")
    num_heads, hidden = config.get("num_attention_heads"), rows_of(tensors, "fc.weight")
    if not isinstance(num_heads, int):
        raise ValueError(f"its config.json has no `num_attention_heads` ({num_heads!r})")
    head_dim = _share(query, num_heads, "q_proj", "`num_attention_heads`")
    ids = tensors.get("draft_token_ids")
    return {
        **{name: config[name] for name in SHARED_FIELDS if config.get(name) is not None},
        "vocab_size": target["vocab_size"],
        "hidden_size": hidden,
        "target_hidden_size": target["hidden_size"],
        "num_hidden_layers": num_layers_of(tensors),
        "num_key_value_heads": _share(key, head_dim, "k_proj", "`head_dim`"),
        "head_dim": head_dim,
        "attention_bias": "layers.0.self_attn.q_proj.bias" in keys,
        "attention_output_bias": "layers.0.self_attn.o_proj.bias" in keys,
        "mlp_bias": "layers.0.mlp.gate_proj.bias" in keys,
        "fc_bias": "fc.bias" in keys,
        "has_qk_norm": "layers.0.self_attn.q_norm.weight" in keys,
        "has_embedding": "embed_tokens.weight" in keys,
        "has_head": "lm_head.weight" in keys,
        "draft_vocab_size": None if ids is None else len(ids),
        "target": dict(target),
    }


def num_layers_of(tensors: Tensors) -> int:
    """How many layers there are, by the names of tensors."""
    indices = [int(found[1]) for name in tensors if (found := re.match(r"layers\.(\d+)\.", name))]
    return 1 + max(indices, default=-1)


def check_vocabulary(config: Fields, tensors: Tensors, target: Fields) -> None:
    """Refuse a checkpoint, by our names, that was made for another vocabulary, or whose head's rows nobody can tell."""
    vocab_size = target["vocab_size"]
    if config.get("vocab_size") not in (None, vocab_size):
        raise ValueError(f"its vocabulary has {config['vocab_size']} tokens and the target's {vocab_size}")
    head = tensors.get("lm_head.weight")
    if head is not None and head.shape[0] != vocab_size and "draft_token_ids" not in tensors:
        raise ValueError(f"its head has {head.shape[0]} rows, and without a d2t nobody knows which tokens they are")
    ids = tensors.get("draft_token_ids")
    if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"its d2t leads to tokens from {int(ids.min())} to {int(ids.max())}, of {vocab_size}")


def check_features(tensors: Tensors, layers: tuple[int, ...], target: Fields, wanted: int | None = None) -> None:
    """Refuse a checkpoint, by our names, whose `fc` does not read the features of `layers`, or `wanted` numbers instead."""
    if min(layers) < 1 or max(layers) > target["num_hidden_layers"]:
        raise ValueError(f"it reads layers {layers} of a target that has {target['num_hidden_layers']}")
    rows_of(tensors, "fc.weight")
    width = tensors["fc.weight"].shape[1]
    wanted = wanted or len(layers) * target["hidden_size"]
    if width != wanted:
        raise ValueError(
            f"its fc reads {width} numbers, and {wanted} are what {len(layers)} layers of this target "
            f"(width {target['hidden_size']}) give"
        )


def rows_of(tensors: Tensors, name: str) -> int:
    """How many rows a matrix has."""
    if name not in tensors or tensors[name].ndim != 2:
        raise ValueError(f"it has no matrix {name}")
    return tensors[name].shape[0]


def _share(rows: int, count: int, name: str, field: str) -> int:
    if count < 1 or rows % count:
        raise ValueError(f"{name} has {rows} rows, which {field} ({count}) does not divide")
    return rows // count
