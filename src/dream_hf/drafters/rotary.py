"""Rotary angles at one-dimensional positions and at those of time, height and width (Qwen2-VL's and Qwen3-VL's layouts)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import Angles


def planes_of_channels(section: Sequence[int], is_interleaved: bool) -> Tensor:
    """Which of three planes of positions each of half a head's channels follows: 0 time, 1 height, 2 width, (head_dim / 2,).

    Qwen2-VL has blocks of `section` channels. Interleaved, channels follow time, height, width in turn until height and
    width have had theirs; what is left follows time (Qwen3-VL).
    """
    if not is_interleaved:
        return torch.arange(3).repeat_interleave(torch.tensor(section))
    channels = torch.arange(sum(section))
    planes = torch.zeros_like(channels)
    for plane in (1, 2):
        planes[(channels % 3 == plane) & (channels < 3 * section[plane])] = plane
    return planes


def angles_at(
    positions: Tensor,  # (B, T) or (3, B, T)
    frequencies: Tensor,  # (head_dim / 2,)
    scaling: float,
    planes: Tensor | None,  # (head_dim / 2,)
    like: Tensor,
) -> Angles:
    """Cosines and signed sines, (B, 1, T, head_dim) each, in the dtype and on the device of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies, positions = frequencies.to(like.device, dtype), positions.to(like.device, dtype)
    if positions.ndim == 3:
        planes = torch.zeros(len(frequencies), dtype=torch.long, device=like.device) if planes is None else planes
        positions = positions[planes.to(like.device)].movedim(0, -1)  # (B, T, head_dim / 2)
    else:
        positions = positions[..., None]
    angles = (positions * frequencies)[:, None]
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat([cos, cos], dim=-1).to(like.dtype), torch.cat([-sin, sin], dim=-1).to(like.dtype)
