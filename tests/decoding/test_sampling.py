"""Sampled output has the target's distribution: chi-square of generated tokens against exact enumeration."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from distributions import NUM_TOKENS, draw, exact_joint, p_value, tiny_llama, tiny_prompt, tiny_qwen2_vl
from torch import Tensor
from transformers import LogitsProcessorList

from dream_hf import DreamDrafter
from dream_hf.decoding import sampling as choosing
from dream_hf.decoding.acceptance import Acceptance, accept_sampled, sample
from dream_hf.decoding.sampling import Accepted, Sampler
from dream_hf.decoding.tree import DraftTree

LIMIT = 1e-3
NUM_DRAWS, BATCH_SIZE, NUM_NEW = 4096, 512, 4
TREES = {
    "tree": {"tree_depth": 3, "tree_top_k": 2, "tree_size": 6},
    "wide": {"tree_depth": 2, "tree_top_k": 4, "tree_size": 12},
    "chain": {"tree_depth": 3, "tree_top_k": 1, "tree_size": 3},
}
COMBINATION = {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3}
SETTINGS = {
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1.0": {"temperature": 1.0},
    "temperature 1.5": {"temperature": 1.5},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.2},
    "repetition penalty": {"repetition_penalty": 1.5},
    "no repeated bigram": {"no_repeat_ngram_size": 2},
    "combination": COMBINATION,
}
PICTURE_TOKENS = {"suppress_tokens": [6, 7, 8]}


@functools.cache
def target_of(name: str):
    return {"llama": tiny_llama, "qwen2_vl": tiny_qwen2_vl}[name]()


def make_drafter(target, is_peaked: bool = False, **tree) -> DreamDrafter:
    """Untrained; or as sure as it is wrong."""
    torch.manual_seed(0)
    drafter = DreamDrafter.for_target(target, **tree)
    if is_peaked:
        drafter.norm.weight.data.mul_(30.0)
    return drafter


def p_values(
    target, drafter, num_draws: int = NUM_DRAWS, batch_size: int = BATCH_SIZE, **settings
) -> tuple[float, ...]:
    """Of the joint distribution of the first three tokens, and of the last three, out of four."""
    inputs = tiny_prompt(target)
    joint = exact_joint(target, inputs, NUM_NEW, **settings)
    torch.manual_seed(0)
    draws = draw(target, inputs, num_draws, NUM_NEW, batch_size, assistant_model=drafter, **settings)
    return p_value(draws[:, :3], joint.sum(3)), p_value(draws[:, 1:], joint.sum(0))


# --- generate() ---


@pytest.mark.parametrize("is_peaked", [False, True], ids=["untrained", "peaked"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_have_the_targets_distribution(settings, is_peaked):
    target = target_of("llama")
    drafter = make_drafter(target, is_peaked, **TREES["tree"])
    assert min(p_values(target, drafter, **settings)) >= LIMIT


@pytest.mark.parametrize("tree", ["wide", "chain"])
def test_any_shape_of_tree(tree):
    target = target_of("llama")
    assert min(p_values(target, make_drafter(target, **TREES[tree]), **COMBINATION)) >= LIMIT


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, COMBINATION], ids=["temperature 1.0", "combination"])
def test_pictures_and_three_axes_of_positions(settings):
    target = target_of("qwen2_vl")
    assert (
        min(p_values(target, make_drafter(target, **TREES["tree"]), num_draws=2048, **settings, **PICTURE_TOKENS))
        >= LIMIT
    )


def test_one_row_at_a_time():
    target = target_of("llama")
    drafter = make_drafter(target, **TREES["tree"])
    assert min(p_values(target, drafter, num_draws=250, batch_size=1, **COMBINATION)) >= LIMIT


def test_rows_accept_different_numbers_of_tokens():
    target = target_of("llama")
    inputs = tiny_prompt(target)
    batch = {name: value.repeat(64, 1) for name, value in inputs.items()}
    torch.manual_seed(0)
    out = target.generate(
        **batch,
        assistant_model=make_drafter(target, **TREES["tree"]),
        max_new_tokens=8,
        do_sample=True,
        return_dict_in_generate=True,
    )
    assert set(out.accepted_lengths[:, 0].tolist()) >= {1, 2, 3}


def test_plain_sampling_passes_the_same_test():
    target = target_of("llama")
    assert min(p_values(target, None, **COMBINATION)) >= LIMIT


# --- wrong rules fail the same test ---


def take_first_child(tree: DraftTree, choices: Tensor) -> Acceptance:
    """Accepts the likeliest drafted child whatever the target says."""
    choices = choices.clone()
    if tree.num_nodes > 1:  # the last step may be of the root alone
        choices[:, 0] = tree.tokens[:, 1]
    return ACCEPT_GREEDY(tree, choices)


def one_by_one(tree: DraftTree, probabilities: Tensor, removes_rejected: bool = True) -> list[list[int]]:
    """The rule as method papers write it, row by row: try each child; what is rejected is removed, or wrongly is not."""
    rows = []
    for tokens, parents, distributions in zip(tree.tokens.tolist(), tree.parents.tolist(), probabilities, strict=True):
        node, emitted = 0, []
        while node is not None:
            p, node_was, node = distributions[node].clone(), node, None
            for child in (child for child in range(1, len(tokens)) if parents[child] == node_was):
                if torch.rand(()) < p[tokens[child]] / p.sum():
                    node = child
                    break
                if removes_rejected:
                    p[tokens[child]] = 0
            emitted.append(tokens[node] if node is not None else int(sample(p / p.sum())))
        rows.append(emitted)
    return rows


ACCEPT_GREEDY, VERIFY = choosing.accept_greedy, Sampler.verify


def verify_with_whole_bonus(self: Sampler, tree, logits, texts, ends, recorder, look_ahead) -> Accepted:
    """Draws the bonus token from all of the distribution, rejected children included."""
    scores = self.processors(tree.tokens.view(-1, 1), logits.flatten(0, 1)).view_as(logits)
    emitted = one_by_one(tree, scores.softmax(-1), removes_rejected=False)
    choices = torch.zeros_like(tree.tokens)
    for row, (edges, tokens) in enumerate(zip(tree.children(), emitted, strict=True)):
        node = 0
        for token in tokens:
            choices[row, node] = token
            node = edges.get((node, token), 0)
    acceptance = ACCEPT_GREEDY(tree, choices)
    return choosing._accept(acceptance, acceptance.fetch()(), scores, logits, texts, ends, recorder)


def verify_without_processors(self: Sampler, *arguments) -> Accepted:
    return VERIFY(replace(self, processors=LogitsProcessorList()), *arguments)


WRONG = {
    "first child accepted": (choosing, "accept_greedy", take_first_child, {"temperature": 1.0}),
    "bonus from all of p": (Sampler, "verify", verify_with_whole_bonus, {"temperature": 1.0}),
    "processors forgotten": (Sampler, "verify", verify_without_processors, {"temperature": 0.7}),
    "prefix of the prompt": (
        choosing._Walk,
        "prefixes",
        lambda self, length, rows: self.sequences.at(self.sequences.prompt_length, rows),
        {"repetition_penalty": 3.0},
    ),
}


@pytest.mark.parametrize(("owner", "name", "wrong", "settings"), WRONG.values(), ids=WRONG)
def test_wrong_rules_are_caught(monkeypatch, owner, name, wrong, settings):
    target = target_of("llama")
    drafter = make_drafter(target, **TREES["tree"])
    monkeypatch.setattr(owner, name, wrong)
    assert min(p_values(target, drafter, num_draws=2048, **settings)) < LIMIT


# --- accept_sampled by itself ---

PARENTS = [0, 0, 0, 1, 1, 2, 3]
TOKENS = [0, 1, 4, 2, 0, 3, 5]
NUM_ROWS = 8000


def lone_tree(num_rows: int) -> DraftTree:
    return DraftTree.from_parents(
        torch.tensor(TOKENS).expand(num_rows, -1), torch.tensor(PARENTS).expand(num_rows, -1), max_depth=3
    )


def node_distributions() -> Tensor:
    return (torch.randn(len(TOKENS), NUM_TOKENS, generator=torch.Generator().manual_seed(0)) * 0.8).softmax(-1)


def outcomes(node: int = 0) -> dict[tuple[int, ...], float]:
    """Every sequence a step can emit from a node on, and its probability under the target."""
    p = node_distributions()[node].double().tolist()
    found: dict[tuple[int, ...], float] = {}
    for token in range(NUM_TOKENS):
        child = next((n for n in range(1, len(TOKENS)) if PARENTS[n] == node and TOKENS[n] == token), None)
        tails = {(): 1.0} if child is None else outcomes(child)
        found |= {(token, *tail): p[token] * chance for tail, chance in tails.items()}
    return found


def p_of_emitted(emitted: list[tuple[int, ...]]) -> float:
    expected = outcomes()
    assert sum(expected.values()) == pytest.approx(1.0)
    indices = {sequence: index for index, sequence in enumerate(expected)}
    if not indices.keys() >= set(emitted):  # it stopped where it should have gone on to a child
        return 0.0
    draws = torch.tensor([[indices[sequence]] for sequence in emitted])
    return p_value(draws, torch.tensor(list(expected.values()), dtype=torch.float64))


def emitted_by(accepted: Acceptance) -> list[tuple[int, ...]]:
    return [tuple(row[:n]) for row, n in zip(accepted.tokens.tolist(), accepted.lengths.tolist(), strict=True)]


def test_accept_sampled_has_the_targets_distribution():
    probabilities = node_distributions().expand(NUM_ROWS, -1, -1)
    accepted = accept_sampled(lone_tree(NUM_ROWS), probabilities, torch.Generator().manual_seed(2))
    assert set(accepted.lengths.tolist()) == {1, 2, 3, 4}
    assert p_of_emitted(emitted_by(accepted)) >= LIMIT


def test_trying_children_one_by_one_is_the_same_rule():
    torch.manual_seed(2)
    probabilities = node_distributions().expand(NUM_ROWS // 2, -1, -1)
    tree = lone_tree(NUM_ROWS // 2)
    assert p_of_emitted([tuple(row) for row in one_by_one(tree, probabilities)]) >= LIMIT
    assert p_of_emitted([tuple(row) for row in one_by_one(tree, probabilities, removes_rejected=False)]) < LIMIT


def test_the_likeliest_token_is_not_a_sample():
    choices = node_distributions().argmax(-1).expand(NUM_ROWS, -1)
    assert p_of_emitted(emitted_by(ACCEPT_GREEDY(lone_tree(NUM_ROWS), choices))) < LIMIT
