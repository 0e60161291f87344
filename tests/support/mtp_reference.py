"""MTP heads of Qwen3-Next's and Qwen3.5's kind, small and random, and what they compute in plain tensor operations.

Written from the description of the format and sharing nothing with the package or with transformers' layers: every row is run
anew for every token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, silu

from dream_hf.drafters.detection import MTP_PREFIXES

Weights = dict[str, Tensor]
LAYER = "mtp.layers.0"
SPECULATORS = {
    "mtp.fc": "input_proj", "mtp.pre_fc_norm_embedding": "token_layernorm", "mtp.norm": "final_layernorm",
    "mtp.pre_fc_norm_hidden": "hidden_layernorm", LAYER: "",
}  # fmt: skip


def shapes(config: Any, is_dense: bool) -> dict[str, tuple[int, ...]]:
    """By their names in a target's checkpoint; `config` is of the target's text model."""
    width, heads, keys, size = (
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )  # fmt: skip
    found: dict[str, tuple[int, ...]] = {"mtp.fc.weight": (width, 2 * width)}
    norms = ["mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"]
    norms += [f"{LAYER}.input_layernorm", f"{LAYER}.post_attention_layernorm"]
    found |= {f"{name}.weight": (width,) for name in norms}
    found |= {f"{LAYER}.self_attn.{part}_norm.weight": (size,) for part in "qk"}
    found |= {f"{LAYER}.self_attn.{part}_proj.weight": (keys * size, width) for part in "kv"}
    found[f"{LAYER}.self_attn.q_proj.weight"] = (2 * heads * size, width)  # of each head the queries, then their gate
    found[f"{LAYER}.self_attn.o_proj.weight"] = (width, heads * size)
    if is_dense:
        return found | _mlp(f"{LAYER}.mlp", config.intermediate_size, width)
    inner, number = config.moe_intermediate_size, config.num_experts
    found |= _mlp(f"{LAYER}.mlp.shared_expert", config.shared_expert_intermediate_size, width)
    found |= {f"{LAYER}.mlp.gate.weight": (number, width), f"{LAYER}.mlp.shared_expert_gate.weight": (1, width)}
    for index in range(number):
        found |= _mlp(f"{LAYER}.mlp.experts.{index}", inner, width)
    return found


def _mlp(name: str, inner: int, width: int) -> dict[str, tuple[int, ...]]:
    up = {f"{name}.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
    return up | {f"{name}.down_proj.weight": (width, inner)}


def weights(config: Any, is_dense: bool | None = None, seed: int = 0) -> Weights:
    """In float64; experts one by one."""
    generator = torch.Generator().manual_seed(seed)
    dense = not hasattr(config, "num_experts") if is_dense is None else is_dense

    def draw(shape):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return 2 * noise / shape[1] ** 0.5 if len(shape) > 1 else 0.3 * noise

    return {name: draw(shape) for name, shape in shapes(config, dense).items()}


def publish(folder: Path, target: Any, tensors: Weights, config: dict[str, Any] | None = None) -> Path:
    """A checkpoint with a shard of the target's own tensors, and one of an MTP head's and one more of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    target.config.save_pretrained(folder)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    own = {name: tensor.contiguous() for name, tensor in target.state_dict().items()}
    last = next(reversed(own))
    shards = {
        "model-1.safetensors": {k: v for k, v in own.items() if k != last},
        "model-2.safetensors": tensors | {last: own[last]},
    }
    for name, shard in shards.items():
        save_file({key: value.clone() for key, value in shard.items()}, folder / name)
    index = {"metadata": {}, "weight_map": {key: name for name, shard in shards.items() for key in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def stacked(tensors: Weights) -> Weights:
    """The same with all experts side by side, as some checkpoints have them."""
    experts = f"{LAYER}.mlp.experts"
    single = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{experts}.")}
    number = len(single) // 3
    both = [torch.cat([single[f"{experts}.{i}.{part}_proj.weight"] for part in ("gate", "up")]) for i in range(number)]
    down = [single[f"{experts}.{i}.down_proj.weight"] for i in range(number)]
    rest = {name: tensor for name, tensor in tensors.items() if name not in single}
    return rest | {f"{experts}.gate_up_proj": torch.stack(both), f"{experts}.down_proj": torch.stack(down)}


def as_speculators(tensors: Weights) -> Weights:
    """The same by speculators' names."""
    found = {}
    for name, tensor in tensors.items():
        start = next(start for start in SPECULATORS if name.startswith(f"{start}."))
        found[".".join(part for part in ("mtp_layers.0", SPECULATORS[start], name[len(start) + 1 :]) if part)] = tensor
    assert all(name.startswith(MTP_PREFIXES) for name in found)
    return found


def run(tensors: Weights, config: Any, embeds: Tensor, states: Tensor, positions: Tensor) -> Tensor:
    """What comes out of all rows, (L, H), of embeddings and states (L, H), at positions (3, L)."""
    read = [_norm(embeds, tensors, "mtp.pre_fc_norm_embedding"), _norm(states, tensors, "mtp.pre_fc_norm_hidden")]
    hidden = linear(torch.cat(read, dim=-1), tensors["mtp.fc.weight"])
    hidden = hidden + _attention(tensors, config, _norm(hidden, tensors, f"{LAYER}.input_layernorm"), positions)
    read = _norm(hidden, tensors, f"{LAYER}.post_attention_layernorm")
    if f"{LAYER}.mlp.gate_proj.weight" in tensors:
        hidden = hidden + _gated(tensors, f"{LAYER}.mlp", read)
    else:
        hidden = hidden + torch.stack([_experts(tensors, config, row) for row in read])
    return _norm(hidden, tensors, "mtp.norm")


def _attention(tensors: Weights, config: Any, read: Tensor, positions: Tensor) -> Tensor:
    size, heads = config.head_dim, config.num_attention_heads
    both = linear(read, tensors[f"{LAYER}.self_attn.q_proj.weight"]).view(len(read), heads, 2, size)
    keys, values = (
        linear(read, tensors[f"{LAYER}.self_attn.{part}_proj.weight"]).view(len(read), -1, size) for part in "kv"
    )
    queries = _turned(config, _norm(both[:, :, 0], tensors, f"{LAYER}.self_attn.q_norm"), positions)
    keys = _turned(config, _norm(keys, tensors, f"{LAYER}.self_attn.k_norm"), positions)
    out = torch.zeros(len(read), heads, size, dtype=read.dtype)
    later = torch.ones(len(read), len(read), dtype=torch.bool).triu(1)
    for head in range(heads):
        group = head // (heads // keys.shape[1])
        scores = (queries[:, head] @ keys[:, group].T / size**0.5).masked_fill(later, -torch.inf)
        out[:, head] = scores.softmax(-1) @ values[:, group]
    return linear((out * both[:, :, 1].sigmoid()).flatten(1), tensors[f"{LAYER}.self_attn.o_proj.weight"])


def _turned(config: Any, heads: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of the first channels of heads (L, heads, size); of the three planes channels take turns."""
    rope = config.rope_parameters
    num_turned = int(config.head_dim * rope["partial_rotary_factor"])
    channels = torch.arange(num_turned // 2)
    planes = torch.zeros_like(channels)
    for plane in (1, 2):
        planes[(channels % 3 == plane) & (channels < 3 * rope.get("mrope_section", [99, 0, 0])[plane])] = plane
    frequencies = (1 / rope["rope_theta"] ** (2 * channels.float() / num_turned)).double()
    angles = (positions[planes].T * frequencies)[:, None]  # (L, 1, channels)
    first, second, rest = heads.split([num_turned // 2, num_turned // 2, config.head_dim - num_turned], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _gated(tensors: Weights, name: str, read: Tensor) -> Tensor:
    gate, up = (linear(read, tensors[f"{name}.{part}_proj.weight"]) for part in ("gate", "up"))
    return linear(silu(gate) * up, tensors[f"{name}.down_proj.weight"])


def _experts(tensors: Weights, config: Any, row: Tensor) -> Tensor:
    name = f"{LAYER}.mlp"
    shares, chosen = linear(row, tensors[f"{name}.gate.weight"]).softmax(-1).topk(config.num_experts_per_tok)
    out = linear(row, tensors[f"{name}.shared_expert_gate.weight"]).sigmoid() * _gated(
        tensors, f"{name}.shared_expert", row
    )
    for share, index in zip(shares / shares.sum(), chosen.tolist(), strict=True):
        out = out + share * _gated(tensors, f"{name}.experts.{index}", row)
    return out


def _norm(states: Tensor, tensors: Weights, name: str) -> Tensor:
    """RMS norm whose weights are differences from one."""
    return states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + tensors[f"{name}.weight"])


class Reader:
    """What a head says below a text, of one row of a batch.

    Args:
        tensors: its weights.
        config: of the target's text model.
        table, head: the target's, (V, H) each.
        embeds: (L, H), of the tokens behind each of the text's, what was merged at pictures included.
        features: (L, H), the target's after its final norm.
        positions: (3, L).
    """

    def __init__(
        self,
        tensors: Weights,
        config: Any,
        table: Tensor,
        head: Tensor,
        embeds: Tensor,
        features: Tensor,
        positions: Tensor,
    ):
        self.tensors, self.config, self.table, self.head = tensors, config, table, head
        self.embeds, self.features, self.positions = embeds, features, positions
        self.known: dict[tuple[int, ...], Tensor] = {}

    def state(self, length: int, path: tuple[int, ...]) -> Tensor:
        """What comes out of the last row, (H,), when the text has `length` rows and `path` was drafted below it."""
        key = (length, *path)
        if key not in self.known:
            fed = [self.state(length, path[:depth]) for depth in range(len(path))]
            embeds = torch.cat([self.embeds[:length], self.table[list(path)]])
            states = torch.cat([self.features[:length], *(each[None] for each in fed)])
            positions = self.positions[:, :length]
            behind = positions.max() + torch.arange(1, len(path) + 1).expand(3, -1)
            self.known[key] = run(self.tensors, self.config, embeds, states, torch.cat([positions, behind], dim=1))[-1]
        return self.known[key]

    def log_probs(self, length: int, path: tuple[int, ...]) -> Tensor:
        """Of what follows, (V,)."""
        return (self.head @ self.state(length, path)).log_softmax(-1)
