"""An MTP head at work in one `generate()`."""

from __future__ import annotations

import torch

from ..paired_session import PairedSession


class MTPSession(PairedSession):
    """A [`PairedSession`] of an [`MTPDrafter`], whose rows stand where its `row_positions` says."""

    def _stand(self, positions: torch.Tensor, order: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        if self.drafter.wiring["row_positions"] == "feature":
            return super()._stand(positions, order, behind)
        highest = positions if positions.ndim == 2 else positions.amax(0)
        following = (highest.amax(-1, keepdim=True) + 1).expand(*positions.shape[:-1], 1)  # of the first new token
        return torch.cat([positions[..., 1:], following], dim=-1).gather(-1, behind.expand_as(positions))
