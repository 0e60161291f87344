"""MTP heads as they are published: `mtp.*` inside a target's checkpoint, or by the names of speculators."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]

PREFIX, SPECULATORS_PREFIX = "mtp.", "mtp_layers."
# Names of speculators' for what stands around the layer; all others are the layer's.
SPECULATORS_NAMES = {
    "input_proj": "fc", "token_layernorm": "pre_fc_norm_embedding", "hidden_layernorm": "pre_fc_norm_hidden",
    "final_layernorm": "norm",
}  # fmt: skip
EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj\.weight")


def renamed(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The same tensors by the names of a target's checkpoint, without the `mtp.` before them; experts side by side.

    Raises:
        ValueError: More than one layer, an expert that is not whole, or what holds no numbers.
    """
    ours = {_our_name(name): tensor for name, tensor in tensors.items()}
    if len(ours) < len(tensors):
        raise ValueError("two of its tensors have the same meaning")
    if wrong := [name for name, tensor in ours.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{PREFIX}{wrong[0]} is {ours[wrong[0]].dtype}; quantised heads are not read")
    layers = {found[1] for name in ours if (found := re.match(r"layers\.(\d+)\.", name))}
    if layers - {"0"}:
        raise ValueError(f"it has {len(layers)} layers, each for a token of its own; heads of one layer are read")
    return with_stacked_experts(ours)


def _our_name(name: str) -> str:
    if not name.startswith(SPECULATORS_PREFIX):
        return name.removeprefix(PREFIX)
    index, _, inner = name.removeprefix(SPECULATORS_PREFIX).partition(".")
    part, _, rest = inner.partition(".")
    if index == "0" and part in SPECULATORS_NAMES:
        return f"{SPECULATORS_NAMES[part]}.{rest}"
    return f"layers.{index}.{inner}"


def with_stacked_experts(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Tensors in which those of single experts are what transformers' layers have: `gate_up_proj` and `down_proj` of all.

    Raises:
        ValueError: An expert lacks a part, or has one of another shape than the others.
    """
    whole, found = {}, {}
    for name, tensor in tensors.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            whole[name] = tensor
        else:
            found[match["experts"], int(match["index"]), match["part"]] = tensor
    for experts in {key[0] for key in found}:
        parts = {part: _stacked(found, experts, part) for part in ("gate", "up", "down")}
        if len({len(part) for part in parts.values()}) > 1 or parts["gate"].shape != parts["up"].shape:
            raise ValueError(f"the gates of {PREFIX}{experts} are of another shape than what they are for")
        whole[f"{experts}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        whole[f"{experts}.down_proj"] = parts["down"]
    return whole


def _stacked(found: Mapping[tuple[str, int, str], torch.Tensor], experts: str, part: str) -> torch.Tensor:
    """One part of all experts, (experts, rows, columns)."""
    mine = {index: tensor for (name, index, kind), tensor in found.items() if (name, kind) == (experts, part)}
    shapes = {tensor.shape for tensor in mine.values()}
    if not mine or sorted(mine) != list(range(len(mine))) or len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"{PREFIX}{experts} lacks the {part}_proj of some expert, or has one of another shape")
    return torch.stack([mine[index] for index in range(len(mine))])
