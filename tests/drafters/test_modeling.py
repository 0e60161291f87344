"""The drafter by itself: every way of calling it computes the same thing, and nothing sees what it must not see."""

import copy

import pytest
import torch
from double import TIGHT, doubled, doubles
from transformers import AutoModel, DynamicCache, LlamaConfig, LlamaForCausalLM

from dream_hf import DreamConfig, DreamDrafter
from dream_hf.drafters.dream.modeling import DraftMasks

HIDDEN = 32
ABLATIONS = [
    ["initial", "cross", "final"],
    ["cross", "final"],
    ["initial", "final"],
    ["initial", "cross"],
    ["initial", "cross", "cross", "final"],
    ["initial"],
    ["final"],
]
ablations = pytest.mark.parametrize("block_types", ABLATIONS, ids="-".join)


def make_drafter(seed=0, **config):
    """A drafter whose gates are open and whose norms are no ones, so that everything has an effect."""
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 64, **config}
    generator = torch.Generator().manual_seed(seed)
    drafter = DreamDrafter(DreamConfig(hidden_size=HIDDEN, **config)).eval()
    with torch.no_grad():
        for name, parameter in sorted(drafter.named_parameters()):
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                0.2 * spread if parameter.ndim == 2 else 1 + 0.5 * spread if "norm" in name else 0.5 + spread
            )
    return doubled(drafter)


def make_inputs(num_tokens=9, batch=2, seed=1):
    """Embeddings and features; the scales differ, as they do in targets."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = doubles(batch, num_tokens, HIDDEN, generator=generator)
    return embeddings, 3 * doubles(batch, num_tokens - 1, HIDDEN, generator=generator)


def both(output):
    return torch.stack([output.last_hidden_state, output.mid_hidden_state])


def assert_close(one, two):
    torch.testing.assert_close(one, two, **TIGHT)


# -- one computation ----------------------------------------------------------------------------------------------------


def run_in_chunks(drafter, embeddings, features, bounds, **arguments):
    """Each chunk brings its tokens and the features that precede them, the last one's own not among them."""
    cache, outputs = DynamicCache(), []
    for start, stop in zip([0, *bounds], [*bounds, embeddings.shape[1]], strict=True):
        chunk = embeddings[:, start:stop], features[:, max(start - 1, 0) : stop - 1]
        sliced = {name: mask[:, :stop] for name, mask in arguments.items()}
        outputs.append(both(drafter(*chunk, past_key_values=cache, **sliced)))
    return torch.cat(outputs, 2)


@ablations
@pytest.mark.parametrize(
    "bounds", [[4], [4, 5, 6], [*range(1, 9)]], ids=["two chunks", "prefill and steps", "stepwise"]
)
@torch.no_grad()
def test_cached_passes_agree_with_the_full_pass(block_types, bounds):
    drafter, inputs = make_drafter(block_types=block_types), make_inputs()
    assert_close(run_in_chunks(drafter, *inputs, bounds), both(drafter(*inputs)))


@pytest.mark.parametrize(
    "config", [{}, {"legacy": True}, {"normalize_inputs": False, "normalize_features": False}], ids=str
)
@torch.no_grad()
def test_sdpa_agrees_with_eager(config):
    drafter, inputs = make_drafter(**config), make_inputs()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    outputs = []
    for attn_implementation in ("sdpa", "eager"):
        drafter.set_attn_implementation(attn_implementation)
        assert drafter.config._attn_implementation == attn_implementation
        outputs.append(both(drafter(*inputs, attention_mask=mask)))
    assert_close(outputs[0][:, mask.bool()], outputs[1][:, mask.bool()])
    assert outputs[0].isfinite().all() and outputs[1].isfinite().all()


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("on_the_left", [True, False])
@torch.no_grad()
def test_padding_changes_nothing(attn_implementation, on_the_left):
    """In a full pass and in cached chunks; what is in the padding does not matter either."""
    drafter = make_drafter()
    drafter.set_attn_implementation(attn_implementation)
    embeddings, features = make_inputs()
    length, start = 6, 3 if on_the_left else 0
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1] = 0
    mask[1, start : start + length] = 1
    alone = both(drafter(embeddings[1:, start : start + length], features[1:, start : start + length - 1]))
    padded = both(drafter(embeddings, features, attention_mask=mask))
    assert_close(padded[:, 1:, start : start + length], alone)
    assert_close(padded[:, :1], both(drafter(embeddings[:1], features[:1])))
    chunks = run_in_chunks(drafter, embeddings, features, [5, 7], attention_mask=mask)
    assert_close(chunks[:, 1:, start : start + length], alone)


@torch.no_grad()
def test_branches_agree_with_their_own_sequences():
    """Two branches A-A1 and B-B1 behind the same five tokens, drafted level by level with masks of their own."""
    drafter = make_drafter()
    embeddings, features = make_inputs(num_tokens=5, batch=1)
    branches = doubles(2, 2, HIDDEN)  # (branch, level, hidden)
    root_feature, level_features = doubles(1, 1, HIDDEN), doubles(1, 2, HIDDEN)

    cache, seen = DynamicCache(), torch.ones(2, 5, dtype=torch.bool)
    drafter(embeddings, features, past_key_values=cache)
    own = torch.eye(2, dtype=torch.bool)
    levels = (
        (branches[:, 0], root_feature, torch.cat([seen, own], 1), seen, 5),
        (branches[:, 1], level_features, torch.cat([seen, own, own], 1), torch.cat([seen, own], 1), 6),
    )
    tree = []
    for tokens, new_features, token_mask, feature_mask, position in levels:
        output = drafter(
            tokens[None],
            new_features,
            attention_mask=DraftMasks(token_mask[None], feature_mask[None]),
            position_ids=torch.full((1, 2), position),
            past_key_values=cache,
        )
        tree.append(both(output)[:, 0])
    for branch in range(2):
        sequence = torch.cat([embeddings, branches[branch][None]], 1)
        bank = torch.cat([features, root_feature, level_features[:, branch : branch + 1]], 1)
        expected = both(drafter(sequence, bank))[:, 0, 5:]
        assert_close(torch.stack([tree[0][:, branch], tree[1][:, branch]], 1), expected)


# -- who sees what ------------------------------------------------------------------------------------------------------


@ablations
@torch.no_grad()
def test_tokens_are_causal(block_types):
    drafter, (embeddings, features) = make_drafter(block_types=block_types), make_inputs()
    before = both(drafter(embeddings, features))
    looks_back = {"initial", "final"} & set(block_types)
    for position in range(9):
        changed = embeddings.clone()
        changed[:, position] += torch.randn(HIDDEN)
        difference = (both(drafter(changed, features)) - before).abs().amax((0, 1, 3))
        assert not difference[:position].any(), f"token {position} is seen before it comes"
        assert difference[position] > 1e-3
        assert not looks_back or (difference[position:] > 1e-6).all()


@ablations
@torch.no_grad()
def test_a_position_sees_only_the_features_before_it(block_types):
    """The token at position i was produced by feature i - 1; feature i is what it is to predict from."""
    drafter, (embeddings, features) = make_drafter(block_types=block_types), make_inputs()
    before = both(drafter(embeddings, features))
    for position in range(8):
        changed = features.clone()
        changed[:, position] += torch.randn(HIDDEN)
        difference = (both(drafter(embeddings, changed)) - before).abs().amax((0, 1, 3))
        assert not difference[: position + 1].any(), f"feature {position} is seen too early"
        assert (difference[position + 1] > 1e-4) == ("cross" in block_types)


@torch.no_grad()
def test_the_first_token_reads_nothing_or_the_average():
    """Row 0 has no features before it: nothing is added to it, or with `legacy` the average of the values."""
    embeddings, features = make_inputs()
    for legacy in (False, True):
        drafter = make_drafter(legacy=legacy, normalize_features=False)
        block = drafter.layers[1]
        block.cross_attn_mlp_gate.zero_()
        entering = []
        block.register_forward_pre_hook(lambda _, arguments, entering=entering: entering.append(arguments[0][:, 0]))
        mid = drafter(embeddings, features).mid_hidden_state[:, 0]
        values = block.cross_attn.v_proj(features).mean(1).unflatten(-1, (2, 8)).repeat_interleave(2, 1).flatten(1)
        assert_close(mid, entering[0] + legacy * block.cross_attn_attn_gate.tanh() * block.cross_attn.o_proj(values))


@torch.no_grad()
def test_closed_gates_pass_block_0_through():
    """A fresh drafter starts as its self-attention blocks."""
    drafter, (embeddings, features) = doubled(DreamDrafter(make_drafter().config).eval()), make_inputs()
    with_features = drafter(embeddings, features)
    without = drafter(embeddings, torch.zeros_like(features))
    assert torch.equal(both(with_features), both(without))


# -- shapes -------------------------------------------------------------------------------------------------------------


@ablations
def test_ablations_have_the_blocks_they_name(block_types):
    drafter, inputs = make_drafter(block_types=block_types), make_inputs()
    names = {name for name, _ in drafter.named_parameters()}
    for index, block in enumerate(block_types):
        attention = "cross_attn" if block == "cross" else "self_attn"
        assert f"layers.{index}.{attention}.q_proj.weight" in names
        assert (f"layers.{index}.input_layernorm.weight" in names) == (block != "initial")
    entering = []
    drafter.layers[-1].register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0]))
    output = drafter(*inputs)
    assert output.last_hidden_state.shape == output.mid_hidden_state.shape == inputs[0].shape
    assert torch.equal(output.mid_hidden_state, entering[0])


def test_for_target_takes_shape_and_dtype_from_the_target():
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 40}
    target = LlamaForCausalLM(LlamaConfig(hidden_size=HIDDEN, vocab_size=50, num_hidden_layers=2, **shape)).bfloat16()
    drafter = DreamDrafter.for_target(target, tree_depth=3)
    assert drafter.dtype == torch.bfloat16 and not drafter.training
    for name, value in {**shape, "hidden_size": HIDDEN, "vocab_size": 50, "tree_depth": 3}.items():
        assert getattr(drafter.config, name) == value
    assert drafter.config.target["model_type"] == "llama" and drafter.config.target["num_hidden_layers"] == 2


def test_refusals_name_the_argument():
    drafter, (embeddings, features) = make_drafter(), make_inputs()
    for message, arguments in (
        (r"`inputs_embeds` has shape \(2, 9, 31\)", (embeddings[..., 1:], features)),
        (r"`target_features` has shape \(2, 32\)", (embeddings, features[:, 0])),
        ("`target_features` brings the features to 9 for 9 tokens", (embeddings, embeddings)),
    ):
        with pytest.raises(ValueError, match=message):
            drafter(*arguments)
    with pytest.raises(ValueError, match="`attention_mask` has 8 columns for 9 tokens"):
        drafter(embeddings, features, attention_mask=torch.ones(2, 8))


# -- saving, training, precision -----------------------------------------------------------------------------------------


@ablations
@torch.no_grad()
def test_save_and_load_give_the_same_outputs(block_types, tmp_path):
    drafter, inputs = make_drafter(block_types=block_types, legacy=True, normalize_inputs=False), make_inputs()
    drafter.save_pretrained(tmp_path)
    for loaded in (DreamDrafter.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert all(torch.equal(value, drafter.state_dict()[name]) for name, value in loaded.state_dict().items())
        # Not to the bit: how a product is summed depends on where in memory its weights lie.
        assert_close(both(doubled(loaded)(*inputs)), both(drafter(*inputs)))
        assert loaded.config.block_types == block_types
        assert loaded.config.library_versions["transformers"] and not loaded.training


def test_gradient_checkpointing_gives_the_same_gradients():
    drafter, inputs = make_drafter().train(), make_inputs()
    checkpointed = copy.deepcopy(drafter)
    checkpointed.gradient_checkpointing_enable()
    num_passes = []
    checkpointed.layers[1].mlp.register_forward_hook(lambda *_: num_passes.append(1))
    for model in (drafter, checkpointed):
        both(model(*inputs)).pow(2).sum().backward()
    assert len(num_passes) == 2, "the block was not run again in the backward pass"
    for (name, one), two in zip(drafter.named_parameters(), checkpointed.parameters(), strict=True):
        assert one.grad is not None and one.grad.abs().sum() > 0, name
        torch.testing.assert_close(one.grad, two.grad, **TIGHT, msg=name)


def test_closed_gates_can_open():
    drafter, inputs = doubled(DreamDrafter(make_drafter().config)), make_inputs()
    drafter(*inputs).last_hidden_state.pow(3).sum().backward()
    assert drafter.layers[1].cross_attn_attn_gate.grad.abs() > 0
    assert drafter.layers[1].cross_attn_mlp_gate.grad.abs() > 0


def test_gates_start_where_the_config_says():
    opened = DreamDrafter(DreamConfig(**{**make_drafter().config.to_diff_dict(), "initial_gate": 1.0})).layers[1]
    assert opened.cross_attn_attn_gate.item() == opened.cross_attn_mlp_gate.item() == 1.0


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_stays_close(dtype, attn_implementation):
    drafter, (embeddings, features) = make_drafter(), make_inputs()
    drafter.set_attn_implementation(attn_implementation)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    expected = both(drafter(embeddings, features, attention_mask=mask))
    half = both(drafter.to(dtype)(embeddings.to(dtype), features.to(dtype), attention_mask=mask))
    assert half.dtype == dtype and half.isfinite().all()
    error = (half.double() - expected)[:, mask.bool()].norm() / expected[:, mask.bool()].norm()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.005)


@torch.no_grad()
def test_half_precision_survives_large_visual_embeddings():
    """Merged visual embeddings are tens of times larger than text embeddings; normalised, they do not overflow."""
    drafter, (embeddings, features) = make_drafter().half(), make_inputs()
    embeddings[:, 2:5] *= 1000
    output = both(drafter(embeddings.half(), (1000 * features).half()))
    assert output.isfinite().all()
