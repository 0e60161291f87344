"""A tree in one vocabulary, respelt in another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...decoding.settings import DraftSettings
from ...decoding.tree import DraftTree
from ..best_first import Nodes
from .bridge import BROKEN, Speller, Written


@dataclass(frozen=True)
class Ends:
    """Tokens that end a text: the drafter's, and the one that the target writes."""

    drafter: frozenset[int]
    target: int | None


def respell(
    tree: DraftTree,
    row: int,
    own: Speller,
    own_ids: Sequence[int],
    written: Written,
    ends: Ends,
    settings: DraftSettings,
) -> Nodes:
    """The target's best nodes for what a row of a drafter's tree spells.

    A node is as probable as the drafted token that its last character comes from.

    Args:
        tree (`DraftTree`): The drafter's, with `log_probs`.
        row (`int`): Which row.
        own (`Speller`): The drafter's.
        own_ids (`Sequence[int]`): The drafter's text, down to the root.
        written (`Written`): The target's text.
        ends (`Ends`): What ends texts.
        settings (`DraftSettings`): Size and threshold.
    """
    found: dict[tuple[int, ...], float] = {}
    for path, scores in _leaves(tree, row, own, ends):
        spelt, reached = _spelling(own, own_ids, path, scores)
        ids, num_characters = written.paths(spelt)
        for count, end in enumerate(num_characters, 1):
            score = next((score for place, score in reached if place >= end), scores[-1])
            key = tuple(ids[:count])
            found[key] = max(found.get(key, -math.inf), score)
        is_ended = path and len(path) < len(scores) and num_characters and num_characters[-1] == len(spelt)
        if ends.target is not None and (is_ended or (not path and scores)):
            key = (*ids, ends.target)
            found[key] = max(found.get(key, -math.inf), scores[-1])
    return _best(found, settings)


def _leaves(tree: DraftTree, row: int, own: Speller, ends: Ends) -> list[tuple[list[int], list[float]]]:
    """For each leaf the text tokens down to it and the scores; one score more where the text ends there."""
    assert tree.log_probs is not None  # of a tree that was grown
    tokens, parents, scores = tree.tokens[row].tolist(), tree.parents[row].tolist(), tree.log_probs[row].tolist()
    inner = {parents[node] for node in range(1, len(tokens))}
    leaves = []
    for leaf in range(1, len(tokens)):
        if leaf in inner:
            continue
        nodes = []
        node = leaf
        while node:
            nodes.append(node)
            node = parents[node]
        path: list[int] = []
        kept: list[float] = []
        for node in reversed(nodes):
            if tokens[node] in ends.drafter:
                kept.append(scores[node])
                break
            if tokens[node] in own.special_ids:
                break
            path.append(tokens[node])
            kept.append(scores[node])
        leaves.append((path, kept))
    return leaves


def _spelling(
    own: Speller, own_ids: Sequence[int], path: Sequence[int], scores: Sequence[float]
) -> tuple[str, list[tuple[int, float]]]:
    """What a path spells, and how probable it is to get to which of its characters."""
    spelt, reached = "", []
    for count, score in enumerate(scores[: len(path)], 1):
        text = (own.spell(own_ids, path[:count]) or "").rstrip(BROKEN)
        if text.startswith(spelt):
            spelt = text
        elif not spelt.startswith(text):  # a broken character may break the whole ones before it
            break
        reached.append((len(spelt), score))
    return spelt, reached


def _best(found: dict[tuple[int, ...], float], settings: DraftSettings) -> Nodes:
    """The `tree_size` most probable of these paths, parents first."""
    least = math.log(settings.tree_min_node_probability) if settings.tree_min_node_probability else -math.inf
    numbers: dict[tuple[int, ...], int] = {(): 0}
    nodes = Nodes()
    for path, score in sorted(found.items(), key=lambda pair: (-pair[1], len(pair[0]))):
        if len(nodes.tokens) == settings.tree_size or score < least:
            break
        if path[:-1] in numbers:
            numbers[path] = nodes.add(path[-1], numbers[path[:-1]], len(path), math.exp(score))
    return nodes
