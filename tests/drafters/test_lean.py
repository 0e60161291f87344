"""Decoding computes what a drafter's modules compute, without calling those that do nothing else."""

import copy

import peft
import pytest
import torch
from double import TIGHT
from test_modeling import ABLATIONS, make_drafter, make_inputs
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from dream_hf.drafters import masked_attention, visibility
from dream_hf.drafters.dream.functional import DecodingForward, WholeForward, decoding_forward, is_plain_throughout
from dream_hf.drafters.dream.modeling import DreamCrossAttention, DreamSelfAttention
from dream_hf.drafters.dream.state import DrafterState
from dream_hf.drafters.stacking import stacked


def run(drafter, is_lean):
    """Two rows of different lengths read text twice and draft three levels; returns all features."""
    state = DrafterState(drafter, 2)
    assert type(state.forward) is DecodingForward
    if not is_lean:
        state.forward = WholeForward(drafter)
    embeds, features = make_inputs(16)
    positions = torch.arange(16).expand(2, -1)
    state.read(embeds[:, :6], features[:, :5], positions[:, :6], [6, 4])
    found = [state.root_features]
    state.read_on(embeds[:, 6:9], features[:, 5:8], [2, 3])
    found.append(state.root_features)
    lengths = state.tokens.tensor(torch.device("cpu"))
    for level in range(1, 4):
        slots = torch.arange(int(lengths.max()) + 2 * level)
        own = lengths[:, None] + 2 * (level - 1) + torch.arange(2)
        sees = visibility.bias_of((slots < lengths[:, None, None]) | (slots == own[..., None]), embeds.dtype)
        found.append(state.beams(embeds[:, 8 + level :][:, :2], features[:, 7 + level :][:, :2], sees, level))
    state.forget_beams()
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("block_types", ABLATIONS, ids="-".join)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
def test_it_computes_what_the_modules_compute(block_types, heads):
    drafter = make_drafter(block_types=block_types, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    with torch.no_grad():
        torch.testing.assert_close(run(drafter, True), run(drafter, False), **TIGHT)


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_act": "gelu_pytorch_tanh"},
        {"attention_bias": True},
        {"normalize_inputs": False, "normalize_features": False},
        {"legacy": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ],
    ids=lambda config: next(iter(config)),
)
def test_it_follows_the_config(config):
    drafter = make_drafter(**config)
    with torch.no_grad():
        torch.testing.assert_close(run(drafter, True), run(drafter, False), **TIGHT)


class CountingLinear(nn.Linear):
    """What a quantised layer looks like from outside."""

    num_calls = 0

    def forward(self, hidden):
        self.num_calls += 1
        return 2 * super().forward(hidden)


def hook(drafter, path):
    calls = []
    drafter.get_submodule(path).register_forward_hook(lambda _, __, out: (calls.append(1), 2 * out)[1])
    return lambda: len(calls)


def replace_forward(drafter, path):
    module, calls = drafter.get_submodule(path), []
    forward = module.forward
    module.forward = lambda *args, **kwargs: (calls.append(1), 2 * forward(*args, **kwargs))[1]
    return lambda: len(calls)


def replace_linear(drafter, path):
    name, _, child = path.rpartition(".")
    old = getattr(drafter.get_submodule(name), child)
    new = CountingLinear(old.in_features, old.out_features, bias=False).to(old.weight.dtype)
    new.load_state_dict(old.state_dict())
    setattr(drafter.get_submodule(name), child, new)
    return lambda: new.num_calls


PARTS = ["norm", "layers.0", "layers.1.cross_attn", "layers.2.self_attn", "layers.1.mlp", "layers.1.cross_attn.k_norm"]
CHANGES = [
    *((change, part) for change in (hook, replace_forward) for part in PARTS),
    *((replace_linear, f"layers.{part}") for part in ("0.self_attn.q_proj", "1.cross_attn.v_proj", "2.mlp.down_proj")),
]


@pytest.mark.parametrize(("change", "part"), CHANGES, ids=lambda value: getattr(value, "__name__", value))
@torch.no_grad()
def test_it_calls_the_parts_that_do_more(change, part):
    drafter = make_drafter()
    assert is_plain_throughout(drafter)
    before = run(drafter, True)
    num_calls = change(drafter, part)
    assert not is_plain_throughout(drafter)
    found = run(drafter, True)
    assert num_calls() == 5  # two texts and three levels
    torch.testing.assert_close(found, run(drafter, False), **TIGHT)
    assert num_calls() == 10 and (found - before).abs().max() > 1e-3


@torch.no_grad()
def test_it_calls_no_other_parts(monkeypatch):
    drafter, calls = make_drafter(), []
    hook(drafter, "layers.1.cross_attn.q_norm")
    for kind in (nn.Linear, nn.RMSNorm, LlamaMLP, DreamSelfAttention, DreamCrossAttention):
        forward = kind.forward
        watched = lambda self, *args, forward=forward: (calls.append(type(self)), forward(self, *args))[1]  # noqa: E731
        monkeypatch.setattr(kind, "forward", watched)
    run(drafter, True)
    assert calls == [nn.RMSNorm] * 5
    run(drafter, False)
    assert set(calls) == {nn.RMSNorm, nn.Linear, LlamaMLP, DreamSelfAttention, DreamCrossAttention}


@torch.no_grad()
def test_it_runs_adapters():
    drafter = make_drafter()
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(drafter, config).double().eval().base_model.model
    assert not is_plain_throughout(adapted)
    torch.testing.assert_close(run(adapted, True), run(adapted, False), **TIGHT)


@pytest.mark.parametrize("legacy", [False, True])
@torch.no_grad()
def test_it_runs_other_attention(legacy):
    drafter = make_drafter(legacy=legacy)
    expected = run(drafter, True)
    drafter.set_attn_implementation("eager")
    assert not is_plain_throughout(drafter)
    torch.testing.assert_close(run(drafter, True), expected, **TIGHT)
    torch.testing.assert_close(run(drafter, False), expected, **TIGHT)


@torch.no_grad()
def test_it_follows_dropout_in_training():
    drafter = make_drafter(attention_dropout=0.5).train()
    torch.manual_seed(0)
    one = run(drafter, True)
    torch.manual_seed(0)
    torch.testing.assert_close(one, run(drafter, False), **TIGHT)
    assert not torch.equal(one, run(drafter.eval(), True))


def test_subclasses_and_hooked_drafters_run_their_own_forward():
    drafter = make_drafter()
    drafter.__class__ = type("Same", (type(drafter),), {})
    assert type(decoding_forward(drafter)) is DecodingForward and is_plain_throughout(drafter)
    own = type("Oracle", (type(drafter),), {"forward": lambda self, *args, **kwargs: None})
    drafter.__class__ = own
    assert type(decoding_forward(drafter)) is WholeForward and not is_plain_throughout(drafter)
    drafter = make_drafter()
    drafter.register_forward_pre_hook(lambda *_: None)
    assert type(decoding_forward(drafter)) is WholeForward and not is_plain_throughout(drafter)


def test_layers_read_as_one_stay_layers(tmp_path):
    """Their weights share memory after decoding, and nothing else about them has changed."""
    drafter = make_drafter()
    before = {name: value.clone() for name, value in drafter.state_dict().items()}
    attention = drafter.layers[0].self_attn

    def is_in_a_row(attention) -> bool:
        weights = [layer.weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        return len({weight.untyped_storage().data_ptr() for weight in weights}) == 1

    with torch.inference_mode():
        expected = run(drafter, True)
    assert is_in_a_row(attention) and not attention.q_proj.weight.is_inference()
    place = attention.q_proj.weight.data_ptr()
    run(drafter, True)
    assert attention.q_proj.weight.data_ptr() == place  # moved once
    assert all(torch.equal(value, before[name]) for name, value in drafter.state_dict().items())
    drafter.save_pretrained(tmp_path)
    for same in (copy.deepcopy(drafter), type(drafter).from_pretrained(tmp_path, dtype=drafter.dtype)):
        assert all(torch.equal(value, before[name]) for name, value in same.state_dict().items())
    with torch.no_grad():
        attention.k_proj.weight.mul_(2)  # what a training step does is seen at once
        assert not torch.equal(run(drafter, True), expected)
        torch.testing.assert_close(run(drafter, True), run(drafter, False), **TIGHT)
        assert torch.equal(attention.q_proj.weight, before["layers.0.self_attn.q_proj.weight"])
    (attention.q_proj.weight.sum() + attention.v_proj.weight.sum()).backward()
    decoding_forward(drafter.to(torch.float32))
    assert is_in_a_row(attention)


@pytest.mark.parametrize("change", ["another kind", "one bias", "another dtype", "in inference mode"])
def test_layers_that_cannot_be_one_stay_apart(change):
    layers = [nn.Linear(3, 2), nn.Linear(3, 4)]
    if change == "another kind":
        layers[0].__class__ = type("Quantised", (nn.Linear,), {})
    elif change == "one bias":
        layers[0].bias = None
    elif change == "another dtype":
        layers[0].double()
    else:
        with torch.inference_mode():
            layers[0] = nn.Linear(3, 2)
    assert stacked(layers) is None


def test_beams_below_a_text_of_one_token_stand_where_they_belong():
    """Nothing is visible to the cross-attention of that token; the levels see their own features."""
    drafter = make_drafter()
    embeds, features = make_inputs(4)
    found = []
    with torch.no_grad():
        for is_lean in (True, False):
            state = DrafterState(drafter, 2)
            if not is_lean:
                state.forward = WholeForward(drafter)
            state.read(embeds[:, :1], features[:, :0], torch.full((2, 1), 7), [1, 1])
            for level in (1, 2):
                sees = embeds.new_zeros(2, 1, 1 + level)  # all
                found.append(state.beams(embeds[:, level : level + 1], features[:, level : level + 1], sees, level))
    torch.testing.assert_close(found[:2], found[2:], **TIGHT)


# --- what kernels of accelerators can read ---


def masks_of_attention(monkeypatch, run):
    """Every mask that reaches PyTorch's attention."""
    masks, attend = [], visibility.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    for module in (visibility, masked_attention):
        monkeypatch.setattr(module, "scaled_dot_product_attention", watched)
    result = run()
    return result, [mask for mask in masks if mask is not None and mask.dtype != torch.bool]


def is_aligned(mask):
    """Starts and rows at multiples of 16 bytes of the smallest dtype there is."""
    return mask.storage_offset() % 8 == 0 and mask.stride(-1) == 1 and all(n % 8 == 0 for n in mask.stride()[:-1])


@pytest.mark.parametrize("block_types", ABLATIONS, ids="-".join)
@torch.no_grad()
def test_added_masks_are_aligned_off_the_cpu(block_types, monkeypatch):
    drafter = make_drafter(block_types=block_types)
    expected, on_cpu = masks_of_attention(monkeypatch, lambda: run(drafter, True))
    monkeypatch.setattr(masked_attention, "needs_alignment", lambda device: True)
    found, masks = masks_of_attention(monkeypatch, lambda: run(drafter, True))
    assert len(masks) == len(on_cpu) == 4 * len(block_types)
    assert all(map(is_aligned, masks)) and not all(map(is_aligned, on_cpu))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("num_columns", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 500])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (3, 5)], ids=str)
def test_shown_columns_of_every_size(shape, num_columns, monkeypatch):
    monkeypatch.setattr(masked_attention, "needs_alignment", lambda device: True)
    sees = torch.rand(*shape, num_columns, generator=torch.Generator().manual_seed(0)) < 0.5
    seen = visibility.shown_columns(visibility.bias_of(sees, torch.bfloat16))
    for part, expected in ((seen.tokens, sees), (seen.features, sees[..., 1:])):
        assert is_aligned(part.bias) and part.bias.dtype == torch.bfloat16
        assert torch.equal(part.mask(shape[1], expected.shape[-1], sees.device), expected)
