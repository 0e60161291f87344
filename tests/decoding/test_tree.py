"""Draft trees as tensors, against walking up the parents one by one; and what the target makes of their nodes."""

from __future__ import annotations

import pytest
import torch
from double import TIGHT
from families import FAMILIES
from lossless import generate, oracle
from nodes import drive, random_tree, sequential_logits, texts_of, verify_tree

from dream_hf.decoding.tree import DraftTree


def path_to(parents: list[int], node: int) -> list[int]:
    """Nodes from the root to `node`."""
    path = [node]
    while path[-1] != 0:
        path.append(parents[path[-1]])
    return path[::-1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_nodes", [1, 2, 9, 33])
def test_depths_and_ancestors(num_nodes, seed):
    generator = torch.Generator().manual_seed(seed)
    tree = random_tree(3, num_nodes, generator)
    assert tree.num_nodes == num_nodes
    for row in range(3):
        for node in range(num_nodes):
            path = path_to(tree.parents[row].tolist(), node)
            assert int(tree.depths[row, node]) == len(path) - 1
            assert tree.ancestors[row, node].nonzero().flatten().tolist() == path


@pytest.mark.parametrize("depth", range(13))
def test_a_chain_of_any_depth(depth):
    tokens = torch.arange(depth + 1)[None]
    tree = DraftTree.from_parents(tokens, (tokens - 1).clamp(min=0), depth)
    assert torch.equal(tree.depths, tokens)
    assert torch.equal(tree.ancestors[0], torch.ones(depth + 1, depth + 1, dtype=torch.bool).tril())


def test_another_device():
    tree = DraftTree.from_parents(torch.tensor([[4, 5, 6]]), torch.tensor([[0, 0, 1]]), 2).to(torch.device("meta"))
    assert tree.max_depth == 2
    assert {tensor.device.type for tensor in (tree.tokens, tree.parents, tree.depths, tree.ancestors)} == {"meta"}


@pytest.mark.parametrize(
    ("family", "attention"),
    [(each, kind) for each in FAMILIES for kind in (["sdpa", "eager"] if each.supports_sdpa else ["eager"])],
    ids=str,
)
def test_nodes_have_the_logits_of_their_sequences(family, attention):
    """In rows of different lengths, far behind the prompt, with trees larger than a sliding window."""
    target = family.make_target(attn_implementation=attention)
    inputs = family.make_inputs(target, 3)
    drafter, _ = oracle(target, inputs, generate(target, inputs, max_new_tokens=40).sequences)

    def act(decoding):
        for _ in range(3):
            decoding.step()
        texts = texts_of(decoding)
        roots = torch.stack([text[-1] for text in texts])
        tree = random_tree(3, 14, torch.Generator().manual_seed(1), roots)
        return texts, tree, verify_tree(decoding, tree)

    texts, tree, logits = drive(target, inputs, drafter, act)
    assert len({len(text) for text in texts}) > 1
    for node in (0, 8, 13):
        expected = sequential_logits(target, inputs, texts, tree, node)
        torch.testing.assert_close(logits[:, node], expected, **TIGHT)
