"""The converter against the published arithmetic, written here once more in plain tensor operations."""

import pickle
import zipfile

import pytest
import torch
from double import TIGHT, doubled, doubles
from published import (
    EPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    THETA,
    published_config,
    published_weights,
    write_published,
)
from transformers import DynamicCache, LlamaConfig

from dream_hf import DreamDrafter
from dream_hf.drafters.dream.conversion import convert_checkpoint

SHAPES = [pytest.param(4, id="all heads"), pytest.param(2, id="grouped heads")]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# -- the published arithmetic, without a line of ours -------------------------------------------------------------------


class Published:
    """Keys and values of what has been seen are kept in `seen`, by layer."""

    def __init__(self, weights, num_key_value_heads):
        self.weights, self.groups, self.seen = weights, HEADS // num_key_value_heads, {}

    def __call__(self, embeddings, features):
        start = self.seen[0][0].shape[2] if self.seen else 0
        hidden = self.self_attention_block(0, embeddings, start)
        mid = self.cross_attention_block(hidden, features, start)
        return self.norm(self.self_attention_block(2, mid, start), "norm.weight"), mid

    def self_attention_block(self, layer, hidden, start):
        name = f"layers.{layer}"
        normed = hidden if layer == 0 else self.norm(hidden, f"{name}.input_layernorm.weight")
        positions = torch.arange(start, start + hidden.shape[1])
        queries = self.rotate(self.project(normed, f"{name}.self_attn.q"), positions)
        keys = self.rotate(self.project(normed, f"{name}.self_attn.k"), positions)
        keys, values = self.remember(layer, keys, self.project(normed, f"{name}.self_attn.v"))
        visible = torch.arange(keys.shape[2]) <= positions[:, None]
        hidden = hidden + self.attend(queries, self.repeat(keys), self.repeat(values), visible, f"{name}.self_attn.o")
        return hidden + self.mlp(layer, hidden)

    def cross_attention_block(self, hidden, features, start):
        name = "layers.1"
        normed = self.norm(hidden, f"{name}.input_layernorm.weight")
        queries = self.norm(self.project(normed, f"{name}.cross_attn.q"), f"{name}.cross_attn.q_norm.weight")
        keys, values = self.remember(
            1, self.project(features, f"{name}.cross_attn.k"), self.project(features, f"{name}.cross_attn.v")
        )
        keys = self.norm(self.repeat(keys), f"{name}.cross_attn.k_norm.weight")
        visible = torch.arange(keys.shape[2]) < torch.arange(start, start + hidden.shape[1])[:, None]
        attended = self.attend(queries, keys, self.repeat(values), visible, f"{name}.cross_attn.o")
        hidden = hidden + torch.tanh(self.weights[f"{name}.cross_attn_attn_gate"]) * attended
        return hidden + torch.tanh(self.weights[f"{name}.cross_attn_mlp_gate"]) * self.mlp(1, hidden)

    def attend(self, queries, keys, values, visible, output):
        scores = queries @ keys.transpose(2, 3) / HEAD_DIM**0.5
        # A row that sees nothing has the same huge negative number everywhere: its softmax is uniform.
        scores = scores + torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        attended = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        return attended @ self.weights[f"{output}_proj.weight"].T

    def mlp(self, layer, hidden):
        weights = [self.weights[f"layers.{layer}.mlp.{which}_proj.weight"] for which in ("gate", "up", "down")]
        normed = self.norm(hidden, f"layers.{layer}.post_attention_layernorm.weight")
        gate = normed @ weights[0].T
        return (gate / (1 + torch.exp(-gate)) * (normed @ weights[1].T)) @ weights[2].T

    def norm(self, hidden, name):
        return hidden / (hidden.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * self.weights[name]

    def project(self, hidden, name):
        return (hidden @ self.weights[f"{name}_proj.weight"].T).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

    def repeat(self, heads):
        return heads.repeat_interleave(self.groups, dim=1)

    def rotate(self, heads, positions):
        frequencies = 1 / THETA ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)  # float32, as published
        angles = positions[:, None] * frequencies.double()
        angles = torch.cat([angles, angles], -1)
        first, second = heads.chunk(2, -1)
        return heads * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def remember(self, layer, keys, values):
        old = self.seen.get(layer)
        self.seen[layer] = (
            (keys, values) if old is None else (torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2))
        )
        return self.seen[layer]


def assert_close(output, expected):
    for ours, theirs in zip((output.last_hidden_state, output.mid_hidden_state), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TIGHT)


@pytest.fixture(params=SHAPES)
def converted(request, tmp_path):
    """(drafter, weights, number of key/value heads)"""
    weights = published_weights(request.param)
    source = write_published(tmp_path / "published", weights, published_config(request.param))
    convert_checkpoint(source, tmp_path / "converted")
    drafter = doubled(DreamDrafter.from_pretrained(tmp_path / "converted"))
    return drafter, {name: weight.double() for name, weight in weights.items()}, request.param


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_full_pass_is_the_published_arithmetic(converted, attn_implementation):
    drafter, weights, num_key_value_heads = converted
    drafter.set_attn_implementation(attn_implementation)
    embeddings, features = doubles(2, 11, HIDDEN), doubles(2, 10, HIDDEN) * 3
    assert_close(drafter(embeddings, features), Published(weights, num_key_value_heads)(embeddings, features))


@torch.no_grad()
def test_cached_steps_are_the_published_arithmetic(converted):
    drafter, weights, num_key_value_heads = converted
    published, cache = Published(weights, num_key_value_heads), DynamicCache()
    embeddings, features = doubles(1, 12, HIDDEN), doubles(1, 11, HIDDEN)
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 12)):
        new = embeddings[:, start:stop], features[:, max(start - 1, 0) : stop - 1]
        assert_close(drafter(*new, past_key_values=cache), published(*new))


@torch.no_grad()
def test_the_first_token_averages_all_features(converted):
    """Without `legacy` the first token reads nothing, so the difference must show there and nowhere before block 2."""
    drafter, *_ = converted
    embeddings, features = doubles(1, 5, HIDDEN), doubles(1, 4, HIDDEN)
    legacy = drafter(embeddings, features).mid_hidden_state
    drafter.config.legacy = False
    defined = drafter(embeddings, features).mid_hidden_state
    assert not torch.allclose(legacy[:, 0], defined[:, 0], atol=1e-3)
    torch.testing.assert_close(legacy[:, 1:], defined[:, 1:], **TIGHT)


# -- keys -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_pickle", [True, False])
def test_report_lists_what_became_of_every_key(tmp_path, as_pickle):
    weights = published_weights(2)
    extra = {
        "head_weight": torch.zeros(64, HIDDEN),
        "embed_model.weight": torch.zeros(64, HIDDEN),
        "layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    source = write_published(tmp_path / "published", {**wrapped, **extra}, published_config(2), as_pickle)
    report = convert_checkpoint(source, tmp_path / "converted")
    assert dict(report.renamed) == {f"module.{name}": name for name in weights}
    assert report.dropped.keys() == extra.keys()
    assert not report.kept and not report.missing and not report.unexpected
    assert all(name in str(report) for name in (*wrapped, *extra))
    drafter = DreamDrafter.from_pretrained(tmp_path / "converted")
    assert drafter.config.legacy and not drafter.config.normalize_inputs and not drafter.config.normalize_features
    assert drafter.config.rope_parameters["rope_theta"] == THETA and drafter.config.rms_norm_eps == EPS
    for name, tensor in weights.items():
        assert torch.equal(drafter.state_dict()[name], tensor), name


def test_keeps_half_precision_and_shared_memory(tmp_path):
    weights = {name: tensor.half() for name, tensor in published_weights(4).items()}
    weights["layers.2.mlp.up_proj.weight"] = weights["layers.0.mlp.up_proj.weight"]
    convert_checkpoint(write_published(tmp_path / "published", weights, published_config(4)), tmp_path / "converted")
    assert DreamDrafter.from_pretrained(tmp_path / "converted").dtype == torch.float16


def _without(name):
    return lambda weights, config: weights.pop(name)


def _with(name, value):
    return lambda weights, config: weights.update({name: value})


def _configured(**values):
    return lambda weights, config: config.update(values)


REFUSED = {
    "missing key": (_without("layers.1.cross_attn_attn_gate"), "missing layers.1.cross_attn_attn_gate"),
    "unknown key": (_with("layers.3.mlp.up_proj.weight", torch.ones(2)), "unexpected layers.3.mlp.up_proj.weight"),
    "input norm in block 0": (
        _with("layers.0.input_layernorm.weight", torch.ones(HIDDEN)),
        "layers.0.input_layernorm",
    ),
    "twice the same key": (_with("module.norm.weight", torch.ones(HIDDEN)), "unexpected module.norm.weight"),
    "no tensor": (_with("norm.weight", 3), "unexpected norm.weight"),
    "other shape": (_with("norm.weight", torch.ones(7)), r"norm.weight is \(7,\) and \(32,\)"),
    "integers": (_with("norm.weight", torch.ones(HIDDEN, dtype=torch.int64)), "norm.weight .* no finite"),
    "NaN": (_with("norm.weight", torch.full((HIDDEN,), torch.nan)), "norm.weight .* no finite"),
    "scaled rotary embedding": (_configured(rope_scaling={"type": "linear", "factor": 2.0}), "rotary"),
    "no hidden size": (_configured(hidden_size=None), "lacks.*hidden_size"),
    "absurd size": (_configured(hidden_size=1 << 20, intermediate_size=1 << 24), "parameters, more than"),
    "heads that do not fit": (_configured(num_attention_heads=3), "num_attention_heads"),
    "already a drafter": (_configured(model_type="dream_drafter"), "is a drafter already"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_refuses_what_it_does_not_understand(tmp_path, change, message):
    weights, config = published_weights(2), published_config(2)
    change(weights, config)
    source = write_published(tmp_path / "published", weights, config)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


class Bomb:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('executed').touch()",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickles_are_not_executed(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    source = write_published(tmp_path / "published", {}, published_config(2))
    save({"norm.weight": Bomb()}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="can't be read as plain tensors"):
        convert_checkpoint(source, tmp_path / "converted")
    assert not (tmp_path / "executed").exists()


def test_refuses_a_pickle_that_unpacks_to_more_than_its_size(tmp_path):
    source = write_published(tmp_path / "published", published_weights(2), published_config(2))
    with zipfile.ZipFile(source / "pytorch_model.bin", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/999", bytes(1 << 20))
    with pytest.raises(ValueError, match="unpacks to"):
        convert_checkpoint(source, tmp_path / "converted")


def test_truncated_and_absent_files(tmp_path):
    source = write_published(tmp_path / "published", published_weights(2), published_config(2))
    path = source / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"pytorch_model.bin of .*can't be read"):
        convert_checkpoint(source, tmp_path / "converted")
    path.unlink()
    with pytest.raises(OSError, match=r"has none of model.safetensors, pytorch_model.bin"):
        convert_checkpoint(source, tmp_path / "converted")
    with pytest.raises(ValueError, match="`destination`"):
        convert_checkpoint(source, source)


# -- the target -------------------------------------------------------------------------------------------------------------


def test_target_goes_into_the_config(tmp_path):
    source = write_published(tmp_path / "published", published_weights(2), published_config(2))
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    LlamaConfig(hidden_size=HIDDEN, vocab_size=70, **shape).save_pretrained(tmp_path / "target")
    convert_checkpoint(source, tmp_path / "converted", target=str(tmp_path / "target"))
    config = DreamDrafter.from_pretrained(tmp_path / "converted").config
    assert config.vocab_size == 70 and config.target["num_hidden_layers"] == 3
    assert config.target["name"] == str(tmp_path / "target")
    LlamaConfig(hidden_size=64, **shape).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"`target`.*hidden size 64 and the checkpoint 32"):
        convert_checkpoint(source, tmp_path / "again", target=str(tmp_path / "wide"))
