"""An EAGLE drafter at work in one `generate()`: what it reads of pictures, in each of the ways that there are."""

from __future__ import annotations

import torch

from ...runtime.alignment import left_aligned
from ..paired_session import PairedSession
from .pictures import Pictures, compressed


class EagleSession(PairedSession):
    """A [`PairedSession`] of an [`EagleDrafter`], which reads pictures as its `image_rows` says."""

    def _read_with_pictures(
        self,
        embeds: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        counts: torch.Tensor,
        is_image: torch.Tensor,
    ) -> None:
        drafter, state = self.drafter, self.state
        if drafter.config.image_rows != "compressed":
            pictures = Pictures(is_image.to(drafter.device)) if drafter.config.image_rows == "direct" else Pictures()
            state.read(embeds, features, positions, counts.tolist(), pictures)
            return
        embeds, is_image = embeds.to(drafter.device, drafter.dtype), is_image.to(drafter.device)
        before = (
            embeds.new_zeros(len(embeds), 1, embeds.shape[-1]) if state.pictures is None else state.pictures.context
        )
        rows = compressed(drafter.image_adaptor, embeds, is_image, before)
        # What is left moves together; every row of text keeps its position.
        places = torch.arange(embeds.shape[1], device=drafter.device)
        order, num_kept = left_aligned(rows.is_kept & (places < counts.to(drafter.device)[:, None]))
        order = order[:, : int(num_kept.max())]
        wide = order[..., None].expand(-1, -1, embeds.shape[-1])
        pictures = Pictures(is_image.gather(1, order), rows.context.gather(1, wide))
        state.pictures = Pictures(context=rows.context[:, -1:])  # of text to come
        features, positions = features.gather(1, wide.to(features.device)), positions.to(order.device).gather(1, order)
        state.read(rows.embeds.gather(1, wide), features, positions, num_kept.tolist(), pictures)
