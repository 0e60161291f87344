"""The tree of a lattice is what a search finds that always takes the best path next."""

from __future__ import annotations

import math
from heapq import heappop, heappush

import pytest
import torch

from dream_hf.decoding.settings import DraftSettings
from dream_hf.drafters.lattice import tree_of_lattice


def search(tokens, log_probs, size, end_ids=(), least=0.0):
    """Paths (tokens, log-probability) of one row, best first; among equals the shorter, then the one whose parent came
    first, then the one that stands first in the lattice."""
    depths = len(tokens)
    edge, found = [(0.0, 0, (), 0.0, ())], []
    order = {}
    while edge and len(found) <= size:
        _, _, _, log_prob, path = heappop(edge)
        if path:
            found.append((path, log_prob))
        order[path] = len(order)
        if len(path) == depths or (path and path[-1] in end_ids):
            continue
        for rank, (token, share) in enumerate(zip(tokens[len(path)], log_probs[len(path)], strict=True)):
            reached = log_prob + share
            if reached > -math.inf and math.exp(reached) >= least:
                heappush(edge, (-reached, len(path) + 1, (order[path], rank), reached, (*path, token)))
    return found[:size]


def paths_of(tree, row):
    """Every node but fillers, by its path."""
    found = {}
    for node in range(1, tree.num_nodes):
        if math.isfinite(float(tree.log_probs[row, node])):
            path = tuple(tree.tokens[row, tree.ancestors[row, node]].tolist()[1:])
            found[path] = float(tree.log_probs[row, node])
    return found


def lattice(kind, batch, depths, top_k, seed=0):
    """Tokens and log-probabilities (B, D, k), the likeliest of each depth first."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.stack([torch.randperm(50, generator=generator)[:top_k] for _ in range(batch * depths)]).view(
        batch, depths, top_k
    )
    if kind == "smooth":
        log_probs = torch.randn(batch, depths, 60, generator=generator).double().log_softmax(-1).topk(top_k).values
    elif kind == "ties":  # numbers that add up exactly: many paths are equally probable
        log_probs = -torch.randint(0, 3, (batch, depths, top_k), generator=generator).double()
    elif kind == "certain":  # a child is as probable as its parent
        log_probs = torch.full((batch, depths, top_k), -math.inf).double()
        log_probs[..., 0] = 0.0
    else:
        log_probs = torch.full((batch, depths, top_k), -math.log(top_k)).double()
    return tokens, log_probs.sort(dim=-1, descending=True).values


@pytest.mark.parametrize("size", [1, 7, 33])
@pytest.mark.parametrize(("depths", "top_k"), [(1, 3), (3, 1), (4, 3), (7, 5)])
@pytest.mark.parametrize("kind", ["smooth", "ties", "certain", "flat"])
def test_it_is_what_a_best_first_search_finds(kind, depths, top_k, size):
    for seed in range(4):
        tokens, log_probs = lattice(kind, 3, depths, top_k, seed)
        roots = torch.tensor([[77], [78], [79]])
        ends = frozenset(tokens[:, 1 % depths, 0].tolist()) if seed % 2 else frozenset()
        tree = tree_of_lattice(roots, tokens, log_probs, DraftSettings(tree_size=size, tree_top_k=top_k), ends)
        assert torch.equal(tree.tokens[:, :1], roots) and tree.num_nodes <= size + 1
        for row in range(3):
            expected = dict(search(tokens[row].tolist(), log_probs[row].tolist(), size, ends))
            assert paths_of(tree, row) == expected
        parents_come_first = tree.parents[:, 1:] < torch.arange(1, tree.num_nodes)
        assert parents_come_first.all()
        fillers = ~tree.log_probs.isfinite()
        assert (tree.tokens[fillers] == roots.expand_as(tree.tokens)[fillers]).all() and not tree.parents[
            fillers
        ].any()


@pytest.mark.parametrize("least", [0.02, 0.2, 0.9999])
def test_nodes_that_are_reached_too_rarely_are_left_out(least):
    tokens, log_probs = lattice("smooth", 2, 5, 4)
    settings = DraftSettings(tree_size=20, tree_min_node_probability=least)
    tree = tree_of_lattice(torch.zeros(2, 1, dtype=torch.long), tokens, log_probs, settings)
    rows = [dict(search(tokens[row].tolist(), log_probs[row].tolist(), 20, (), least)) for row in range(2)]
    assert [paths_of(tree, row) for row in range(2)] == rows
    assert tree.num_nodes == 1 + max(1, *map(len, rows))  # and where there are few, few are verified


def test_a_level_that_is_reached_too_rarely_is_the_last():
    tokens, log_probs = lattice("smooth", 2, 5, 4)
    log_probs[0, 0] = torch.tensor([0.6, 0.3, 0.05, 0.05]).log()  # the rows differ: 1.0 and far less
    log_probs[1, 0] = torch.tensor([0.1, 0.1, 0.1, 0.1]).log()
    log_probs[:, 1] = torch.tensor([0.4, 0.3, 0.1, 0.1]).log()
    settings = DraftSettings(tree_size=30, tree_top_k=4, tree_min_level_probability=0.5)
    tree = tree_of_lattice(torch.zeros(2, 1, dtype=torch.long), tokens, log_probs, settings)
    depths = [max(len(path) for path in paths_of(tree, row)) for row in range(2)]
    # 0.4 are reached at depth 1 of row 1; of row 0 the best four of depth 2 are 0.24, 0.18, 0.12 and 0.09 together.
    assert depths == [3, 1]


def test_a_lattice_without_depths_is_the_root():
    nothing = torch.zeros(2, 0, 4)
    tree = tree_of_lattice(torch.tensor([[3], [4]]), nothing.long(), nothing, DraftSettings())
    assert tree.tokens.tolist() == [[3], [4]]
