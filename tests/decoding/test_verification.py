"""Which path is kept: against walking the tree by hand, and against exact enumeration of the drawn distribution."""

from __future__ import annotations

import itertools

import pytest
import torch
from nodes import random_tree
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from dream_hf.decoding.acceptance import accept_greedy, accept_sampled, sample
from dream_hf.decoding.outputs import Recorder
from dream_hf.decoding.sampling import Accepted, Sampler
from dream_hf.decoding.sequences import Sequences
from dream_hf.decoding.stopping import Stopping
from dream_hf.decoding.tree import DraftTree

NUM_TOKENS = 4


def walk(tree: DraftTree, row: int, choices: list[int]) -> tuple[list[int], list[int]]:
    """Path and tokens of one row, by the definition."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    path = [0]
    while True:
        node = path[-1]
        children = [c for c in range(1, len(tokens)) if parents[c] == node and tokens[c] == choices[node]]
        if not children:
            return path, [choices[node] for node in path]
        path.append(children[0])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_nodes", [1, 5, 24])
def test_greedy_and_walking_follow_the_target_s_choices(num_nodes, seed):
    generator = torch.Generator().manual_seed(seed)
    tree = random_tree(3, num_nodes, generator, num_tokens=NUM_TOKENS)
    choices = torch.randint(NUM_TOKENS, (3, num_nodes), generator=generator)
    acceptance = accept_greedy(tree, choices)
    verdict = walked(tree, choices)
    for row in range(3):
        path, tokens = walk(tree, row, choices[row].tolist())
        length = int(acceptance.lengths[row])
        assert acceptance.path[row, :length].tolist() == path
        assert acceptance.path[row, length:].sum() == 0
        assert acceptance.fetch()()[row] == tokens
        assert verdict.path[row].tolist() == path + [0] * (verdict.path.shape[1] - length)
        assert verdict.tokens[row, : verdict.counts[row]].tolist() == tokens


def test_the_whole_of_a_chain_is_accepted_with_a_bonus():
    tokens = torch.tensor([[9, 5, 6, 7]])
    tree = DraftTree.from_parents(tokens, torch.tensor([[0, 0, 1, 2]]), 3)
    acceptance = accept_greedy(tree, torch.tensor([[5, 6, 7, 8]]))
    assert acceptance.path.tolist() == [[0, 1, 2, 3]] and acceptance.fetch()() == [[5, 6, 7, 8]]


def test_a_matching_node_below_a_rejected_one_is_rejected():
    tree = DraftTree.from_parents(torch.tensor([[9, 5, 6]]), torch.tensor([[0, 0, 1]]), 2)
    acceptance = accept_greedy(tree, torch.tensor([[4, 6, 0]]))
    assert acceptance.fetch()() == [[4]]


class Choices(LogitsProcessor):
    """Remembers how many rows of which length it was shown; in a walk, since it is no stock one."""

    def __init__(self):
        self.shown = []

    def __call__(self, input_ids, scores):
        self.shown.append(tuple(input_ids.shape))
        return scores


def walked(tree, choices, is_resting=(), in_step=False, processor=None, ends=(), starts=None) -> Accepted:
    """What rows gain where the target's choices after each node are `choices` (B, N)."""
    batch = tree.tokens.shape[0]
    texts = Sequences(torch.zeros(batch, 1, dtype=torch.long), 0)
    texts.extend(torch.ones(batch, 3, dtype=torch.long), starts or [0] * batch)
    judge = Stopping(StoppingCriteriaList([EosTokenCriteria([99, *ends]), MaxLengthCriteria(100)]), batch)
    for row in is_resting:
        judge.ended_at[row] = texts.lengths[row]
    chooser = Sampler(LogitsProcessorList([processor or Choices()]), do_sample=False, in_step=in_step)
    logits = torch.nn.functional.one_hot(choices, 100).float()
    return chooser.verify(tree, logits, texts, judge, Recorder(GenerationConfig(), batch, []))


CHAINS = DraftTree.from_parents(torch.tensor([[9, 5, 6, 7]] * 3), torch.tensor([[0, 0, 1, 2]] * 3), 3)
CHOICES = torch.tensor([[5, 6, 7, 8], [5, 6, 1, 8], [4, 6, 7, 8]])


def test_rows_walk_in_step_and_resting_rows_do_not_walk():
    processor = Choices()
    assert walked(CHAINS, CHOICES, is_resting=[2], processor=processor).counts.numbers == [4, 3, 0]
    assert processor.shown == [(2, 1), (2, 2), (2, 3), (1, 4)]  # only rows that are asked about
    processor = Choices()
    assert walked(CHAINS, CHOICES, is_resting=[2], in_step=True, processor=processor).counts.numbers == [3, 3, 0]
    assert processor.shown == [(3, 1), (3, 2), (3, 3)]


def test_rows_of_one_length_are_asked_about_together():
    processor = Choices()
    assert walked(CHAINS, CHOICES, processor=processor, starts=[0, 2, 3]).counts.numbers == [4, 3, 1]
    assert processor.shown == [(1, 1), (1, 2), (2, 3), (3, 4), (1, 5)]


def test_a_row_that_ends_stops_and_does_not_stop_others():
    for in_step in (False, True):
        verdict = walked(CHAINS, CHOICES, is_resting=[1, 2], in_step=in_step, ends=[6])
        assert verdict.counts.numbers == [2, 0, 0] and verdict.tokens[0].tolist() == [5, 6]
    choices = torch.tensor([[5, 6, 7, 8], [3, 6, 7, 8], [5, 6, 7, 8]])
    assert walked(CHAINS, choices, in_step=True, ends=[3]).counts.numbers == [4, 1, 4]


def test_of_siblings_with_one_token_the_first_is_followed():
    tree = DraftTree.from_parents(torch.tensor([[9, 5, 5, 6]]), torch.tensor([[0, 0, 0, 1]]), 2)
    assert walked(tree, torch.tensor([[5, 6, 7, 8]])).path.tolist() == [[0, 1, 3]]


# --- sampling, by enumeration ---


def sequence_probabilities(tree: DraftTree, probabilities: torch.Tensor, outcome: list[int]) -> float:
    """Probability that one row's verification yields exactly the tokens of `outcome`, under the target alone."""
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    node, total = 0, 1.0
    for position, token in enumerate(outcome):
        total *= float(probabilities[0, node, token])
        child = next((c for c in range(1, len(tokens)) if parents[c] == node and tokens[c] == token), None)
        is_last = position == len(outcome) - 1
        if is_last != (child is None):
            return 0.0  # goes on where the tree does, ends where it does not
        node = child if child is not None else node
    return total


def outcomes(tree: DraftTree) -> list[tuple[int, ...]]:
    longest = int(tree.depths.max()) + 1
    return [o for n in range(1, longest + 1) for o in itertools.product(range(NUM_TOKENS), repeat=n)]


def exact_distribution(tree: DraftTree, probabilities: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Distribution of what `accept_greedy` makes of independent draws after every node, by enumerating all of them."""
    num_nodes = tree.num_nodes
    found: dict[tuple[int, ...], float] = {}
    draws = torch.tensor(list(itertools.product(range(NUM_TOKENS), repeat=num_nodes)))
    weights = torch.ones(len(draws), dtype=torch.float64)
    for node in range(num_nodes):
        weights = weights * probabilities[0, node].double()[draws[:, node]]
    many = DraftTree(
        *(
            value.expand(len(draws), *value.shape[1:])
            for value in (tree.tokens, tree.parents, tree.depths, tree.ancestors)
        ),
        max_depth=tree.max_depth,
    )
    for tokens, weight in zip(accept_greedy(many, draws).fetch()(), weights.tolist(), strict=True):
        found[tuple(tokens)] = found.get(tuple(tokens), 0.0) + weight
    return found


@pytest.mark.parametrize("seed", range(8))
def test_enumerated_draws_have_the_target_s_distribution(seed):
    generator = torch.Generator().manual_seed(seed)
    tree = random_tree(1, 6, generator, num_tokens=NUM_TOKENS)
    probabilities = torch.rand(1, 6, NUM_TOKENS, generator=generator).pow(3)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    found = exact_distribution(tree, probabilities)
    assert abs(sum(found.values()) - 1) < 1e-6
    for outcome in outcomes(tree):
        assert abs(found.get(outcome, 0.0) - sequence_probabilities(tree, probabilities, list(outcome))) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_accept_sampled_has_the_target_s_distribution(seed):
    """Frequencies of 60,000 rows against exact probabilities, chi-square."""
    stats = pytest.importorskip("scipy.stats")
    num_rows = 60_000
    generator = torch.Generator().manual_seed(seed)
    tree = random_tree(1, 6, generator, num_tokens=NUM_TOKENS)
    probabilities = torch.rand(1, 6, NUM_TOKENS, generator=generator)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    many = DraftTree(
        *(
            value.expand(num_rows, *value.shape[1:])
            for value in (tree.tokens, tree.parents, tree.depths, tree.ancestors)
        ),
        max_depth=tree.max_depth,
    )
    counts: dict[tuple[int, ...], int] = {}
    for tokens in accept_sampled(many, probabilities.expand(num_rows, -1, -1), generator).fetch()():
        counts[tuple(tokens)] = counts.get(tuple(tokens), 0) + 1
    exact = {o: sequence_probabilities(tree, probabilities, list(o)) for o in outcomes(tree)}
    exact = {outcome: p for outcome, p in exact.items() if p > 0}
    assert set(counts) <= set(exact)
    observed = [counts.get(outcome, 0) for outcome in exact]
    expected = [p / sum(exact.values()) * num_rows for p in exact.values()]
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_certain_tokens_are_always_drawn_and_impossible_ones_never():
    probabilities = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]).expand(500, 2, 3)
    drawn = sample(probabilities, torch.Generator().manual_seed(0))
    assert drawn.shape == (500, 2)
    assert (drawn[:, 0] == 1).all() and set(drawn[:, 1].tolist()) == {0, 2}
