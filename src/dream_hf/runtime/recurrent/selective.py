"""Mamba's first recurrence (arXiv 2312.00752) over a tree, level by level.

Every channel of the state decays by itself, so that no product of matrices gives what all nodes read. B rows, N nodes, d
channels, S size of the state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SelectiveSteps:
    """What every node does to its parent's state: e^(dt A) S + dt x B^T.

    Args:
        rates (`torch.Tensor` of shape `(d, S)`): A.
        steps (`torch.Tensor` of shape `(B, N, d)`): dt.
        inputs (`torch.Tensor` of shape `(B, N, d)`): dt x.
        writes (`torch.Tensor` of shape `(B, N, S)`): B.
    """

    rates: torch.Tensor
    steps: torch.Tensor
    inputs: torch.Tensor
    writes: torch.Tensor

    def after(self, state: torch.Tensor, path: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The state (B, d, S) behind the first `counts` (B,) nodes of `path` (B, P), from the one before the tree."""
        for place in range(path.shape[1]):
            following = self.step(state, path[:, place])
            state = torch.where((place < counts)[:, None, None], following, state)
        return state

    def step(self, states: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        """From the states (B, d, S) of their parents those of `nodes` (B,)."""
        steps, inputs, writes = (
            part.gather(1, nodes[:, None, None].expand(-1, 1, part.shape[2])).transpose(1, 2)
            for part in (self.steps, self.inputs, self.writes)
        )
        return states * (steps * self.rates).exp() + inputs * writes.mT


def over_tree(steps: SelectiveSteps, reads: torch.Tensor, state: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    """What every node reads, (B, N, d), with `reads` (B, N, S), below `state` (B, d, S); `parents` (B, N) come first."""
    rows = torch.arange(len(parents), device=parents.device)
    states = state.new_empty(*parents.shape, *state.shape[1:])
    for node in range(parents.shape[1]):
        above = states[rows, parents[:, node]] if node else state
        states[:, node] = steps.step(above, parents.new_full((len(parents),), node))
    return torch.einsum("bnds,bns->bnd", states, reads.to(states.dtype))
