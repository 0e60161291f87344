"""EAGLE checkpoints in published layouts, small and random, and what they compute in plain tensor operations.

Written from the description of the formats and sharing nothing with the package: every row is run anew for every token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HEADS, INTERMEDIATE = 4, 40
VOCAB = 104  # of the tests' target families


@dataclass(frozen=True, eq=False)
class Layout:
    """One way to publish an EAGLE drafter, and how it is to be read.

    Args:
        name: what tests print.
        config: fields of its config.json beside those of every one.
        layers: which of the target's `hidden_states` it reads.
        prefix, first: how its tensors are called, and its first layer.
        hidden: its width; the target's is 32.
        kv_heads, head_dim, eps, theta: of its attention.
        num_drafted: tokens that it drafts; None for all.
        biases: projections that have one.
        planes: for every rotary channel time (0), height (1) or width (2); None for one-dimensional positions.
        image_rows: what is read of pictures: the placeholder's embedding ("token"), the merged one ("merged"), that past
            `fc` ("direct", MSD), or a few vectors for all of a picture ("compressed", ViSpec).
        num_queries: learned queries of ViSpec's adaptor.
        as_pickle: whether it is published as a pickle.
        family: the target family it is for.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] = (1, 2, 3)
    prefix: str = ""
    first: str = "midlayer"
    generation: int = 3
    hidden: int = 32
    kv_heads: int = 2
    head_dim: int = 8
    eps: float = 1e-6
    theta: float = 10000.0
    num_drafted: int | None = 48
    num_layers: int = 1
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    feedback_normed: bool = False
    final_norm: bool = True
    input_norm: bool = False
    own_embedding: bool = False
    planes: tuple[int, ...] | None = None
    image_rows: str = "token"
    num_queries: int = 0
    as_pickle: bool = False
    family: str = "llama"

    def __repr__(self) -> str:
        return self.name

    def fields(self) -> dict[str, Any]:
        base = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS, "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.eps, "hidden_act": "silu", "vocab_size": VOCAB, "max_position_embeddings": 512,
        }  # fmt: skip
        if "transformer_layer_config" in self.config:
            nested = {**base, **self.config["transformer_layer_config"]}
            return {**self.config, "transformer_layer_config": nested, "draft_vocab_size": self.num_drafted or VOCAB}
        return {**base, "draft_vocab_size": self.num_drafted or VOCAB, **self.config}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By the names of the first generation of programs, `layers.0` for the first layer."""
        hidden, width = self.hidden, 2 * self.hidden if self.generation == 3 else self.hidden
        heads, keys = HEADS * self.head_dim, self.kv_heads * self.head_dim
        num_read = len(self.layers) * 32 if self.generation == 3 else 2 * hidden
        shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, num_read)}
        for index in range(self.num_layers):
            name, size = f"layers.{index}", width if index == 0 else hidden
            shapes |= {f"{name}.self_attn.{part}_proj.weight": (keys, size) for part in "kv"}
            shapes |= {f"{name}.self_attn.q_proj.weight": (heads, size)}
            shapes |= {f"{name}.self_attn.o_proj.weight": (hidden, heads)}
            shapes |= {f"{name}.mlp.{part}_proj.weight": (INTERMEDIATE, hidden) for part in ("gate", "up")}
            shapes |= {f"{name}.mlp.down_proj.weight": (hidden, INTERMEDIATE)}
            norms = ["post_attention_layernorm"] + (
                ["input_layernorm"] if self.generation == 3 or self.input_norm else []
            )
            norms += ["hidden_norm"] if self.generation == 3 and index == 0 else []
            shapes |= {f"{name}.{norm}.weight": (hidden,) for norm in norms}
            if self.qk_norm:
                shapes |= {f"{name}.self_attn.{part}_norm.weight": (self.head_dim,) for part in "qk"}
        if self.generation == 3:
            shapes |= {"norm.weight": (hidden,), "lm_head.weight": (self.num_drafted or VOCAB, hidden)}
        elif self.final_norm:
            shapes["norm.weight"] = (hidden,)
        if self.norm_before_fc:
            shapes["input_norm.weight"] = (num_read,)
        if self.fc_norm:
            shapes |= {f"fc_norm.{index}.weight": (32,) for index in range(len(self.layers))}
        if self.own_embedding or self.generation == 1:
            shapes["embed_tokens.weight"] = (VOCAB, hidden)
        if self.num_queries:
            shapes |= {"img_fc.weight": (hidden, 2 * hidden), "imadpt.q": (self.num_queries, HEADS, self.head_dim)}
            shapes |= {f"imadpt.{part}_proj.weight": (heads, hidden) for part in "kv"}
            shapes["imadpt.o_proj.weight"] = (hidden, heads)
        matrices = [name for name in shapes if len(shapes[name]) == 2]
        shapes |= {name.replace("weight", "bias"): shapes[name][:1] for name in matrices
                   if any(part in name for part in self.biases)}  # fmt: skip
        return shapes

    def weights(self, seed: int = 0) -> dict[str, Tensor]:
        """In float64, by the names of `shapes`."""
        generator = torch.Generator().manual_seed(seed)

        def draw(name, shape):
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            if len(shape) > 1:
                return noise * (3 if "lm_head" in name else 1.5) / shape[1] ** 0.5
            return noise * 0.3 + ("norm" in name)

        return {name: draw(name, shape) for name, shape in self.shapes().items()}

    def token_ids(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 1)
        if self.num_drafted is None or self.generation == 1:
            return torch.arange(VOCAB)
        return torch.randperm(VOCAB, generator=generator)[: self.num_drafted].sort().values

    def publish(self, folder: Path, seed: int = 0) -> Path:
        """Write the checkpoint; returns its folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(self.weights(seed))
        if self.num_drafted is not None and self.generation == 3:
            ids = self.token_ids(seed)
            tensors["d2t"] = ids - torch.arange(len(ids))
            tensors["t2d"] = torch.isin(torch.arange(VOCAB), ids)
        named = {}
        for name, tensor in tensors.items():
            prefix = "" if name in ("d2t", "t2d", "lm_head.weight") else self.prefix
            named[prefix + name.replace("layers.0.", f"{self.first}.")] = tensor
        if self.as_pickle:
            torch.save(named, folder / "pytorch_model.bin")
        else:
            save_file(named, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.fields()))
        return folder


def log_probs(layout: Layout, table: Tensor, head: Tensor, inputs: dict[str, Tensor], path: list[int]) -> Tensor:
    """What the drafter says below a prompt and along a path, (len(path) + 1, V).

    Args:
        layout: how it is wired.
        table: the target's embeddings, (V, 32).
        head: the target's head, (V, 32).
        inputs: `tokens` (L,), those behind each feature; `features` (L, layers * 32); `positions` (3, L); for drafters that
            read pictures `merged` (L, 32), what entered the decoder at these tokens, and `is_image` (L,).
        path: drafted tokens.
    """
    weights = layout.weights()
    table = weights["embed_tokens.weight"] if layout.own_embedding else table
    tokens, positions = inputs["tokens"], inputs["positions"]
    states = _fused(layout, weights, inputs["features"])
    said = []
    for token in [*path, None]:
        embeds = table[tokens]
        if layout.image_rows != "token":
            merged, is_image = inputs["merged"], inputs["is_image"]
            embeds = torch.stack([merged[at] if flag else embeds[at] for at, flag in enumerate(is_image)])
        out = _run(layout, weights, embeds, states, positions, inputs.get("is_image"))[-1]
        fed = _norm(out, weights["norm.weight"], layout.eps) if layout.feedback_normed else out
        read = (
            _norm(fed, weights["norm.weight"], layout.eps) if layout.final_norm and not layout.feedback_normed else fed
        )
        said.append((weights.get("lm_head.weight", head) @ read).log_softmax(-1))
        if token is not None:
            tokens = torch.cat([tokens, torch.tensor([token])])
            if layout.image_rows != "token":  # a drafted token is text
                none = torch.zeros(1, table.shape[1], dtype=torch.float64)
                inputs = {**inputs, "merged": torch.cat([inputs["merged"], none])}
                inputs["is_image"] = torch.cat([inputs["is_image"], torch.tensor([False])])
            states = torch.cat([states, fed[None]])
            positions = torch.cat([positions, positions.max() + torch.ones(3, 1, dtype=torch.long)], dim=1)
    answer = torch.full((len(said), VOCAB), -torch.inf, dtype=torch.float64)
    answer[:, layout.token_ids()] = torch.stack(said)
    return answer


def _fused(layout: Layout, weights: dict[str, Tensor], features: Tensor) -> Tensor:
    if layout.generation == 1:
        return features
    if layout.norm_before_fc:
        features = _norm(features, weights["input_norm.weight"], layout.eps)
    if layout.fc_norm:
        parts = features.split(32, dim=-1)
        normed = [_norm(part, weights[f"fc_norm.{at}.weight"], layout.eps) for at, part in enumerate(parts)]
        features = torch.cat(normed, dim=-1)
    return _linear(weights, "fc", features)


def _mixed(layout: Layout, weights: dict[str, Tensor], embeds: Tensor, states: Tensor, is_image: Tensor | None):
    """What enters the layer in the first generation, and of which rows: (R, H), (R,)."""
    entering, places, picture = [], [], []
    context = torch.zeros(layout.hidden, dtype=torch.float64)
    for at, (embed, state) in enumerate(zip(embeds, states, strict=True)):
        if layout.image_rows in ("direct", "compressed") and is_image is not None and is_image[at]:
            picture.append(embed)
            continue
        if picture and layout.image_rows == "compressed":
            *picture, context = _looked_at(weights, torch.stack(picture), len(picture))
        entering += picture
        places += range(at - len(picture), at)
        picture = []
        read = _linear(weights, "img_fc", torch.cat([state, context])) if layout.num_queries else state
        entering.append(_linear(weights, "fc", torch.cat([embed, read])))
        places.append(at)
    return torch.stack(entering), torch.tensor(places)


def _looked_at(weights: dict[str, Tensor], embeds: Tensor, most: int) -> list[Tensor]:
    """What ViSpec's queries make of a picture, the last one's for text; of the others no more than `most`."""
    queries = weights["imadpt.q"]
    keys, values = (
        _linear(weights, f"imadpt.{part}_proj", embeds).view(len(embeds), *queries.shape[1:]) for part in "kv"
    )
    made = []
    for query in queries:
        heads = [
            (keys[:, head] @ query[head] / len(query[head]) ** 0.5).softmax(-1) @ values[:, head]
            for head in range(HEADS)
        ]
        made.append(_linear(weights, "imadpt.o_proj", torch.cat(heads)))
    return [*made[:-1][-most:], made[-1]]


def _run(
    layout: Layout,
    weights: dict[str, Tensor],
    embeds: Tensor,
    states: Tensor,
    positions: Tensor,
    is_image: Tensor | None = None,
) -> Tensor:
    """What comes out of all rows, (L, H)."""
    hidden = states
    if layout.generation == 1:
        hidden, places = _mixed(layout, weights, embeds, states, is_image)
        positions = positions[:, places]
    for index in range(layout.num_layers):
        name = f"layers.{index}"
        read = hidden
        if layout.generation == 3 or layout.input_norm:
            read = _norm(
                embeds if index == 0 and layout.generation == 3 else hidden,
                weights[f"{name}.input_layernorm.weight"],
                layout.eps,
            )
        if layout.generation == 3 and index == 0:
            normed = _norm(hidden, weights[f"{name}.hidden_norm.weight"], layout.eps)
            read = torch.cat([read, normed], dim=-1)
            hidden = normed if layout.norm_before_residual else hidden
        hidden = hidden + _attention(layout, weights, f"{name}.self_attn", read, positions)
        read = _norm(hidden, weights[f"{name}.post_attention_layernorm.weight"], layout.eps)
        gate = torch.nn.functional.silu(_linear(weights, f"{name}.mlp.gate_proj", read))
        hidden = hidden + _linear(
            weights, f"{name}.mlp.down_proj", gate * _linear(weights, f"{name}.mlp.up_proj", read)
        )
    return hidden


def _attention(layout: Layout, weights: dict[str, Tensor], name: str, read: Tensor, positions: Tensor) -> Tensor:
    num_rows, size = len(read), layout.head_dim
    queries, keys, values = (_linear(weights, f"{name}.{part}_proj", read).view(num_rows, -1, size) for part in "qkv")
    if layout.qk_norm:
        queries = _norm(queries, weights[f"{name}.q_norm.weight"], layout.eps)
        keys = _norm(keys, weights[f"{name}.k_norm.weight"], layout.eps)
    out = torch.zeros(num_rows, HEADS, size, dtype=torch.float64)
    planes = torch.tensor(layout.planes or [0] * (size // 2))
    angles = positions[planes].T.double() * layout.theta ** (
        -torch.arange(0, size, 2).double() / size
    )  # (L, size / 2)
    queries, keys = (_rotated(states, angles) for states in (queries, keys))
    for query_head in range(HEADS):
        key_head = query_head // (HEADS // layout.kv_heads)
        for row in range(num_rows):
            scores = keys[: row + 1, key_head] @ queries[row, query_head] / size**0.5
            out[row, query_head] = scores.softmax(-1) @ values[: row + 1, key_head]
    return _linear(weights, f"{name}.o_proj", out.flatten(1))


def _rotated(states: Tensor, angles: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states / (states.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _linear(weights: dict[str, Tensor], name: str, states: Tensor) -> Tensor:
    out = states @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


MSD_QWEN = {
    "model_type": "qwen2_vl",
    "rope_theta": 300.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
}
IDS = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
SPECULATORS: dict[str, Any] = {
    "architectures": ["Eagle3DraftModel"], "speculators_model_type": "eagle3", "target_hidden_size": None,
    "norm_before_residual": False, "norm_output": False, **IDS,
    "transformer_layer_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}  # fmt: skip
SPECFORGE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True},
}
ANGELSLIM: dict[str, Any] = {
    "architectures": ["Eagle3LlamaForCausalLM"],
    "modal_type": "VLM",
    "aux_hidden_states_layer_ids": [0, 1, 2],
}
CONTAINER: dict[str, Any] = {"first": "layers.0", "theta": 500.0, "own_embedding": True}
LAYOUTS = [
    Layout("eagle1", {"bias": True}, (3,), first="layers.0", generation=1, kv_heads=4, biases=("fc",), final_norm=False,
           as_pickle=True),
    Layout("eagle2-qwen", {"bias": False, "rope_theta": 300.0}, (3,), first="layers.0", generation=1, theta=300.0,
           biases=("q_proj", "k_proj", "v_proj"), final_norm=False),
    Layout("nemo-eagle1", {}, (3,), prefix="model.", first="layers.0", generation=1, input_norm=True, feedback_normed=True),
    Layout("vispec", {}, (3,), first="layers.0", generation=1, kv_heads=4, biases=("fc",), final_norm=False,
           image_rows="compressed", num_queries=2, family="llava_clip_llama"),
    Layout("vispec-qwen", {"bias": False, "rope_theta": 300.0}, (3,), first="layers.0", generation=1, kv_heads=4, theta=300.0,
           biases=("q_proj", "k_proj", "v_proj"), final_norm=False, image_rows="compressed", num_queries=4, as_pickle=True,
           family="qwen2_5_vl"),
    Layout("msd", {"mm_projector_type": "mlp2x_gelu"}, (3,), first="layers.0", generation=1, kv_heads=4, biases=("fc",),
           final_norm=False, own_embedding=True, image_rows="direct", family="llava_clip_llama"),
    Layout("msd-qwen", MSD_QWEN, (3,), first="layers.0", generation=1, theta=300.0, biases=("fc", "q_proj", "k_proj", "v_proj"),
           final_norm=False, input_norm=True, own_embedding=True, image_rows="direct", family="qwen2_vl"),
    Layout("eagle3", SPECFORGE, eps=1e-5),
    Layout("eagle3-pickle-all-tokens", {**SPECFORGE, "num_hidden_layers": 8, "head_dim": 99}, num_drafted=None, kv_heads=1,
           as_pickle=True),
    Layout("eagle3-narrow", SPECFORGE, hidden=24, head_dim=6, own_embedding=True),
    Layout("eagle3-head-without-norm", {**SPECFORGE, "norm_output": False}, final_norm=False),
    Layout("eagle3.1-of-specforge", {**SPECFORGE, "norm_output": True, "fc_norm": True}, fc_norm=True),
    Layout("speculators-residual", {**SPECULATORS, "norm_before_residual": True}, norm_before_residual=True, **CONTAINER),
    Layout("speculators-qwen", SPECULATORS, qk_norm=True, **{**CONTAINER, "head_dim": 10}),
    Layout("speculators-two-layers", SPECULATORS, num_layers=2, num_drafted=None, biases=("_proj",), **CONTAINER),
    Layout("speculators-3.1", {**SPECULATORS, "fc_norm": True, "norm_output": True,
                               "eagle_aux_hidden_state_layer_ids": [1, 2, 3, 2]},
           (1, 2, 3, 2), fc_norm=True, feedback_normed=True, **CONTAINER),
    Layout("speculators-norm-before-fc", {**SPECULATORS, "norm_before_fc": True}, norm_before_fc=True, **CONTAINER),
    Layout("nemo-3.1", {**SPECFORGE, "fc_norm": True, "norm_output": True}, prefix="model.", first="layers.0",
           fc_norm=True, feedback_normed=True),
    Layout("angelslim-interleaved", {**ANGELSLIM, "rope_theta": 400.0, "rope_scaling": {
        "rope_type": "default", "mrope_section": [2, 1, 1]}}, theta=400.0, planes=(0, 1, 2, 0), family="qwen3_vl"),
    Layout("angelslim-plain", {**ANGELSLIM, "rope_theta": 400.0, "rope_scaling": None}, family="qwen3_vl"),
    Layout("specforge-chunked", {**SPECFORGE, "rope_theta": 400.0, "rope_scaling": {
        "type": "mrope", "mrope_section": [2, 1, 1]}}, theta=400.0, planes=(0, 0, 1, 2), family="qwen2_5_vl"),
]  # fmt: skip
