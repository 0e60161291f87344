"""Pauses in drafting: when they come, what they cost, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from distributions import draw, exact_joint, p_value, tiny_llama, tiny_prompt
from double import TIGHT
from families import FAMILIES, Inputs, Target, family
from lossless import (
    CHAIN,
    SMALL_TREE,
    Settings,
    assert_counts_add_up,
    assert_lossless,
    assert_same_tokens,
    gains,
    generate,
    oracle,
    stop_tokens,
    untrained,
)
from test_outputs import assert_same_steps
from transformers import StoppingCriteria, StoppingCriteriaList

from dream_hf import DreamConfig, DreamDrafter
from dream_hf.decoding import draft_schedule as pausing
from dream_hf.decoding import loop as generation
from dream_hf.decoding.draft_schedule import FIRST_PAUSE, LONGEST_PAUSE, PROBE, WINDOW, DraftSchedule
from dream_hf.decoding.tree import DraftTree
from dream_hf.drafters import lazy_session, new_drafters
from dream_hf.drafters.dream.state import DrafterState, DreamLevels
from dream_hf.drafters.pending import PendingTokens

TEXT_LEN = 24
SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 32}
ALWAYS = 100.0  # more than any step gains

each_batch = pytest.mark.parametrize("batch", [1, 3])
some_families = pytest.mark.parametrize("name", ["llava_clip_llama", "gemma3", "qwen2_vl"])


# --- when ---


def drafted_steps(pause_below: float, steps: Iterable[int]) -> list[bool]:
    """Which steps are drafted if every step, were it drafted, gained the number given."""
    rule = DraftSchedule(pause_below)
    is_drafted = []
    for gained in steps:
        is_drafted.append(not rule.is_paused)
        rule.note([1 if rule.is_paused else gained])
    return is_drafted


def runs(flags: list[bool]) -> list[tuple[bool, int]]:
    """Lengths of the runs of equal flags."""
    found: list[tuple[bool, int]] = []
    for flag in flags:
        found[-1:] = [(flag, found[-1][1] + 1)] if found and found[-1][0] == flag else [*found[-1:], (flag, 1)]
    return found


def test_pauses_grow_while_probes_fail():
    lengths = [FIRST_PAUSE * 2**index for index in range(20)]
    expected = [(True, PROBE)]  # nothing is known at the start
    for length in lengths[:8]:
        expected += [(False, min(length, LONGEST_PAUSE)), (True, PROBE)]
    total = sum(length for _, length in expected)
    assert runs(drafted_steps(1.5, [1] * total)) == expected


@pytest.mark.parametrize("pause_below", [0.0, 1.0])
def test_a_threshold_every_step_reaches_never_pauses(pause_below):
    assert all(drafted_steps(pause_below, [1] * 200))


def test_what_counts_is_the_mean_of_the_last_drafted_steps():
    assert all(drafted_steps(2.0, [1, 3] * 50))
    good, bad = [5] * 10, [1] * WINDOW
    assert runs(drafted_steps(2.0, good + bad + good))[0] == (True, 10 + WINDOW)  # 5, 1, 1, 1 are just enough
    assert runs(drafted_steps(2.1, good + bad + good))[0] == (True, 10 + WINDOW - 1)


def test_after_a_good_stretch_pauses_start_short_again():
    bad, good = [1] * (PROBE + FIRST_PAUSE + PROBE + 2 * FIRST_PAUSE), [4] * WINDOW
    again = runs(drafted_steps(2.0, bad + good + [1] * 40))
    assert [length for is_drafted, length in again if not is_drafted][:3] == [
        FIRST_PAUSE,
        2 * FIRST_PAUSE,
        FIRST_PAUSE,
    ]


def test_trees_go_twice_as_deep_as_the_best_of_the_last_steps():
    rule, depths = DraftSchedule(0.5), []
    for gained in ([9], [1, 2], [1, 1], [1], [2], [5], [11], [1], [1], [1], [1]):
        depths.append(rule.max_depth)
        rule.note(gained)
    assert depths == [None] * WINDOW + [18, 4, 10, 22, 22, 22, 22] and rule.max_depth == 2


def test_without_a_threshold_trees_are_as_deep_as_ever():
    rule = DraftSchedule(0.0)
    for _ in range(2 * WINDOW):
        rule.note([1])
    assert rule.max_depth is None


def test_a_pause_leaves_the_depth_as_it_was():
    rule = DraftSchedule(1.5)
    for _ in range(WINDOW + 1):
        rule.note([1])
    assert rule.is_paused and rule.max_depth == 2


def test_a_drafter_that_is_wrong_drafts_shallow_trees():
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    drafter = untrained(target, tree_depth=8, tree_top_k=1, tree_size=8)
    expected = generate(target, inputs, assistant_model=drafter)
    drafter.config.pause_below = 0.5  # never pauses
    out = generate(target, inputs, assistant_model=drafter)
    assert_same_tokens(expected, out)
    best = out.accepted_lengths[0].unfold(0, WINDOW, 1).amax(-1)[:-1]
    full, limited = out.drafted_lengths[0].tensor_split([WINDOW])
    assert (full == 8).all() and (limited <= 2 * best).all() and (limited[:-2] == 2 * best[:-2]).all()
    assert (expected.drafted_lengths[0, :-8] == 8).all()


def test_the_rule_is_a_function_of_the_gains():
    steps = torch.randint(1, 5, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    assert drafted_steps(2.4, steps) == drafted_steps(2.4, steps)
    assert 50 < sum(drafted_steps(2.4, steps)) < 450


@pytest.mark.parametrize("value", [-0.5, float("inf"), float("nan")])
def test_a_threshold_that_is_none(value):
    with pytest.raises(ValueError, match="`pause_below`"):
        DreamConfig(pause_below=value)


@pytest.fixture
def as_released(monkeypatch):
    """With the value that new drafters start with outside the tests."""
    monkeypatch.undo()
    return new_drafters.NEW_DRAFTERS


def test_new_drafters_pause_and_saved_ones_keep_their_value(as_released, tmp_path):
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    drafter = DreamDrafter.for_target(target)
    assert as_released.items() <= vars(drafter.config).items() and drafter.config.pause_below > 1
    num_drafted = (generate(target, inputs, assistant_model=drafter, max_new_tokens=64).drafted_lengths > 0).sum()
    assert PROBE <= num_drafted <= 16
    for value in (0.0, as_released["pause_below"], 3.0):
        given = DreamDrafter.for_target(target, pause_below=value) if value else DreamDrafter(DreamConfig(**SMALL))
        given.save_pretrained(tmp_path / str(value))
        saved = DreamConfig.from_pretrained(tmp_path / str(value))
        assert saved.pause_below == value


def test_the_config_keeps_it(tmp_path):
    assert DreamConfig().pause_below == 0
    DreamConfig(pause_below=1.7).save_pretrained(tmp_path)
    assert DreamConfig.from_pretrained(tmp_path).pause_below == 1.7


# --- what is read afterwards ---


def test_unread_text_is_joined_row_by_row():
    unread = PendingTokens()
    assert not unread
    parts = [([3, 1], 3), ([1, 1], 1), ([0, 2], 2)]
    expected: list[list[int]] = [[], []]
    for first, (counts, width) in enumerate(parts):
        tokens = 10 * torch.arange(1, 3)[:, None] + 100 * first + torch.arange(width)
        for row, count in enumerate(counts):
            expected[row] += tokens[row, :count].tolist()
        unread.add(tokens, tokens[..., None].float().expand(-1, -1, 2) / 2, counts)
    assert unread
    tokens, features, counts = unread.take()
    assert list(counts) == [4, 4] and tokens.shape == (2, 4) and features.shape == (2, 4, 2)
    assert tokens.tolist() == expected
    assert torch.equal(features[..., 1] * 2, tokens.float())
    assert not unread


def plant(monkeypatch: pytest.MonkeyPatch, sequences: torch.Tensor, mask: torch.Tensor) -> None:
    """Let steps gain 1, 2, 3 or 4 tokens, different rows at different times, whatever the drafter says."""
    starts = (mask == 0).sum(1).tolist()
    turns = iter(range(10_000))

    def grow(levels: DreamLevels, roots: torch.Tensor, *_: Any) -> DraftTree:
        turn, state = next(turns), levels.state
        tokens = roots.new_full((len(roots), 4), 3)
        tokens[:, :1] = roots
        assert state.root_positions is not None
        for row, position in enumerate(state.root_positions[:, 0].tolist()):
            at = starts[row] + position
            if at + 1 >= sequences.shape[1]:
                continue
            assert sequences[row, at] == roots[row, 0]  # the drafter stands where the text does
            true = sequences[row, at + 1 : at + 1 + (turn + row) % 4]
            tokens[row, 1 : 1 + len(true)] = true
            if len(true) < 3 and at + 1 + len(true) < sequences.shape[1]:
                tokens[row, 1 + len(true)] = (sequences[row, at + 1 + len(true)] + 1) % 90
        return DraftTree.chain(tokens)

    monkeypatch.setattr(lazy_session, "grow_tree", grow)


def last_state(monkeypatch: pytest.MonkeyPatch, target: Target, inputs: Inputs, **settings: Any):
    """Output, and the drafter's state when it has read all of it, as it does when a next turn begins."""
    states: list[DrafterState] = []
    result = generation._Decoding.result

    def watched(decoding: Any):
        decoding.session._catch_up()
        states.append(decoding.session.state)
        return result(decoding)

    monkeypatch.setattr(generation._Decoding, "result", watched)
    out = generate(target, inputs, **settings)
    monkeypatch.setattr(generation._Decoding, "result", result)
    return out, states[0]


def assert_same_state(expected: DrafterState, actual: DrafterState) -> None:
    for ours, theirs in ((actual.tokens, expected.tokens), (actual.features, expected.features)):
        assert ours.lengths == theirs.lengths
    for ours, theirs in zip(actual.cache.layers, expected.cache.layers, strict=True):
        for row, length in enumerate(ours.slots.lengths):
            for name in ("keys", "values"):
                got, wanted = getattr(ours, name)[row, :, :length], getattr(theirs, name)[row, :, :length]
                torch.testing.assert_close(got, wanted, **TIGHT)


@some_families
@each_batch
def test_a_drafter_reads_what_it_missed(monkeypatch, name, batch):
    """After ragged steps and pauses, one of them at the end, it has read what it reads without pauses."""
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch, text_len=TEXT_LEN)
    drafter = untrained(target)
    plain = generate(target, inputs)
    plant(monkeypatch, plain.sequences, inputs["attention_mask"])
    found = []
    for drafter.config.pause_below in (0.0, ALWAYS):
        found.append(last_state(monkeypatch, target, inputs, assistant_model=drafter))
        assert_same_tokens(plain, found[-1][0])
    (steady, expected), (paused, actual) = found
    assert (steady.drafted_lengths != 0).all()
    drafted = paused.drafted_lengths.amax(0).tolist()
    assert drafted[-1] == 0 and drafted.count(0) > FIRST_PAUSE and any(drafted[WINDOW:])
    assert batch == 1 or len({tuple(row) for row in gains(paused)}) == batch
    assert_same_state(expected, actual)


def two_turns(drafter: DreamDrafter, target: Target, **settings: Any):
    """A chat of two turns from one cache, and the second turn from scratch."""
    ids = family("llama").make_inputs(target)["input_ids"]
    first = generate(target, {"input_ids": ids}, assistant_model=drafter, **settings)
    asked = {"input_ids": torch.cat([first.sequences, ids[:, 1:6]], dim=1)}
    plain = generate(target, asked)
    return plain, asked, generate(target, asked, assistant_model=drafter, past_key_values=first.past_key_values)


def test_a_chat_goes_on_after_a_pause(monkeypatch):
    target = family("llama").make_target()
    drafter = untrained(target, pause_below=ALWAYS)
    lengths = []
    read = DrafterState.read
    monkeypatch.setattr(
        DrafterState, "read", lambda self, *args: (lengths.append(self.tokens.longest), read(self, *args))[1]
    )
    expected, asked, out = two_turns(drafter, target)
    assert_same_tokens(expected, out)
    assert asked["input_ids"].shape[1] - 5 in lengths  # all of the first turn when the second began


class Ninth(StoppingCriteria):
    """Ends all rows at the ninth new token."""

    def __init__(self, prompt_length: int):
        self.end = prompt_length + 9

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.end)


@pytest.mark.parametrize("pause_below", [0.0, ALWAYS])
def test_tokens_beyond_a_stop_are_not_remembered(monkeypatch, pause_below):
    """Without an end-of-sequence token a row runs on until its step is over; what is too much is taken back."""
    target = family("llama").make_target()
    inputs = family("llama").make_inputs(target)
    drafter = untrained(target, pause_below=pause_below)
    plant(monkeypatch, generate(target, inputs).sequences, inputs["attention_mask"])
    criteria = StoppingCriteriaList([Ninth(inputs["input_ids"].shape[1])])
    out, state = last_state(monkeypatch, target, inputs, assistant_model=drafter, stopping_criteria=criteria)
    assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + 9
    assert state.tokens.lengths == [out.sequences.shape[1]]
    assert state.features.lengths == [out.sequences.shape[1] - 1]


# --- what they cost ---


def count_forwards(module: torch.nn.Module) -> list[int]:
    """Gets an entry for every forward of a module."""
    forwards: list[int] = []
    module.register_forward_hook(lambda *_: forwards.append(1))
    return forwards


def test_an_untrained_drafter_is_hardly_asked():
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    drafter = untrained(target)
    forwards = count_forwards(drafter)
    counts = []
    for drafter.config.pause_below in (0.0, 1.5):
        forwards.clear()
        out = generate(target, inputs, assistant_model=drafter, max_new_tokens=128)
        counts.append(len(forwards))
    is_drafted = [drafted > 0 for drafted in out.drafted_lengths[0].tolist()]
    assert is_drafted == drafted_steps(1.5, [1] * len(is_drafted))
    num_drafted = sum(is_drafted)
    assert num_drafted < len(is_drafted) / 8
    # It reads the prompt, after every drafted step that another one follows, and at the end of every pause.
    num_reads = 1 + sum(is_next for is_next in is_drafted[1:])
    depths = [drafter.config.tree_depth] * PROBE + [2] * (num_drafted - PROBE)  # steps that gain one token
    assert counts[1] == num_reads + sum(depth - 1 for depth in depths)
    assert counts[1] < counts[0] / 8


@each_batch
def test_a_good_drafter_never_pauses(batch):
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target, batch)
    expected = generate(target, inputs)
    drafter, _ = oracle(target, inputs, expected.sequences, pause_below=1.5)
    out = generate(target, inputs, assistant_model=drafter)
    assert_same_tokens(expected, out)
    assert (out.drafted_lengths != 0).all()
    drafter.config.pause_below = 0.0
    assert torch.equal(generate(target, inputs, assistant_model=drafter).accepted_lengths, out.accepted_lengths)


def test_a_batch_pauses_as_a_whole():
    """On the mean over the rows that go on."""
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target, 3)
    expected = generate(target, inputs)
    drafter, _ = oracle(target, inputs, expected.sequences, pause_below=3.9)
    out = generate(target, inputs, assistant_model=drafter)
    assert_same_tokens(expected, out)
    rule = DraftSchedule(3.9)
    for gained, drafted in zip(out.accepted_lengths.T.tolist(), out.drafted_lengths.T.tolist(), strict=True):
        going = [row for row, count in enumerate(drafted) if count >= 0]
        assert all((drafted[row] == 0) == rule.is_paused for row in going)
        rule.note([gained[row] for row in going])
    assert (out.drafted_lengths == 0).any()


@each_batch
def test_the_counts_are_of_all_steps(batch):
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target, batch)
    forwards = count_forwards(target.get_decoder())
    out = generate(target, inputs, assistant_model=untrained(target, pause_below=1.5))
    assert out.accepted_lengths.shape == out.drafted_lengths.shape == (batch, len(forwards) - 1)
    is_plain = out.drafted_lengths == 0
    assert is_plain.any() and (out.accepted_lengths[is_plain] == 1).all()
    assert_counts_add_up(out)


# --- what they leave alone ---


EXACT: dict[str, Settings] = {
    "length": dict,
    "penalty": lambda: {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("settings", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("pause_below", [3.0, ALWAYS])
@some_families
@each_batch
def test_output_is_exact(name, batch, pause_below, settings):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, batch, text_len=TEXT_LEN)
    assert_lossless(target, inputs, settings, drafts=["untrained", "tree", "chain"], pause_below=pause_below)


@some_families
@each_batch
def test_what_comes_with_the_tokens_is_plain_decoding_s(name, batch):
    target = family(name).make_target(attn_implementation="eager")
    inputs = family(name).make_inputs(target, batch, text_len=TEXT_LEN)
    kinds = ("scores", "logits", "hidden_states", "attentions")
    wanted = {f"output_{kind}": True for kind in kinds}
    expected = generate(target, inputs, max_new_tokens=24, **wanted)
    drafter, _ = oracle(target, inputs, expected.sequences, pause_below=ALWAYS, tree_depth=2)
    out = generate(target, inputs, assistant_model=drafter, max_new_tokens=24, **wanted)
    assert_same_tokens(expected, out)
    assert (out.drafted_lengths == 0).any()
    for kind in kinds:
        assert_same_steps(getattr(expected, kind), getattr(out, kind), [24] * batch)


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_output_is_exact_for_every_family(family):
    target = family.make_target()
    inputs = family.make_inputs(target, 3, text_len=TEXT_LEN)
    assert_lossless(target, inputs, lambda: {"max_new_tokens": 32}, drafts=["tree"], pause_below=ALWAYS)


@some_families
def test_rows_that_end_in_a_pause(name):
    target = family(name).make_target()
    inputs = family(name).make_inputs(target, 3, text_len=TEXT_LEN)
    endless = generate(target, inputs)
    ends = stop_tokens(endless.sequences)
    assert_lossless(
        target, inputs, lambda: {"eos_token_id": ends}, foresight=dict, drafts=["tree", "chain"], pause_below=ALWAYS
    )


@pytest.mark.parametrize("batch_size", [1, 512])
def test_samples_keep_their_distribution(monkeypatch, batch_size):
    """Drafted and plain steps by turns, in answers of four tokens."""
    for name in ("WINDOW", "PROBE", "FIRST_PAUSE", "LONGEST_PAUSE"):
        monkeypatch.setattr(pausing, name, 1)
    target = tiny_llama()
    torch.manual_seed(0)
    shape = {"tree_depth": 3, "tree_top_k": 2, "tree_size": 6}
    drafter = DreamDrafter.for_target(target, **shape, pause_below=ALWAYS)
    inputs = tiny_prompt(target)
    joint = exact_joint(target, inputs, 4, temperature=0.8)
    torch.manual_seed(0)
    num_draws = 250 if batch_size == 1 else 4096
    draws = draw(target, inputs, num_draws, 4, batch_size, assistant_model=drafter, temperature=0.8)
    assert min(p_value(draws[:, :3], joint.sum(3)), p_value(draws[:, 1:], joint.sum(0))) >= 1e-3


def test_the_same_seed_gives_the_same_samples():
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target, 3)
    drafter = untrained(target, pause_below=1.5)
    outs = []
    for _ in range(2):
        torch.manual_seed(0)
        outs.append(generate(target, inputs, assistant_model=drafter, do_sample=True))
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert torch.equal(outs[0].drafted_lengths, outs[1].drafted_lengths) and (outs[0].drafted_lengths == 0).any()


def test_a_chain_pauses_too():
    target = family("llava_clip_llama").make_target()
    inputs = family("llava_clip_llama").make_inputs(target)
    out = generate(target, inputs, assistant_model=untrained(target, **SMALL_TREE | CHAIN, pause_below=1.5))
    assert (out.drafted_lengths == 0).sum() > FIRST_PAUSE
