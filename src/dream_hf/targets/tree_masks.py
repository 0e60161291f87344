"""Tree masks for any target: each node of a tree sees the verified text and its own ancestors.

Inside these scopes the look-up of the functions that build masks is wrapped, and where an attention implementation takes
no such masks, so is the name of the implementation that the decoder's configurations give. A wrapper does nothing unless a
context variable of the calling thread says so, and no configuration is ever written to: other threads, and forwards that
are not over a tree, see what they saw before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import masking_utils
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from ..runtime.phases import MASK, phase
from .attention_statistics import ArgumentRecord
from .grouped_attention import grouping, groups_available
from .lookups import ScopedWrap, wrapped_lookup


@dataclass(frozen=True)
class TreeScope:
    """A tree, of whose N nodes the last Q are run over and the others have been: all of them where a tree is verified.

    `lengths` (B,) are the verified slots, `depths` (B, N) those of the nodes, and `ancestors` (B, Q, N) those of the last Q.
    """

    lengths: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor

    @property
    def num_queries(self) -> int:
        """Nodes that are run over."""
        return self.ancestors.shape[1]

    def to(self, device: torch.device | str) -> TreeScope:
        """The same on another device."""
        return TreeScope(self.lengths.to(device), self.depths.to(device), self.ancestors.to(device))


@dataclass(frozen=True)
class TreeMask:
    """A mask built for a tree, in the form its attention takes, and the arguments it was built from."""

    mask: Any
    arguments: dict[str, Any]


_tree: ContextVar[TreeScope | None] = ContextVar("dream_hf_tree", default=None)
_tree_masks: ContextVar[list[TreeMask]] = ContextVar("dream_hf_tree_masks")
# By id of a configuration: the implementation it names while a tree is verified.
_implementations: ContextVar[dict[int, str] | None] = ContextVar("dream_hf_implementations", default=None)


@contextmanager
def tree_masks_available(decoder: nn.Module, text_config: Any, noted: ArgumentRecord | None = None) -> Iterator[None]:
    """Let [`tree_scope`] work on a text decoder.

    Where its attention implementation takes no such masks (FlashAttention), its tree forwards run as `"sdpa"`; or as
    `"eager"`, if not all that the layers pass on (`noted`) is known to reach sdpa. The configurations stay as they are.

    Raises:
        ValueError: The implementation takes no tree masks and cannot be exchanged.
    """
    name = tree_implementation(decoder, text_config, noted)
    with ExitStack() as stack:
        stack.enter_context(_mask_wrap.installed())
        stack.enter_context(groups_available())
        if name != text_config._attn_implementation:
            stack.enter_context(_name_wrap.installed())
            token = _implementations.set(dict.fromkeys(map(id, _text_configs(decoder, text_config)), name))
            stack.callback(_implementations.reset, token)
        yield


@contextmanager
def tree_scope(scope: TreeScope) -> Iterator[None]:
    """Forwards of Q new tokens in the block treat them as the last nodes of a tree."""
    token, masks = _tree.set(scope), _tree_masks.set([])
    try:
        with grouping():
            yield
    finally:
        _tree.reset(token)
        _tree_masks.reset(masks)


def tree_implementation(decoder: nn.Module, text_config: Any, noted: ArgumentRecord | None = None) -> str:
    """The attention implementation that a decoder's tree forwards run with; see [`tree_masks_available`]."""
    name = text_config._attn_implementation
    if takes_tree_masks(name):
        return name
    check_exchangeable(decoder, text_config)
    is_sdpa_enough = getattr(decoder, "_supports_sdpa", False) and noted is not None and noted.suits_sdpa
    for other in ("sdpa", "eager") if is_sdpa_enough else ("eager",):
        if takes_tree_masks(other):
            return other
    raise ValueError(
        f"`attn_implementation={name!r}` takes no mask that says which token sees which, and the functions registered in "
        "`AttentionMaskInterface` as 'sdpa' and 'eager' ignore what they are asked for; take your override back, or "
        "generate without `assistant_model`."
    )


def check_exchangeable(decoder: Any, text_config: Any) -> None:
    """Raise a ValueError where a decoder would need another attention implementation for trees and cannot change it."""
    name = text_config._attn_implementation
    can_change = getattr(decoder, "_can_set_attn_implementation", lambda: False)
    if not takes_tree_masks(name) and not can_change():
        raise ValueError(
            f"`attn_implementation={name!r}` takes no mask that says which token sees which, and "
            f"`{type(decoder).__name__}` cannot change it after loading; load the target with "
            '`attn_implementation="eager"`, or generate without `assistant_model`.'
        )


def takes_tree_masks(name: str) -> bool:
    """Whether the masks of an attention implementation can hide any token from any other, found by building one."""
    if name not in AttentionMaskInterface._global_mapping:  # transformers builds no mask then
        return False
    build_mask = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name]
    if build_mask is masking_utils.flex_attention_mask:  # takes any, and a while
        return True
    cpu = torch.device("cpu")
    arguments: dict[str, Any] = {"batch_size": 1, "q_length": 2, "kv_length": 3, "q_offset": 1, "kv_offset": 0}
    arguments |= {"mask_function": _odd_mask_function, "allow_is_causal_skip": False, "attention_mask": None}
    mask = build_mask(**arguments, use_vmap=False, dtype=torch.float32, device=cpu, config=None)
    wanted = torch.tensor([[True, True, False], [True, False, True]], device=cpu)
    return isinstance(mask, torch.Tensor) and mask.ndim == 4 and torch.equal(visible(mask)[0, 0], wanted)


def visible(mask: torch.Tensor) -> torch.Tensor:
    """A boolean or additive mask as a boolean one, of the same shape."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _odd_mask_function(batch_idx, head_idx, q_idx, kv_idx):
    """Causal, and the second query does not see the second token."""
    return (kv_idx <= q_idx) & ((q_idx < 2) | (kv_idx != 1))


def text_attentions(decoder: nn.Module) -> list[nn.Module]:
    """The modules of a decoder that know which layer of the cache is theirs."""
    return [module for module in decoder.modules() if layer_index(module) is not None]


def layer_index(module: Any) -> int | None:
    """The cache layer that a module (an attention, or the layer around it) writes to."""
    own = vars(module)
    index = own.get("layer_idx", own.get("layer_id"))
    return index if isinstance(index, int) else None


def _text_configs(decoder: Any, text_config: Any) -> list[PreTrainedConfig]:
    """The configurations that the parts of a decoder read, which need not be one object."""
    configs = [text_config, *(getattr(module, "config", None) for module in (decoder, *text_attentions(decoder)))]
    return [config for config in configs if isinstance(config, PreTrainedConfig)]


def current_tree() -> TreeScope | None:
    """The tree this thread is verifying, if it is."""
    return _tree.get()


def tree_masks() -> list[TreeMask]:
    """The masks built so far for the tree this thread is verifying."""
    return _tree_masks.get([])


def tree_mask_function(scope: TreeScope, mask_function: Callable, q_offset: int) -> Callable:
    """The model's own `mask_function` at logical positions, and only on verified slots and ancestors.

    Slot s of row b holds the verified token s if s < `lengths[b]`, else node s - `lengths[b]`. A node's logical position
    is `lengths[b]` plus its depth, so that sliding windows and chunks cut where they would in plain decoding.
    """
    num_nodes = scope.depths.shape[1]
    num_before = num_nodes - scope.num_queries

    def inner(batch_idx, head_idx, q_idx, kv_idx):
        length = scope.lengths[batch_idx]
        query, key = q_idx - q_offset, kv_idx - length
        key_node = key.clamp(0, num_nodes - 1)
        is_verified = key < 0
        is_ancestor = (key < num_nodes) & scope.ancestors[batch_idx, query, key_node]
        key_position = torch.where(is_verified, kv_idx, length + scope.depths[batch_idx, key_node])
        query_position = length + scope.depths[batch_idx, num_before + query]
        return (is_verified | is_ancestor) & mask_function(batch_idx, head_idx, query_position, key_position)

    return inner


def _wrap_mask(name: str, build_mask: Callable) -> Callable:
    scope = _tree.get()
    if scope is None:
        return build_mask

    @wraps(build_mask)
    def build_tree_mask(*args, **kwargs):
        if kwargs.get("q_length") != scope.num_queries:
            return build_mask(*args, **kwargs)
        kwargs["mask_function"] = tree_mask_function(
            scope.to(kwargs.get("device", scope.depths.device)),
            kwargs.get("mask_function", causal_mask_function),
            kwargs.get("q_offset", 0),
        )
        kwargs["allow_is_causal_skip"] = False
        with nullcontext() if torch.compiler.is_compiling() else phase(MASK):
            mask = build_mask(*args, **kwargs)
        _tree_masks.get().append(TreeMask(mask, kwargs))
        return mask

    return build_tree_mask


def _wrap_name(own: property) -> property:
    """The property `_attn_implementation` of configurations, exchanged for those in `_implementations` in a tree scope."""

    def name_of(config: Any) -> str | None:
        if torch.compiler.is_compiling() or _tree.get() is None:  # a context variable cannot be compiled
            return own.fget(config)  # type: ignore[misc]
        return (_implementations.get() or {}).get(id(config)) or own.fget(config)  # type: ignore[misc]

    return property(name_of, own.fset, own.fdel, own.__doc__)


_mask_wrap = ScopedWrap(AttentionMaskInterface, "__getitem__", wrapped_lookup(_wrap_mask))
_name_wrap = ScopedWrap(PreTrainedConfig, "_attn_implementation", _wrap_name)
