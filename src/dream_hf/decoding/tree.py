"""Draft trees as tensors: tokens and parents in, depths and ancestors out (method of EAGLE-2, arXiv 2406.16858)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..runtime.alignment import left_aligned


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
        log_probs (`torch.Tensor` of shape `(B, N)`, *optional*): What the drafter thinks of the path to each node, on any
            device; only whoever combines drafters looks at it, right after the draft.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    max_depth: int
    log_probs: torch.Tensor | None = None

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

    @classmethod
    def from_chains(cls, root_tokens: torch.Tensor, chains: Sequence[Sequence[int]]) -> DraftTree:
        """One chain below each root (B, 1). Rows with shorter chains are filled up with copies of the root below it."""
        longest = max(len(chain) for chain in chains)
        roots = root_tokens[:, 0].tolist()
        tokens = [[root, *chain] + [root] * (longest - len(chain)) for root, chain in zip(roots, chains, strict=True)]
        parents = [[0, *range(len(chain))] + [0] * (longest - len(chain)) for chain in chains]
        device = root_tokens.device
        return cls.from_parents(torch.tensor(tokens, device=device), torch.tensor(parents, device=device), longest)

    def cut(self, max_depth: int) -> DraftTree:
        """The tree without its nodes below a depth; rows that lose more are filled up with copies of the root below it."""
        if self.max_depth <= max_depth:
            return self
        keep = self.depths <= max_depth
        order, counts = left_aligned(keep)
        order = order[:, : int(counts.max())]
        is_filler = torch.arange(order.shape[1], device=order.device) >= counts[:, None]
        places = keep.long().cumsum(-1) - 1  # where each kept node goes
        tokens = torch.where(is_filler, self.tokens[:, :1], self.tokens.gather(1, order))
        parents = places.gather(1, self.parents.gather(1, order)).masked_fill(is_filler, 0)
        return DraftTree.from_parents(tokens, parents, max_depth)

    def without(self, token_ids: torch.Tensor | None) -> DraftTree:
        """The tree with the root's token in place of `token_ids` (n,), which no node may have."""
        if token_ids is None:
            return self
        unwanted = torch.isin(self.tokens, token_ids.to(self.tokens.device))
        return replace(self, tokens=torch.where(unwanted, self.tokens[:, :1], self.tokens))

    def likeliest_path(self, max_depth: int) -> torch.Tensor:
        """Drafted tokens (1, L) from the root of a single row to the first of its deepest nodes, up to a depth."""
        tree = self.cut(max_depth)
        on_path = tree.ancestors[0, tree.depths[0].argmax()]
        on_path = on_path & (tree.depths[0] > 0)
        return tree.tokens[:, on_path]

    def padded(self, num_nodes: int) -> DraftTree:
        """The tree with copies of the root behind its nodes, `num_nodes` in all, that no node sees and that see no node."""
        missing = num_nodes - self.num_nodes
        if not missing:
            return self

        def pad(values: torch.Tensor) -> torch.Tensor:  # (B, N)
            return torch.cat([values, values[:, :1].expand(-1, missing)], dim=1)

        ancestors = torch.nn.functional.pad(self.ancestors, (0, missing, 0, missing))
        ancestors[:, self.num_nodes :, self.num_nodes :] = torch.eye(
            missing, dtype=torch.bool, device=ancestors.device
        )
        return DraftTree(pad(self.tokens), pad(self.parents), pad(self.depths), ancestors, self.max_depth)

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
