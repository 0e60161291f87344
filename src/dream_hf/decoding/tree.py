"""Draft trees as tensors: tokens and parents in, depths and ancestors out (method of EAGLE-2, arXiv 2406.16858)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DraftTree:
    """One tree of N nodes for each of B rows. Node 0 is the root, the last token of a row's text; parents come first.

    Args:
        tokens (`torch.LongTensor` of shape `(B, N)`): Token of every node.
        parents (`torch.LongTensor` of shape `(B, N)`): Index of every node's parent; the root is its own.
        depths (`torch.LongTensor` of shape `(B, N)`): Edges between a node and the root.
        ancestors (`torch.BoolTensor` of shape `(B, N, N)`): `ancestors[b, i, j]` where j lies on the path from the
            root to i, both ends included.
        max_depth (`int`): Upper bound of `depths`.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    max_depth: int

    @classmethod
    def from_parents(cls, tokens: torch.Tensor, parents: torch.Tensor, max_depth: int) -> DraftTree:
        """Build a tree from `tokens` and `parents`, both (B, N)."""
        num_nodes = tokens.shape[-1]
        reach = torch.eye(num_nodes, dtype=torch.bool, device=tokens.device).expand(*tokens.shape, -1)
        above, distance = parents, 1  # whom each node reaches in that many edges, or the root
        while distance <= max_depth:
            reach = reach | reach.gather(1, above[..., None].expand_as(reach))
            above, distance = above.gather(1, above), 2 * distance
        return cls(tokens, parents, reach.sum(-1) - 1, reach, max_depth)

    @classmethod
    def chain(cls, tokens: torch.Tensor) -> DraftTree:
        """Text that does not branch, as a tree: `tokens` (B, N)."""
        batch, num_nodes = tokens.shape
        depths = torch.arange(num_nodes, device=tokens.device)
        ancestors = depths[:, None] >= depths
        return cls(
            tokens,
            (depths - 1).clamp(min=0).expand(batch, -1),
            depths.expand(batch, -1),
            ancestors.expand(batch, -1, -1),
            num_nodes - 1,
        )

    def to(self, device: torch.device) -> DraftTree:
        """The same tree on another device."""
        tokens, parents = self.tokens.to(device), self.parents.to(device)
        return DraftTree(tokens, parents, self.depths.to(device), self.ancestors.to(device), self.max_depth)

    @property
    def num_nodes(self) -> int:
        """Nodes per row, the root included."""
        return self.tokens.shape[-1]

    def children(self) -> list[dict[tuple[int, int], int]]:
        """For each row, the node that a token leads to from a node: (node, token) -> child. One transfer to the host."""
        tokens, parents = torch.stack([self.tokens, self.parents]).tolist()
        found: list[dict[tuple[int, int], int]] = []
        for row in zip(parents, tokens, strict=True):
            edges: dict[tuple[int, int], int] = {}
            for node, edge in enumerate(zip(*row, strict=True)):
                if node:  # the root is nobody's child; of siblings with one token the first counts
                    edges.setdefault(edge, node)
            found.append(edges)
        return found
