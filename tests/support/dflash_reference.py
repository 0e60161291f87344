"""DFlash checkpoints in published layouts, small and random, and what they compute in plain tensor operations.

Written from the description of the format and sharing nothing with the package: every row sees a list of rows that is made for
it alone, and nothing is kept from block to block.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, silu

HEADS, KV_HEADS, SIZE, HIDDEN, INTERMEDIATE = 4, 2, 6, 32, 40
VOCAB, MASK, EPS = 104, 91, 1e-6  # of the tests' target families


@dataclass(frozen=True, eq=False)
class Layout:
    """One way to publish a DFlash drafter, and how it is to be read.

    Args:
        name: what tests print.
        config: fields of its config.json beside those of every one.
        layers: which of the target's `hidden_states` it reads.
        block: rows of a block.
        windows: for each of its layers how many tokens it looks back; None for all.
        causal: for each of its layers whether rows see no later ones of the block.
        anchored: whether windows count from the block's start.
        from_anchor: whether the last token's row drafts, too.
        num_drafted: tokens that its own head knows; None for the target's head.
        bias: whether attention has biases.
        own_embedding: whether it has an embedding.
        theta, scale, multiplier, softcap: of angles, embeddings and logits.
        prefix: before the names of its tensors.
        as_pickle: whether it is published as a pickle.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = (1, 2, 3)
    block: int = 6
    windows: tuple[int | None, ...] = (None, None)
    causal: tuple[bool, ...] = (False, False)
    anchored: bool = False
    from_anchor: bool = False
    num_drafted: int | None = None
    bias: bool = False
    own_embedding: bool = False
    theta: float = 10000.0
    scale: float = 1.0
    multiplier: float = 1.0
    softcap: float | None = None
    prefix: str = ""
    as_pickle: bool = False

    def __repr__(self) -> str:
        return self.name

    @property
    def depth(self) -> int:
        return self.block - (not self.from_anchor)

    def fields(self) -> dict[str, Any]:
        base = {
            "model_type": "qwen3", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS, "head_dim": SIZE, "num_hidden_layers": len(self.windows), "vocab_size": VOCAB,
            "hidden_act": "silu", "rms_norm_eps": EPS, "max_position_embeddings": 512, "attention_bias": self.bias,
        }  # fmt: skip
        if "transformer_layer_config" in self.config:
            nested = {**base, **self.config["transformer_layer_config"]}
            return {**self.config, "transformer_layer_config": nested, "draft_vocab_size": self.num_drafted or VOCAB}
        return {**base, "architectures": ["DFlashDraftModel"], "num_target_layers": 3, **self.config}

    def weights(self, seed: int = 0) -> dict[str, Tensor]:
        """In float64, by the names that z-lab has for them."""
        shapes: dict[str, tuple[int, ...]] = {"fc.weight": (HIDDEN, HIDDEN * len(self.layers))}
        shapes |= {"hidden_norm.weight": (HIDDEN,), "norm.weight": (HIDDEN,)}
        for index in range(len(self.windows)):
            name = f"layers.{index}"
            heads = {"q": HEADS * SIZE, "k": KV_HEADS * SIZE, "v": KV_HEADS * SIZE}
            shapes |= {f"{name}.self_attn.{part}_proj.weight": (rows, HIDDEN) for part, rows in heads.items()}
            shapes |= {f"{name}.self_attn.o_proj.weight": (HIDDEN, HEADS * SIZE)}
            shapes |= {f"{name}.self_attn.{part}_norm.weight": (SIZE,) for part in "qk"}
            shapes |= {f"{name}.mlp.{part}_proj.weight": (INTERMEDIATE, HIDDEN) for part in ("gate", "up")}
            shapes |= {f"{name}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
            shapes |= {f"{name}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        if self.bias:
            projections = [name for name in shapes if "self_attn" in name and "proj" in name]
            shapes |= {name.replace("weight", "bias"): shapes[name][:1] for name in projections}
        if self.num_drafted is not None:
            shapes["lm_head.weight"] = (self.num_drafted, HIDDEN)
        if self.own_embedding:
            shapes["embed_tokens.weight"] = (VOCAB, HIDDEN)
        generator = torch.Generator().manual_seed(seed)

        def draw(name, shape):
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            return noise * 2 / shape[1] ** 0.5 if len(shape) > 1 else noise * 0.3 + ("norm" in name)

        return {name: draw(name, shape) for name, shape in shapes.items()}

    def token_ids(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 1)
        if self.num_drafted is None:
            return torch.arange(VOCAB)
        return torch.randperm(VOCAB, generator=generator)[: self.num_drafted].sort().values

    def publish(self, folder: Path, seed: int = 0) -> Path:
        """Write the checkpoint; returns its folder."""
        folder.mkdir(parents=True, exist_ok=True)
        named = {f"{self.prefix}{name}": tensor for name, tensor in self.weights(seed).items()}
        if self.num_drafted is not None:
            ids = self.token_ids(seed)
            named["d2t"], named["t2d"] = ids - torch.arange(len(ids)), torch.isin(torch.arange(VOCAB), ids)
        if self.as_pickle:
            torch.save(named, folder / "pytorch_model.bin")
        else:
            save_file(named, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.fields()))
        return folder


def run(layout: Layout, table: Tensor, features: Tensor, root: int) -> Tensor:
    """What comes out of all rows of a block, (block, H), behind features (L, layers * H) and the last token."""
    weights = layout.weights()
    table = weights["embed_tokens.weight"] if layout.own_embedding else table
    context = _norm(linear(features, weights["fc.weight"]), weights["hidden_norm.weight"])
    hidden = layout.scale * table[[root] + [MASK] * (layout.block - 1)]
    for index in range(len(layout.windows)):
        name = f"layers.{index}"
        read = _norm(hidden, weights[f"{name}.input_layernorm.weight"])
        hidden = hidden + _attention(layout, weights, index, context, read)
        read = _norm(hidden, weights[f"{name}.post_attention_layernorm.weight"])
        gate, up = (linear(read, weights[f"{name}.mlp.{part}_proj.weight"]) for part in ("gate", "up"))
        hidden = hidden + linear(silu(gate) * up, weights[f"{name}.mlp.down_proj.weight"])
    return hidden


def log_probs(layout: Layout, table: Tensor, head: Tensor, features: Tensor, root: int) -> Tensor:
    """What a block says of each of its depths, (depth, V), -inf for what it cannot draft."""
    weights = layout.weights()
    states = _norm(run(layout, table, features, root), weights["norm.weight"])[-layout.depth :]
    logits = layout.multiplier * linear(states, weights.get("lm_head.weight", head))
    if layout.softcap is not None:
        logits = layout.softcap * (logits / layout.softcap).tanh()
    answer = torch.full((layout.depth, VOCAB), -torch.inf, dtype=torch.float64)
    answer[:, layout.token_ids()] = logits.log_softmax(-1)
    return answer


def best_paths(marginals: Tensor, top_k: int, size: int) -> list[tuple[float, tuple[int, ...]]]:
    """The `size` best paths of tokens through marginals (D, V) of which `top_k` of each depth are looked at, by trying all."""
    likeliest = [row.topk(top_k).indices.tolist() for row in marginals]
    paths = itertools.chain.from_iterable(
        itertools.product(*likeliest[:depth]) for depth in range(1, len(likeliest) + 1)
    )
    scored = [(sum(float(marginals[at, token]) for at, token in enumerate(path)), path) for path in paths]
    return sorted(scored, reverse=True)[:size]


def _attention(layout: Layout, weights: dict[str, Tensor], index: int, context: Tensor, read: Tensor) -> Tensor:
    """Rows of the block (block, H) attend to context (L, H) and to themselves."""
    name, length = f"layers.{index}.self_attn", len(context)
    rows = torch.cat([context, read])
    queries = _heads(weights, f"{name}.q", read, torch.arange(length, length + len(read)), layout.theta)
    keys = _heads(weights, f"{name}.k", rows, torch.arange(len(rows)), layout.theta)
    values = linear(rows, weights[f"{name}.v_proj.weight"], weights.get(f"{name}.v_proj.bias")).view(
        len(rows), -1, SIZE
    )
    out = []
    for row in range(len(read)):
        seen = [at for at in range(len(rows)) if _sees(layout, index, length, length + row, at)]
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = keys[seen, group] @ queries[row, head] / SIZE**0.5
            heads.append(scores.softmax(-1) @ values[seen, group])
        out.append(torch.cat(heads))
    return linear(torch.stack(out), weights[f"{name}.o_proj.weight"], weights.get(f"{name}.o_proj.bias"))


def _sees(layout: Layout, index: int, start: int, row: int, other: int) -> bool:
    """Whether a row of a block that begins at `start` sees another one, both by their positions."""
    window = layout.windows[index]
    if other >= start and other > row and layout.causal[index]:
        return False
    if window is None:
        return True
    if layout.anchored:
        return other >= start - window
    return abs(row - other) < window


def _heads(weights: dict[str, Tensor], name: str, read: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Normed and turned, (rows, heads, SIZE)."""
    states = linear(read, weights[f"{name}_proj.weight"], weights.get(f"{name}_proj.bias")).view(len(read), -1, SIZE)
    states = _norm(states, weights[f"{name}_norm.weight"])
    frequencies = (
        1.0 / theta ** (torch.arange(0, SIZE, 2).float() / SIZE)
    ).double()  # float32, as transformers makes them
    angles = (positions.double()[:, None] * frequencies)[:, None]
    first, second = states.chunk(2, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def _norm(states: Tensor, weight: Tensor) -> Tensor:
    return states / (states.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def _zlab(block: int = 6, ids: list[int] | None = None, **more: Any) -> dict[str, Any]:
    """Fields of the older files, whose `block_size` stands at the top."""
    return {
        "block_size": block,
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": ids or [0, 1, 2]},
        **more,
    }


def _newer(sliding: int, kinds: str, **inner: Any) -> dict[str, Any]:
    """Fields of the newer ones, with a window; a kind a layer, s or f."""
    types = [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in kinds]
    inner = {"block_size": 5, "mask_token_id": MASK, "target_layer_ids": [0, 2], **inner}
    return {"layer_types": types, "sliding_window": sliding, "use_sliding_window": True, "dflash_config": inner}


def _speculators(ids: list[int], kinds: str = "ff", window: int | None = None, **more: Any) -> dict[str, Any]:
    types = [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in kinds]
    nested = {
        "layer_types": types, "sliding_window": window, "use_sliding_window": window is not None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }  # fmt: skip
    return {
        "architectures": ["DFlashDraftModel"], "speculators_model_type": "dflash", "aux_hidden_state_layer_ids": ids,
        "mask_token_id": MASK, "target_hidden_size": None, "transformer_layer_config": nested, **more,
    }  # fmt: skip


SCALED = {"input_embedding_scale": 3.0, "output_multiplier": 0.7, "final_logit_softcapping": 2.5}
LAYOUTS = [
    Layout("zlab", _zlab(rope_theta=300.0), theta=300.0),
    Layout("zlab-pickle-biases-own-embedding", _zlab(4, [2, 1]), (3, 2), 4, bias=True, own_embedding=True, as_pickle=True),
    Layout("zlab-default-layers", {"block_size": 6, "mask_token_id": MASK}, (2, 1), prefix="model."),
    Layout("zlab-causal", _zlab(is_causal=True), causal=(True, True)),
    Layout("zlab-sliding", _newer(4, "sf", **SCALED), (1, 3), 5, (4, None), (True, False), scale=3.0, multiplier=0.7,
           softcap=2.5),
    Layout("zlab-sliding-both-ways", {**_newer(3, "ss"), "is_causal": False}, (1, 3), 5, (3, 3)),
    Layout("speculators", _speculators([1, 2, 3], block_size=5), block=5, num_drafted=48, theta=500.0),
    Layout("speculators-anchored", _speculators([2, 3], "sf", 4, sample_from_anchor=True, block_size=5), (2, 3), 5, (4, None),
           (True, False), True, True, theta=500.0),
    Layout("speculators-anchored-both-ways", _speculators([1], "fs", 3, sliding_window_non_causal=True), (1,), 8, (None, 3),
           anchored=True, num_drafted=60, theta=500.0),
]  # fmt: skip
