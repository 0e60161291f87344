"""Full draft trees at every token of an answer, from which the acceptance of any smaller tree can be told.

A node's score depends on its ancestors alone, and with the same top-k a tree of fewer levels is the upper part of a deeper
one, a smaller tree the best nodes of a larger one. So one full tree for each top-k is enough, at every position a step might
start from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...data.prompts import on_model
from ...decoding.drafter import Drafter, DrafterAround, DraftSession, Prefill, Verified
from ...decoding.settings import DraftSettings
from ...decoding.tree import DraftTree
from ...drafters.growth import LEVEL_PRICE, Level, LevelSource, grow_tree
from ..methods import Method
from .choice import Space, Trace, num_candidates


def trace_answer(
    target: Any, drafter: Drafter, inputs: Mapping[str, Any], temperature: float, limit: int, space: Space
) -> dict[int, Trace] | None:
    """Decode one prompt, token by token, and draft full trees below every token.

    Args:
        target (`PreTrainedModel`): The target.
        drafter (`Drafter`): The drafter, whose sessions offer their levels; not changed.
        inputs (`Mapping`): A processor's output, one row.
        temperature (`float`): 0 is greedy. A sampled answer is what speculative decoding would have drawn, too.
        limit (`int`): Longest answer.
        space (`Space`): Largest trees.

    Returns:
        `dict`: A trace for each top-k; None where the answer is a single token, which the prefill gives.
    """
    tracing = TracingDrafter(drafter.with_settings(compile=False, pause_below=0.0), space)
    method = Method("trace", {"assistant_model": tracing, "return_dict_in_generate": True})
    inputs = on_model(inputs, target)
    output = target.generate(**inputs, **method.ready(temperature, limit))
    answer = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return tracing.traces(answer) if len(answer) > 1 else None


class TracingDrafter(DrafterAround):
    """Grows full trees where the loop asks for a tree, and gives it none, so that every step gains one token.

    Args:
        drafter (`Drafter`): Whose trees to grow; its sessions are [`LevelSession`]s.
        space (`Space`): How deep and wide they are.
    """

    def __init__(self, drafter: Drafter, space: Space):
        super().__init__(drafter)
        self.space = space
        self.found: dict[int, list[_FullTree]] = {top_k: [] for top_k in space.top_ks}

    def start(self, prefill: Prefill, settings: DraftSettings) -> DraftSession:
        return _TracingSession(self, super().start(prefill, settings), settings, prefill.end_ids)

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


class _TracingSession(DraftSession):
    """A session of a [`TracingDrafter`], around one that reads and makes levels."""

    def __init__(self, tracing: TracingDrafter, inner: Any, settings: DraftSettings, ends: frozenset[int]):
        self.tracing, self.inner, self.ends = tracing, inner, ends
        space = tracing.space
        self.settings = {
            top_k: settings.changed(
                tree_depth=space.max_depth,
                tree_top_k=top_k,
                tree_size=num_candidates(space.max_depth, top_k),
                tree_min_level_probability=0.0,
                tree_min_node_probability=0.0,
            )
            for top_k in space.top_ks
        }

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        for top_k, settings in self.settings.items():
            levels = _NotedLevels(self.inner.levels())
            tree = grow_tree(levels, root_tokens, settings)  # below ends, too, so that all have the same nodes
            self.tracing.found[top_k].append(_FullTree(tree, levels.scores, top_k, self.ends))
        return DraftTree.chain(root_tokens)

    def read(self, verified: Verified) -> None:
        self.inner.read(verified)


class _NotedLevels:
    """Levels of one row whose scores are noted: cumulative log-probabilities of all nodes, level by level."""

    def __init__(self, source: LevelSource):
        self.source = source
        self.scores: list[torch.Tensor] = []  # (n,) each

    def first_level(self, num_levels: int, top_k: int) -> Level:
        return self._noted(self.source.first_level(num_levels, top_k))

    def next_level(self, level: Any, places: list[int], depth: int, top_k: int) -> Level:
        return self._noted(self.source.next_level(level, places, depth, top_k))

    def forget_levels(self) -> None:
        self.source.forget_levels()

    def _noted(self, level: Level) -> Level:
        self.scores.append(level.scores[0].cpu())
        return level


class _FullTree:
    """All nodes of a tree with their scores, in the order they were found: level by level, beam by beam."""

    def __init__(self, tree: DraftTree, scores: list[torch.Tensor], top_k: int, ends: frozenset[int]):
        self.tokens, self.parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
        found = torch.cat(scores)
        if len(found) + 1 != len(self.tokens):
            raise RuntimeError(f"A tree of {len(self.tokens)} nodes was grown from {len(found)} candidates.")
        self.ends = [num_candidates(level, top_k) for level in range(1, len(scores) + 1)]
        # In the precision in which growth ranks them.
        prices = [LEVEL_PRICE * level for level, part in enumerate(scores) for _ in range(len(part))]
        self.log_probs, self.scores = found.double().numpy(), (found - found.new_tensor(prices)).double().numpy()
        starts = [0, *self.ends[:-1]]
        # As growth sees it: the probability of the top-k nodes of a level together, of those that do not end the text.
        probabilities = np.where(np.isin(self.tokens[1:], list(ends)), 0.0, np.exp(self.log_probs))
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
