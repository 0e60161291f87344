"""Trees out of lattices: marginals of all depths at once, each independent of the others (DFlash, arXiv 2602.06036).

A node is a path of ranks, one for each depth down to its own, and its log-probability the sum of theirs. B rows, D depths, k
tokens of each depth, N drafted nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from ..decoding.settings import DraftSettings
from ..decoding.tree import DraftTree
from ..runtime import crossings
from .growth import kept_tree


@dataclass
class _Paths:
    """Paths of all depths so far, (B, n) each depth: tokens, log-probabilities, and places of parents one depth above."""

    tokens: list[torch.Tensor] = field(default_factory=list)
    log_probs: list[torch.Tensor] = field(default_factory=list)
    parents: list[torch.Tensor] = field(default_factory=list)

    def parent_of_each(self) -> torch.Tensor:
        """Parent of each path among all of them, -1 for the root: (B, C)."""
        starts, above = [], 0
        for depth in self.tokens:
            starts.append(above)
            above += depth.shape[1]
        parts = [self.parents[0]] + [parents + start for parents, start in zip(self.parents[1:], starts, strict=False)]
        return torch.cat(parts, dim=1)


def tree_of_lattice(
    root_tokens: torch.Tensor,
    tokens: torch.Tensor,
    log_probs: torch.Tensor,
    settings: DraftSettings,
    end_ids: frozenset[int] = frozenset(),
) -> DraftTree:
    """The tree of the `tree_size` most probable paths through a lattice.

    They are prefix closed: no path is more probable than its beginning, and of equally probable ones the shorter comes first,
    then the one whose parent does, then the one whose token comes first in the lattice. Rows that have fewer are filled up with
    copies of the root below it.

    Args:
        root_tokens (`torch.LongTensor` of shape `(B, 1)`): The last token of each row.
        tokens (`torch.LongTensor` of shape `(B, D, k)`): Tokens of every depth, no two of a depth the same.
        log_probs (`torch.Tensor` of shape `(B, D, k)`): Their log-probabilities.
        settings (`DraftSettings`): Size and thresholds of the tree. A depth is the last of a row where the `tree_top_k` best of
            its nodes are reached with less than `tree_min_level_probability` together.
        end_ids (`frozenset[int]`): Tokens that end a text; below them nothing is drafted.

    Returns:
        `DraftTree`: At most `tree_size` nodes and the root.
    """
    num_levels = tokens.shape[1]
    if num_levels < 1:
        return DraftTree.chain(root_tokens)
    found = _best_paths(tokens, log_probs, settings, end_ids)
    scores = torch.cat(found.log_probs, dim=1)
    if settings.tree_min_node_probability:
        is_rare = scores < math.log(settings.tree_min_node_probability)
        scores = scores.masked_fill(is_rare, -math.inf)
    num_nodes = min(settings.tree_size, scores.shape[1])
    if not crossings.reads_wait(scores.device):
        num_nodes = min(num_nodes, max(int(scores.isfinite().sum(-1).max()), 1))
    # In the order in which paths were found parents come first, among equals too.
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, :num_nodes].sort(dim=-1).values
    is_path = scores.isfinite()
    of_nodes = torch.where(is_path, torch.cat(found.tokens, dim=1), root_tokens)
    parents = found.parent_of_each().masked_fill(~is_path, -1)
    return kept_tree(root_tokens, of_nodes, parents, scores, chosen, num_levels)


def _best_paths(
    tokens: torch.Tensor, log_probs: torch.Tensor, settings: DraftSettings, end_ids: frozenset[int]
) -> _Paths:
    """Of each depth the `tree_size` best paths, best first: whatever is among the best of all is one of these."""
    found, top_k = _Paths(), tokens.shape[2]
    ends = _ends(end_ids, tokens.device)
    above = log_probs.new_zeros(tokens.shape[0], 1)
    for depth in range(tokens.shape[1]):
        scores = (above[..., None] + log_probs[:, depth, None]).flatten(1)  # (B, n * k)
        scores, places = scores.sort(dim=-1, descending=True, stable=True)
        scores, places = scores[:, : settings.tree_size], places[:, : settings.tree_size]
        of_level = tokens[:, depth].gather(1, places % top_k)
        found.tokens.append(of_level)
        found.log_probs.append(scores)
        found.parents.append(places // top_k if depth else torch.full_like(places, -1))
        above = scores.masked_fill(torch.isin(of_level, ends), -math.inf)
        if settings.tree_min_level_probability:
            reached = above[:, : settings.tree_top_k].exp().sum(-1, keepdim=True)
            above = above.masked_fill(reached < settings.tree_min_level_probability, -math.inf)
    return found


@lru_cache(maxsize=64)
def _ends(end_ids: frozenset[int], device: torch.device) -> torch.Tensor:
    """The same as a tensor (n,), which crosses over to the device once."""
    return torch.tensor(sorted(end_ids), dtype=torch.long, device=device)
