"""The lean form of a drafter computes what its modules compute, and steps back where only the modules are right."""

import pytest
import torch
from double import TIGHT
from test_modeling import ABLATIONS, HIDDEN, make_drafter, make_inputs
from torch import nn

from dream_hf.drafters.dream.functional import lean_drafter
from dream_hf.drafters.dream.state import DrafterState


def run(drafter, is_lean):
    """Two rows of different lengths read text twice and draft three levels; returns all features."""
    state = DrafterState(drafter, 2)
    assert state.lean is not None
    if not is_lean:
        state.lean = None
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
        sees = (slots < lengths[:, None, None]) | (slots == own[..., None])
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


def hook(drafter):
    drafter.layers[1].mlp.register_forward_hook(lambda *_: None)


def replace_forward(drafter):
    drafter.norm.forward = lambda hidden: 0 * hidden


def replace_linear(drafter):
    drafter.layers[0].self_attn.q_proj = CountingLinear(HIDDEN, HIDDEN, bias=False)


@pytest.mark.parametrize(
    "change",
    [hook, replace_forward, replace_linear, nn.Module.train, lambda drafter: drafter.set_attn_implementation("eager")],
    ids=["hook", "forward", "linear", "training", "eager"],
)
def test_it_steps_back_where_modules_do_more(change):
    drafter = make_drafter()
    assert lean_drafter(drafter) is not None
    change(drafter)
    assert lean_drafter(drafter) is None


def test_subclasses_run_their_own_forward():
    drafter = make_drafter()
    drafter_class = type(drafter)
    drafter.__class__ = type("Renamed", (drafter_class,), {})
    assert lean_drafter(drafter) is not None  # as `DreamDrafter` is one of `DreamModel`: with its forward
    drafter.__class__ = type("Oracle", (drafter_class,), {"forward": lambda self, *args, **kwargs: None})
    assert lean_drafter(drafter) is None


def test_beams_below_a_text_of_one_token_stand_where_they_belong():
    """Nothing is visible to its cross-attention, so its modules run, at the positions of the levels."""
    drafter = make_drafter()
    embeds, features = make_inputs(4)
    found = []
    with torch.no_grad():
        for is_lean in (True, False):
            state = DrafterState(drafter, 2)
            if not is_lean:
                state.lean = None
            state.read(embeds[:, :1], features[:, :0], torch.full((2, 1), 7), [1, 1])
            for level in (1, 2):
                sees = torch.ones(2, 1, 1 + level, dtype=torch.bool)
                found.append(state.beams(embeds[:, level : level + 1], features[:, level : level + 1], sees, level))
    torch.testing.assert_close(found[:2], found[2:], **TIGHT)
