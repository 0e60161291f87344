"""Linear layers that read the same input as one: their weights lie behind one another in memory, so that one view shows all.

Nothing is copied twice: a layer's weight becomes a part of what is shown, with the numbers and the name it had.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_lock = threading.Lock()


class Stack(NamedTuple):
    """Layers with n outputs in all as one."""

    weight: Tensor  # (n, in)
    bias: Tensor | None = None  # (n,)


def stacked(layers: Sequence[Any]) -> Stack | None:
    """Layers as one; None where their weights cannot be laid out so.

    Args:
        layers (`Sequence[nn.Module]`): Layers of one input, in the order of their outputs.
    """
    if any(type(layer) is not nn.Linear for layer in layers) or len({layer.bias is None for layer in layers}) > 1:
        return None
    kinds = zip(*((layer.weight, layer.bias) for layer in layers), strict=True)
    with _lock:
        rows = [_in_a_row(parts) for parts in kinds if parts[0] is not None]
    whole = [row for row in rows if row is not None]
    return Stack(*whole) if len(whole) == len(rows) else None


def _in_a_row(parts: Sequence[Tensor]) -> Tensor | None:
    """One tensor that shows all of the parts, which are moved to lie behind one another if they do not."""
    first = parts[0]
    if any(not _is_ordinary(part, like=first) for part in parts):
        return None
    if not _follow_each_other(parts):
        with torch.inference_mode(False), torch.no_grad():
            moved = torch.cat([part.detach() for part in parts])
            for part, place in zip(parts, moved.split([len(part) for part in parts]), strict=True):
                part.data = place
    whole = first.detach().as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    if whole.device.type != "cpu":
        # Graphs of device calls may rely on where weights lie.
        torch._dynamo.mark_static_address(whole, guard=False)
    return whole


def _is_ordinary(part: Tensor, like: Tensor) -> bool:
    """Whether a tensor is numbers in memory that can be moved, of the same kind as another one."""
    is_plain = type(part.data) is Tensor and not part.is_inference() and not part.is_meta
    return is_plain and (part.dtype, part.device) == (like.dtype, like.device)


def _follow_each_other(parts: Sequence[Tensor]) -> bool:
    storage, end = parts[0].untyped_storage().data_ptr(), parts[0].storage_offset()
    for part in parts:
        if not part.is_contiguous() or part.untyped_storage().data_ptr() != storage or part.storage_offset() != end:
            return False
        end += part.numel()
    return True
