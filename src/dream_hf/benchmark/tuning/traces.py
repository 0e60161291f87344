"""Full draft trees at every token of an answer, from which the acceptance of any smaller tree can be told.

A node's score depends on its ancestors alone, and with the same top-k a tree of fewer levels is the upper part of a deeper
one, a smaller tree the best nodes of a larger one. So one full tree for each top-k is enough, at every position a step might
start from.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...data.prompts import on_model
from ...decoding import loop as generation
from ...decoding.tree import DraftTree
from ...drafters.dream.configuration import DreamConfig
from ...drafters.dream.drafter import DreamDrafter
from ...drafters.dream.state import DrafterState
from ...drafters.growth import LEVEL_PRICE, grow_tree
from ...drafters.levels import TargetHead
from ..methods import Method
from .choice import Space, Trace, num_candidates

AS_IT_IS = {"compile": False, "pause_below": 0.0}  # of the drafter while it is traced


def trace_answer(
    target: Any, drafter: DreamDrafter, inputs: Mapping[str, Any], temperature: float, limit: int, space: Space
) -> dict[int, Trace] | None:
    """Decode one prompt, token by token, and draft full trees below every token.

    Args:
        target (`PreTrainedModel`): The target.
        drafter (`DreamDrafter`): The drafter; its config is as before on return.
        inputs (`Mapping`): A processor's output, one row.
        temperature (`float`): 0 is greedy. A sampled answer is what speculative decoding would have drawn, too.
        limit (`int`): Longest answer.
        space (`Space`): Largest trees.

    Returns:
        `dict`: A trace for each top-k; None where the answer is a single token, which the prefill gives.
    """
    method = Method("trace", {"assistant_model": drafter, "return_dict_in_generate": True}, AS_IT_IS)
    inputs = on_model(inputs, target)
    with method.ready(target, inputs, temperature, limit) as arguments:
        tracer = _Tracer(drafter.config, space)
        with _growing_with(tracer.grow):
            output = target.generate(**inputs, **arguments)
    answer = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tracer.traces(answer) if len(answer) > 1 else None


@contextmanager
def _growing_with(grow: Any) -> Iterator[None]:
    """Let the loop draft with `grow`."""
    original = generation.grow_tree
    generation.grow_tree = grow
    try:
        yield
    finally:
        generation.grow_tree = original


class _Tracer:
    """Grows full trees where the loop asks for a tree, and gives it none."""

    def __init__(self, config: DreamConfig, space: Space):
        self.space = space
        self.configs: dict[int, Any] = {}
        for top_k in space.top_ks:
            full = copy.copy(config)
            full.tree_depth, full.tree_top_k = space.max_depth, top_k
            full.tree_size = num_candidates(space.max_depth, top_k)
            full.tree_min_level_probability = full.tree_min_node_probability = 0.0
            self.configs[top_k] = full
        self.found: dict[int, list[_FullTree]] = {top_k: [] for top_k in space.top_ks}

    def grow(
        self, state: DrafterState, head: TargetHead, roots: torch.Tensor, config: DreamConfig, max_depth: int | None
    ) -> DraftTree:
        """Stands in for `grow_tree`: a tree of the root alone, so that the step gains one token."""
        for top_k, full in self.configs.items():
            scores: list[torch.Tensor] = []
            tree = grow_tree(state, _with_scores(head, top_k, scores), roots, full)
            self.found[top_k].append(_FullTree(tree, scores, top_k, head.ends))
        return DraftTree.chain(roots)

    def traces(self, answer: list[int]) -> dict[int, Trace]:
        """What the trees held of an answer; the n-th tree has its n-th token at the root."""
        num_nodes = max(self.space.sizes)
        traces = {}
        for top_k, found in self.found.items():
            trees = found[: len(answer) - 1]
            paths = [tree.path(answer[at + 1 :]) for at, tree in enumerate(trees)]
            traces[top_k] = Trace(
                np.stack([tree.promise for tree in trees]),
                np.stack([tree.ranked(num_nodes)[0] for tree in trees]),
                np.stack([scores for scores, _ in paths]),
                np.stack([tree.ranked(num_nodes)[1] for tree in trees]),
                np.stack([log_probs for _, log_probs in paths]),
            )
        return traces


def _with_scores(head: TargetHead, top_k: int, scores: list[torch.Tensor]) -> TargetHead:
    """The same head, that notes the log-probabilities (beams, k) of the likeliest successors, level by level.

    It lets trees grow on below ends, so that all have the same nodes.
    """

    def logits(features: torch.Tensor) -> torch.Tensor:
        values = head.logits(features)
        scores.append(values[0].log_softmax(-1).topk(top_k, dim=-1).values.cpu())
        return values

    return replace(head, logits=logits, ends=frozenset())


class _FullTree:
    """All nodes of a tree with their scores, in the order they were found: level by level, beam by beam."""

    def __init__(self, tree: DraftTree, scores: list[torch.Tensor], top_k: int, ends: frozenset[int]):
        self.tokens, self.parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
        own = np.concatenate([level.double().flatten().numpy() for level in scores])
        if len(own) + 1 != len(self.tokens):
            raise RuntimeError(f"A tree of {len(self.tokens)} nodes was grown from {len(own)} candidates.")
        self.ends = [num_candidates(level, top_k) for level in range(1, len(scores) + 1)]
        total = np.zeros(len(self.tokens))
        for start, end in zip([0, *self.ends], self.ends, strict=False):
            parents = self.parents[start + 1 : end + 1]
            total[start + 1 : end + 1] = own[start:end] + total[parents]
        self.probabilities = np.exp(total[1:])
        levels = np.searchsorted(self.ends, np.arange(len(own)), side="right")
        self.log_probs = total[1:]
        self.scores = self.log_probs - LEVEL_PRICE * levels
        starts = [0, *self.ends[:-1]]
        # As growth sees it: the probability of the top-k nodes of a level together, of those that do not end the text.
        probabilities = np.where(np.isin(self.tokens[1:], list(ends)), 0.0, self.probabilities)
        self.promise = np.array(
            [np.sort(probabilities[start:end])[-top_k:].sum() for start, end in zip(starts, self.ends, strict=True)]
        )

    def ranked(self, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and log-probabilities of the `num_nodes` best nodes of the first 1, 2, ... levels, (D, N) each."""
        scores, log_probs = np.full((2, len(self.ends), num_nodes), -np.inf)
        for level, end in enumerate(self.ends):
            best = np.argsort(-self.scores[:end], kind="stable")[:num_nodes]
            scores[level, : len(best)], log_probs[level, : len(best)] = self.scores[best], self.log_probs[best]
        return scores, log_probs

    def path(self, following: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Scores and log-probabilities of the nodes that hold the tokens `following` the root, (D,) each."""
        places = list(zip(self.parents, self.tokens, strict=True))
        held = {place: node for node, place in enumerate(places) if node}  # the root is no child of its own
        (scores, log_probs), node = np.full((2, len(self.ends)), -np.inf), 0
        for level, token in enumerate(following[: len(self.ends)]):
            child = held.get((node, token))
            if child is None:
                break
            scores[level], log_probs[level], node = self.scores[child - 1], self.log_probs[child - 1], child
        return scores, log_probs
