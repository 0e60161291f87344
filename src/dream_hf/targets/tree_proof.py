"""Proof that trees are verified as trees: at a call's first tree forward every layer is seen to get the tree's mask.

A layer that attends without it (its model makes masks of its own, or another function was registered in transformers'
place) would change the output, and nothing would say so. So what is not proven is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from .hooks import after_own_forwards, before_own_forwards
from .recurrence import attending_modules, state_mixers
from .tree_masks import TreeMask, current_tree, layer_index, tree_masks, visible


class TreeProof:
    """What has been proven in one `generate()` call: of forwards over roots alone, and of those over trees.

    Args:
        model (`PreTrainedModel`): The target.
        decoder (`nn.Module`): Its text decoder.
        must_run (`Sequence[nn.Module]`): Modules with hooks that every tree forward must pass through.
    """

    def __init__(self, model: Any, decoder: nn.Module, must_run: Sequence[nn.Module] = ()):
        self.model, self.decoder, self.must_run = model, decoder, must_run
        self.is_proven = {False: False, True: False}

    def is_missing(self, num_nodes: int) -> bool:
        """Whether a forward over `num_nodes` nodes is to be watched."""
        return not self.is_proven[num_nodes > 1]

    def take(self, num_nodes: int) -> None:
        """Take a proof over that was made in another call."""
        self.is_proven[num_nodes > 1] = True

    @contextmanager
    def watching(self, num_nodes: int) -> Iterator[None]:
        """Watch a forward, if it is the first of its kind in a tree scope.

        Raises:
            RuntimeError: Not all layers used the tree's mask.
        """
        if current_tree() is None or not self.is_missing(num_nodes):
            yield
            return
        mixers = state_mixers(self.decoder)
        witness = _Witness(mixers)
        with ExitStack() as stack:
            stack.enter_context(before_own_forwards(attending_modules(self.decoder, mixers), witness.see_attention))
            stack.enter_context(after_own_forwards(self.must_run, witness.see_run))
            if any(getattr(module, "_compiled_call_impl", None) for module in self.decoder.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled modules ignore new hooks
            yield
        self._check(witness)
        self.take(num_nodes)

    def _check(self, witness: _Witness) -> None:
        fault = witness.fault([module for module in self.must_run if module not in witness.has_run])
        if fault is None:
            return
        text_config = self.model.config.get_text_config(decoder=True)
        raise RuntimeError(
            f"`{type(self.model).__name__}` with `attn_implementation={text_config._attn_implementation!r}` cannot verify "
            f"draft trees: {fault}, so that its output would not be that of plain `generate()`. Load the target with "
            '`attn_implementation="sdpa"` or `"eager"`, take back functions of your own in '
            "transformers' `AttentionMaskInterface`, or generate without `assistant_model`."
        )


def are_tree_masks(masks: Any) -> bool:
    """Whether prepared masks, one or a dict by kind of layer, were all built for the tree that is being verified."""
    given = list(masks.values()) if isinstance(masks, dict) else [masks]
    witness = _Witness()
    return all(witness.is_tree_mask(mask) for mask in given)


class _Witness:
    """Sees one tree forward of this thread."""

    def __init__(self, mixers: Sequence[nn.Module] = ()) -> None:
        self.scope = current_tree()
        self.num_caches = 0
        self.written: set[int] = set()  # cache layers that hold keys
        self.mixers = mixers
        self.has_mask: dict[nn.Module, bool] = {}
        self.layers: dict[nn.Module, set[int]] = {}  # which layers of the cache a module wrote to
        self.has_run: set[nn.Module] = set()
        self.wanted: list[tuple[Any, torch.Tensor | None]] = []  # masks built so far, and None for wrong ones

    def see_attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before an attention, or the layer around it: is a tree's mask among what it gets?"""
        given = [*args, *kwargs.values()]
        caches = [value for value in given if isinstance(value, Cache)]
        if current_tree() is not self.scope or not caches:
            return
        self.written |= {i for i, layer in enumerate(caches[0].layers) if getattr(layer, "keys", None) is not None}
        has_mask = any(self.is_tree_mask(value) for value in given)
        self.has_mask[module] = has_mask and self.has_mask.get(module, True)
        index = kwargs.get("layer_idx", layer_index(module))  # one module may attend in several layers
        if index is not None:
            self.layers.setdefault(module, set()).add(index)

    def see_run(self, module: nn.Module, *_: Any) -> None:
        """After any other module."""
        if current_tree() is self.scope:
            self.has_run.add(module)

    def is_tree_mask(self, value: Any) -> bool:
        """Whether `value` is a mask built for the tree and right, moved or cut perhaps."""
        if not isinstance(value, (torch.Tensor, BlockMask)) or len(value.shape) != 4:
            return False
        self.wanted += [(built.mask, _right_mask(built)) for built in tree_masks()[len(self.wanted) :]]
        right = [(mask, wanted) for mask, wanted in self.wanted if wanted is not None]
        if isinstance(value, BlockMask):
            return any(isinstance(mask, BlockMask) and mask.mask_mod is value.mask_mod for mask, _ in right)
        return any(mask is value for mask, _ in right) or any(_shows(value, wanted) for _, wanted in right)

    def fault(self, not_run: list[nn.Module]) -> str | None:
        """What has not been proven."""
        known = {*self.has_mask, *self.mixers}  # layers with state do without a mask; see `recurrence`
        inner = [m for m in self.has_mask if not any(part in known for part in m.modules() if part is not m)]
        bare = {index for module in inner if not self.has_mask[module] for index in self.layers.get(module, ())}
        bare |= self.written - {index for module in inner for index in self.layers.get(module, ())}
        if not inner:
            return "none of its layers was seen to attend"
        if any(wanted is None for _, wanted in self.wanted):
            return "a mask that was built for a tree hides or shows other tokens than it was asked to"
        if bare:
            return f"layers {sorted(bare)} were not seen to get the tree's mask"
        if not_run:
            return f"{len(not_run)} of its layers did not run the projection that scales their queries"
        return None


def _right_mask(built: TreeMask) -> torch.Tensor | None:
    """What a mask shows, (B, 1, N, K), if that is what it was asked to show."""
    wanted: Any = sdpa_mask(**built.arguments)
    shown = built.mask
    if isinstance(shown, BlockMask):
        batch, heads, num_nodes, num_keys = wanted.shape
        shown = create_mask(shown.mask_mod, batch, heads, num_nodes, num_keys, device=wanted.device)
    return wanted if isinstance(shown, torch.Tensor) and _shows(shown, wanted) else None


def _shows(mask: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether a mask shows what `wanted` (B, 1, N, K) shows, of the keys that it has."""
    if mask.ndim != 4 or mask.shape[::2] != wanted.shape[::2] or mask.shape[3] > wanted.shape[3]:
        return False
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        return False
    return bool((visible(mask) == wanted[..., : mask.shape[3]].to(mask.device)).all())
