"""A reduced draft vocabulary: drafts are searched among frequent tokens only, with those rows of the target's head.

With a vocabulary of 262,208 tokens the borrowed head has more weights than the drafter's own blocks (Gemma3-12B: 1.5
times as many), all of which every draft level reads. Which tokens may be drafted changes what is accepted, never what is
generated: the target verifies over its whole vocabulary (FR-Spec, arXiv 2502.14856, which likewise leaves the drafter as
it was trained).

V tokens in the vocabulary, R of them drafted, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .modeling import DreamDrafter

REMEDY = "Set it with `drafter.set_draft_vocabulary(token_ids)`; `choose_draft_vocabulary` chooses them."


def choose_draft_vocabulary(counts: Tensor, size: int, required_ids: Iterable[int] = ()) -> Tensor:
    """The tokens to draft: those that must be there and the most frequent others; of equally frequent ones the lower ids.

    Args:
        counts (`torch.Tensor` of shape `(V,)`): How often each token occurs in answers; see `count_answer_tokens`.
        size (`int`): How many tokens to choose.
        required_ids (`Iterable[int]`): Tokens to choose whatever their counts: the ends of answers above all.

    Returns:
        `torch.LongTensor` of shape `(size,)`: Token ids, rising; what `set_draft_vocabulary` takes.

    Raises:
        ValueError: A size outside of 1 to V, or more required tokens than that; a token that does not exist.
    """
    if counts.ndim != 1:
        raise ValueError(
            f"`counts` has shape {tuple(counts.shape)}; pass one count for each token, (vocabulary size,)."
        )
    required = sorted(set(required_ids))
    if required and not 0 <= required[0] <= required[-1] < len(counts):
        raise ValueError(
            f"`required_ids` ({required}) must lie in [0, {len(counts)}), the tokens that `counts` is of."
        )
    if not max(1, len(required)) <= size <= len(counts):
        raise ValueError(
            f"`size` ({size}) must lie between {max(1, len(required))} (there are {len(required)} `required_ids`) and "
            f"{len(counts)}, the length of `counts`."
        )
    ranks = counts.detach().cpu().argsort(descending=True, stable=True)
    is_required = torch.zeros(len(counts), dtype=torch.bool)
    is_required[required] = True
    others = ranks[~is_required[ranks]]
    return torch.cat([torch.tensor(required, dtype=torch.long), others[: size - len(required)]]).sort().values


def sorted_token_ids(token_ids: Sequence[int] | Tensor, vocab_size: int) -> Tensor:
    """Token ids in any order as a draft vocabulary, (R,).

    Raises:
        ValueError: No whole numbers, none at all, repeats, or tokens that do not exist.
    """
    found = token_ids.detach().cpu() if isinstance(token_ids, Tensor) else torch.as_tensor(list(token_ids))
    if found.numel() and (found.is_floating_point() or found.dtype == torch.bool):
        raise ValueError(f"`token_ids` are {found.dtype}; pass whole numbers.")
    found = found.long().flatten().sort().values
    check_token_ids(found, vocab_size, name="token_ids")
    return found


def check_token_ids(token_ids: Tensor, vocab_size: int, name: str = "draft_token_ids") -> None:
    """Raise a `ValueError` unless `token_ids` are (R,) long, R > 0, rising without repeats, within the vocabulary."""
    if token_ids.dtype != torch.long or token_ids.ndim != 1 or not len(token_ids):
        raise ValueError(
            f"`{name}` is {token_ids.dtype} of shape {tuple(token_ids.shape)}; a draft vocabulary is a non-empty row of "
            f"int64 token ids. {REMEDY}"
        )
    token_ids = token_ids.detach().cpu()
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= vocab_size:
        unset = " (-1 stands for a vocabulary that was never set)" if low == -1 else ""
        raise ValueError(
            f"`{name}` reaches from {low}{unset} to {high}; tokens lie in [0, {vocab_size}), the drafter's `vocab_size`. "
            + REMEDY
        )
    if not bool((token_ids[1:] > token_ids[:-1]).all()):
        raise ValueError(f"`{name}` must rise without repeats. {REMEDY}")


def check_draft_vocabulary(token_ids: Tensor | None, draft_vocab_size: int | None, vocab_size: int) -> None:
    """Raise a `ValueError` unless a drafter's token ids are what its config says."""
    num_tokens = None if token_ids is None else len(token_ids)
    if num_tokens != draft_vocab_size:
        raise ValueError(
            f"`draft_vocab_size` ({draft_vocab_size}) is not the number of tokens in the drafter's `draft_token_ids` "
            f"({num_tokens}). {REMEDY}"
        )
    if token_ids is not None:
        check_token_ids(token_ids, vocab_size)


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


def reduced_head(head: nn.Module, drafter: DreamDrafter) -> Callable[[Tensor], Tensor]:
    """A target's head for the tokens a drafter may draft: hidden states (..., H) -> logits (..., R).

    The rows are copied once per call of this function, into memory that is kept as long as both the head and the drafter
    are. A head that is no plain linear layer (quantised, adapted, offloaded, spread over devices, hooked) is run as a
    whole and the logits are selected, which is as right and saves nothing.
    """
    token_ids = drafter.draft_token_ids
    assert token_ids is not None  # callers ask only for a drafter that has them
    plain = _plain_linear(head)
    if plain is None:
        return lambda hidden: _select(head(hidden), token_ids)
    of_drafter = _rows.setdefault(drafter, WeakKeyDictionary())
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
