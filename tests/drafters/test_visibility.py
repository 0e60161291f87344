"""Attention without masks of the whole text says what masks say, in memory that grows with the text and not its square."""

import pytest
import torch
from test_modeling import both, make_drafter, make_inputs

from dream_hf.drafters import masked_attention
from dream_hf.drafters.dream import state as drafter_state
from dream_hf.drafters.dream.compression import DrafterText, compress_text, novelty
from dream_hf.drafters.dream.functional import WholeForward
from dream_hf.drafters.dream.modeling import DraftMasks
from dream_hf.drafters.dream.state import DrafterState
from dream_hf.drafters.masked_attention import attend_masked
from dream_hf.drafters.visibility import FromStart, Listed, OwnChains, Prefixes, Visibilities
from dream_hf.targets.target import DecoderRecord, Target
from dream_hf.training import rollout
from dream_hf.training.target_features import DrafterBatch

LENGTH, SCALE = 11, 0.3


def assert_same(one, two):
    torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Masks for a few queries at a time, as with long texts."""
    monkeypatch.setattr(masked_attention, "MASK_ENTRIES", 200)
    monkeypatch.setattr(drafter_state, "MASK_ENTRIES", 100)


# -- each form of attention --------------------------------------------------------------------------------------------

REAL = torch.ones(2, LENGTH, dtype=torch.bool)
REAL[0, :4], REAL[1, 5:7] = False, False
COUNTS = torch.stack([torch.arange(LENGTH), (3 * torch.arange(LENGTH)) % (LENGTH + 1)])
SEEN = {
    "text": (FromStart(), LENGTH),
    "features below": (FromStart(behind=1), LENGTH - 1),
    "features with the last": (FromStart(behind=1), LENGTH),
    "prefixes": (Prefixes(COUNTS), LENGTH),
    "padding": (Prefixes(torch.arange(1, LENGTH + 1)[None], REAL, is_self_seen=True), LENGTH),
    "features of padding": (Prefixes(torch.arange(LENGTH)[None], REAL), LENGTH - 1),
    "chains of one": (OwnChains(COUNTS, 1), 2 * LENGTH),
    "chains of three": (OwnChains(COUNTS, 3), 4 * LENGTH),
}


def run_attention(seen, states, unseen):
    """What comes of it, and the gradients of queries, keys and values."""
    states = [part.clone().requires_grad_() for part in states]
    attended = seen.attend(*states, unseen, SCALE, 0.0)
    return attended, *torch.autograd.grad((attended * torch.linspace(-1, 1, attended.shape[-1])).sum(), states)


def draw(num_keys, heads, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads[0], LENGTH, 8), (2, heads[1], num_keys, 8), (2, heads[1], num_keys, 8)
    return [3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("name", SEEN)
def test_attention_is_that_of_its_mask(name, heads, few_at_a_time):
    seen, num_keys = SEEN[name]
    states, unseen = draw(num_keys, heads), torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    dense = Listed(seen.mask(LENGTH, num_keys, torch.device("cpu")).expand(2, -1, -1))
    for one, two in zip(run_attention(seen, states, unseen), run_attention(dense, states, unseen), strict=True):
        assert_same(one, two)


@pytest.mark.parametrize("depth", [1, 3])
def test_chains_lose_little_in_half_precision(depth):
    """Scores of tens, so that their rounding to half precision would be seen; the exact values are those of its mask."""
    seen, num_keys = OwnChains(COUNTS, depth), (1 + depth) * LENGTH
    states = draw(num_keys, (4, 2), torch.bfloat16)
    dense = Listed(seen.mask(LENGTH, num_keys, torch.device("cpu")))
    exact = dense.attend(*(part.double() for part in states), None, 1.0, 0.0)
    for attended in (
        seen.attend(*states, None, 1.0, 0.0),
        autocast(seen, [part.float() for part in states]),
    ):
        assert attended.dtype == torch.bfloat16
        error = (attended.double() - exact).abs().max()
        assert error < 2 * (dense.attend(*states, None, 1.0, 0.0).double() - exact).abs().max() + 0.02


def autocast(seen, states):
    with torch.autocast("cpu", torch.bfloat16):
        return seen.attend(*states, None, 1.0, 0.0)


# -- the drafter -------------------------------------------------------------------------------------------------------


def padded_mask(padding):
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, {"left": slice(0, 3), "right": slice(6, 9), "gaps": slice(4, 6), "none": slice(0, 0)}[padding]] = False
    return mask


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "gaps"])
@pytest.mark.parametrize("legacy", [False, True])
def test_text_is_read_as_under_masks(padding, legacy, attn_implementation, few_at_a_time):
    """In a full pass and its gradients, and in cached parts."""
    drafter, (embeds, features) = make_drafter(legacy=legacy).double(), make_inputs()
    drafter.set_attn_implementation(attn_implementation)
    embeds, features, real = embeds.double(), features.double(), padded_mask(padding)
    at = torch.arange(9)
    tokens = ((at <= at[:, None]) & real[:, None]) | torch.eye(9, dtype=torch.bool)
    masks = DraftMasks(tokens, (at[:-1] < at[:, None]) & real[:, None, :-1])
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    expected = both(drafter(embeds, features, attention_mask=masks, position_ids=positions))[:, real]
    found = both(drafter(embeds, features, attention_mask=None if padding == "none" else real))[:, real]
    assert_same(found, expected)
    gradients = [torch.autograd.grad(out.pow(2).sum(), list(drafter.parameters())) for out in (found, expected)]
    for one, two in zip(*gradients, strict=True):
        assert_same(one, two)


@pytest.mark.parametrize("is_lean", [True, False])
@pytest.mark.parametrize("counts", [[9, 9], [9, 2], [0, 7]], ids=str)
@torch.no_grad()
def test_a_long_turn_is_read_in_parts(is_lean, counts, monkeypatch):
    """As if it were read at once, in rows of different lengths; what is drafted behind it as well."""
    drafter, found = make_drafter().double(), []
    embeds, features = (part.double() for part in make_inputs(20))
    for entries in (2**23, 100, 1):
        monkeypatch.setattr(drafter_state, "MASK_ENTRIES", entries)
        state = DrafterState(drafter, 2)
        state.forward = state.forward if is_lean else WholeForward(drafter)
        calls = []
        forward = state._forward
        state._forward = lambda *args, calls=calls, forward=forward: (calls.append(1), forward(*args))[1]
        state.read(embeds[:, :6], features[:, :5], torch.arange(6).expand(2, -1), [6, 4])
        assert len(calls) == 1
        calls.clear()
        state.read_on(embeds[:, 6:15], features[:, 5:14], counts)
        found.append([state.root_features, state.root_positions.double()])
        assert len(calls) == {2**23: 1, 100: 3, 1: 9}[entries]
        assert state.tokens.lengths == [6 + counts[0], 4 + counts[1]] and not state.tokens.tentative
        state.read_on(embeds[:, 15:17], features[:, 14:16], [2, 1])
        found[-1].append(state.root_features)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert_same(one, two)


@pytest.mark.parametrize("legacy", [False, True])
def test_rollouts_are_those_of_dense_masks(legacy, monkeypatch):
    """Values and gradients, at once and in chunks; texts of two lengths, chains below every other position."""
    batch, starts = make_batch(40, dtype=torch.float64)
    starts[:, ::2] = False
    drafter = make_drafter(legacy=legacy).double().train()
    results = []
    for name in ("dense", "at once", "in chunks"):
        with monkeypatch.context() as patch:
            if name == "dense":
                for seen in (OwnChains, FromStart):
                    patch.setattr(seen, "attend", attend_dense)
            if name == "in chunks":
                patch.setattr(masked_attention, "MASK_ENTRIES", 1000)
            features = batch.text.features.clone().requires_grad_()
            steps = list(rollout.roll_out(drafter, batch, features, 4, starts))
            found = torch.cat([torch.cat([step.hidden, step.mid]) for step in steps])
            results.append([found, *torch.autograd.grad(found.pow(2).sum(), [features, *drafter.parameters()])])
    assert len(results[0][0]) > 100
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_same(one, two)


def attend_dense(seen, queries, keys, values, unseen, scale, dropout):
    mask = seen.mask(queries.shape[2], keys.shape[2], queries.device)
    return attend_masked(queries, keys, values, mask, unseen, scale, dropout)


def make_batch(length, dtype=torch.float64):
    """Two texts, the second shorter; the last half of each is answer. Also where chains may start."""
    embeds, features = (part.to(dtype) for part in make_inputs(length + 1))
    counts = torch.tensor([length, length - 3])
    order = torch.arange(length).expand(2, -1)
    text = DrafterText(embeds[:, :length], features[:, :length], order, order, counts)
    predicts = (order >= length // 2) & (order < counts[:, None] - 1)
    return DrafterBatch(text, torch.zeros_like(order), predicts, None), predicts.clone()


# -- memory ------------------------------------------------------------------------------------------------------------


def largest_peak(run):
    """Most bytes that tensors held at once, by the profiler's record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def read_prompt(drafter, length):
    embeds, features = make_inputs(length, batch=1)
    real = torch.ones(1, length - 1, dtype=torch.bool)

    def run():
        text = compress_text(embeds[:, 1:], features, real, ~real, 1.0, "novelty")
        state = DrafterState(drafter, 1)
        state.read_prompt(text, embeds[:, :1], torch.full((1, 1), length), None)
        return state

    return run


def read_second_turn(drafter, length):
    embeds, features = make_inputs(length, batch=1)

    def run():
        state = DrafterState(drafter, 1)
        state.read(embeds[:, :8], features[:, :7], torch.arange(8)[None], [8])
        state.read_on(embeds[:, :-1], features, [length - 1])
        return state

    return run


def rank_by_novelty(drafter, length):
    _, features = make_inputs(length, batch=1)
    return lambda: novelty(features, torch.ones(features.shape[:2], dtype=torch.bool), 2**15)


def train(drafter, length):
    batch, starts = make_batch(length)

    def run():
        with torch.enable_grad():
            steps = rollout.roll_out(drafter, batch, batch.text.features, 3, starts)
            sum(step.hidden.pow(2).sum() for step in steps).backward()

    return run


@pytest.mark.parametrize(
    "work", [read_prompt, read_second_turn, rank_by_novelty, train], ids=lambda work: work.__name__
)
@torch.no_grad()
def test_memory_grows_with_the_text_and_not_with_its_square(work, monkeypatch):
    monkeypatch.setattr(masked_attention, "MASK_ENTRIES", 2**18)
    monkeypatch.setattr(drafter_state, "MASK_ENTRIES", 2**16)
    short, long = (largest_peak(work(make_drafter(), length)) for length in (400, 1600))
    assert long < 4.6 * short


# -- nothing for nothing -----------------------------------------------------------------------------------------------


def test_what_need_not_be_copied_is_not():
    embeds, features = make_inputs(9)
    real = torch.ones(2, 8, dtype=torch.bool)
    text = compress_text(embeds[:, 1:], features, real, ~real, 0.5, "novelty")
    assert text.features.data_ptr() == features.data_ptr() and text.embeds.data_ptr() == embeds[:, 1:].data_ptr()
    record = DecoderRecord([embeds], [features])
    assert record.take()[1] is features and not record.features


def test_a_target_with_one_rule_runs_no_head_to_find_it(monkeypatch):
    from families import family

    for name, num_calls in (("llama", 0), ("gemma2", 1)):
        target, calls = family(name).make_target(), []
        view = Target(target)
        with torch.no_grad():
            features = torch.randn(2, target.config.get_text_config().hidden_size, dtype=target.dtype)
            logits = view.logits(features)
            view.lm_head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            view.learn_logit_rule(features, logits)
        assert len(calls) == num_calls


def test_blocks_are_given_visibilities():
    masks = DraftMasks(torch.ones(1, 2, 2, dtype=torch.bool), FromStart(behind=1))
    seen = masks.visibilities()
    assert isinstance(seen, Visibilities) and isinstance(seen.tokens, Listed) and seen.features is masks.features
