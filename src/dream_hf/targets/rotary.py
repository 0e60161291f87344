"""Rotary embeddings whose angles depend on the length of the text, in trees.

With `rope_type="dynamic"` or `"longrope"` the largest position in a forward decides the angles of all its tokens. In plain
decoding that is the newest token of the longest row; in a tree it is some drafted one. So every node gets the angles of the
forward it would be in if the text were written token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .hooks import after_own_forwards
from .tree_masks import current_tree

REMEMBERED = ("inv_freq", "max_seq_len_cached", "attention_scaling")  # what a module keeps of the longest text so far


def is_length_dependent(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding whose angles depend on the largest position it is asked about."""
    return any("dynamic" in kind or kind == "longrope" for kind in _rope_types(module))


@contextmanager
def plain_angles(modules: list[nn.Module]) -> Iterator[None]:
    """Give the nodes of trees the angles they would have in plain decoding while in the block."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(after_own_forwards([module], _PlainAngles(module)))
        yield


class _PlainAngles:
    """A forward hook that asks a rotary module anew, one step of plain decoding after the other."""

    def __init__(self, module: nn.Module):
        self.memory = _memory(module)
        self.lead: int | None = None  # of the largest position before the slot: less than 0 where all rows are padded

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any], angles: Any) -> Any:
        scope = current_tree()
        arguments = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
        positions = arguments["position_ids"]  # (B, N), or several axes of them, (A, B, N)
        if scope is None or positions.shape[-1] != scope.depths.shape[1]:
            return angles
        scope = scope.to(positions.device)
        slots = scope.lengths[:, None] + scope.depths
        self._note_lead(int((positions - slots).max()))
        _restore(module, self.memory)
        for step, slot in enumerate(slots.unique().tolist()):  # rising, as the text grows
            is_here = slots == slot
            asked = torch.where(is_here, positions, slot + self.lead)
            angles = _merged(is_here[..., None], module.forward(**{**arguments, "position_ids": asked}), angles)
            if step == 0:  # what has been written for sure
                self.memory = _memory(module)
        _restore(module, self.memory)
        return angles

    def _note_lead(self, lead: int) -> None:
        """The lead is the same in every forward, but for rows that have ended at the last position of all."""
        self.lead = lead if self.lead is None else max(lead, self.lead)


def _merged(is_here: torch.Tensor, new: Any, old: Any) -> Any:
    """Angles `new` where `is_here` (B, N, 1), else `old`: tensors (..., B, N, D), or tuples of them."""
    if isinstance(new, tuple):
        return tuple(_merged(is_here, *pair) for pair in zip(new, old, strict=True))
    return torch.where(is_here, new, old)


def _rope_types(module: Any) -> list[str]:
    types = vars(module).get("rope_type")  # quicker than asking a module for what it may lack
    types = types.values() if isinstance(types, dict) else [types]  # by layer type, or one for all
    return [kind for kind in types if isinstance(kind, str)]


def _memory(module: nn.Module) -> dict[str, Any]:
    """What a rotary module keeps of the longest text it has seen: nothing, unless it is a dynamic one."""
    if not any("dynamic" in kind for kind in _rope_types(module)):
        return {}
    values = {**vars(module), **dict(module.named_buffers(recurse=False))}
    return {name: value for name, value in values.items() if name.endswith(REMEMBERED)}


def _restore(module: nn.Module, memory: dict[str, Any]) -> None:
    for name, value in memory.items():
        setattr(module, name, value)
