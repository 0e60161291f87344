"""Some rows of a target's head, for drafters that draft some tokens only. R of V tokens, H width."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class HeadRows:
    """Some rows of a linear head: hidden states (..., H) -> their logits (..., R), in the head's dtype.

    The rows are copies, R x H numbers; taking them again refreshes them in place, so that whatever was captured over them
    stays right.

    Args:
        head (`nn.Linear`): The head, (V, H).
        token_ids (`torch.LongTensor` of shape `(R,)`): Which rows.
    """

    def __init__(self, head: nn.Linear, token_ids: Tensor):
        with torch.inference_mode(False):  # so that a later call may write to them, wherever this one happens
            self.weight = head.weight.new_empty(len(token_ids), head.weight.shape[1], requires_grad=False)
            self.bias = None if head.bias is None else head.bias.new_empty(len(token_ids), requires_grad=False)

    @torch.no_grad()
    def take(self, head: nn.Linear, token_ids: Tensor) -> None:
        """Copy the rows anew."""
        token_ids = token_ids.to(head.weight.device)
        torch.index_select(head.weight.detach(), 0, token_ids, out=self.weight)
        if self.bias is not None:
            torch.index_select(head.bias.detach(), 0, token_ids, out=self.bias)

    def fits(self, head: nn.Linear, token_ids: Tensor) -> bool:
        """Whether the rows of this head go into the memory there is."""
        weight = head.weight
        same_kind = (self.weight.dtype, self.weight.device) == (weight.dtype, weight.device)
        same_shape = self.weight.shape == (len(token_ids), weight.shape[1])
        return same_kind and same_shape and (self.bias is None) == (head.bias is None)

    def __call__(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.to(self.weight.device, self.weight.dtype), self.weight, self.bias)


_rows: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, HeadRows]] = WeakKeyDictionary()


def reduced_head(head: nn.Module, token_ids: Tensor, owner: nn.Module) -> Callable[[Tensor], Tensor]:
    """A target's head for some of its tokens: hidden states (..., H) -> logits (..., R).

    The rows are copied once per call of this function, into memory that is kept as long as both the head and `owner`, the
    drafter that wants them, are. A head that is no plain linear layer (quantised, adapted, offloaded, spread over devices,
    hooked) is run as a whole and the logits are selected, which is as right and saves nothing.
    """
    plain = _plain_linear(head)
    if plain is None:
        return lambda hidden: _select(head(hidden), token_ids)
    of_drafter = _rows.setdefault(owner, WeakKeyDictionary())
    rows = of_drafter.get(plain)
    if rows is None or not rows.fits(plain, token_ids):
        rows = of_drafter[plain] = HeadRows(plain, token_ids)
    rows.take(plain, token_ids)
    return rows


def _plain_linear(head: nn.Module) -> nn.Linear | None:
    """The head, if its output is its weight's product with its input, and the weight is all here."""
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return None
    weight = head.weight
    is_whole = type(weight) is nn.Parameter and weight.shape == (head.out_features, head.in_features)
    return head if is_whole and weight.device.type != "meta" and weight.is_floating_point() else None


def _select(logits: Tensor, token_ids: Tensor) -> Tensor:
    return logits.index_select(-1, token_ids.to(logits.device))
