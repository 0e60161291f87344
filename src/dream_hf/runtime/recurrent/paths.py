"""How the nodes of a tree stand above each other, as layers with state read it. B rows, N nodes, parents first."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class NodePaths:
    """The paths from a tree's root to its nodes.

    Args:
        parents (`torch.LongTensor` of shape `(B, N)`): Every node's parent; the root is its own.
        depths (`torch.LongTensor` of shape `(B, N)`): Edges between a node and the root.
        ancestors (`torch.BoolTensor` of shape `(B, N, N)`): `ancestors[b, i, j]` where j is on the path to i, i included.
    """

    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    _windows: dict[int, torch.Tensor] = field(default_factory=dict)
    _elsewhere: dict[torch.device, NodePaths] = field(default_factory=dict)

    def windows(self, size: int) -> torch.Tensor:
        """For every node its last `size` inputs, (B, N, size), oldest first: itself, its ancestors, and the text before.

        They are places in a sequence of the text's last `size` inputs and then the nodes.
        """
        if size not in self._windows:
            node = torch.arange(self.parents.shape[1], device=self.parents.device).expand_as(self.parents)
            places = []
            for distance in range(size):
                places.append(torch.where(distance <= self.depths, size + node, size + self.depths - distance))
                node = self.parents.gather(1, node)
            self._windows[size] = torch.stack(places[::-1], dim=-1)
        return self._windows[size]

    def on(self, device: torch.device) -> NodePaths:
        """The same on another device; found once."""
        if device == self.parents.device:
            return self
        if device not in self._elsewhere:
            there = NodePaths(self.parents.to(device), self.depths.to(device), self.ancestors.to(device))
            self._elsewhere[device] = there
        return self._elsewhere[device]
