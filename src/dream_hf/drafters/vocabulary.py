"""A reduced draft vocabulary: drafts are searched among frequent tokens only, with those rows of the target's head.

With a vocabulary of 262,208 tokens the borrowed head has more weights than the drafter's own blocks (Gemma3-12B: 1.5
times as many), all of which every draft level reads. Which tokens may be drafted changes what is accepted, never what is
generated: the target verifies over its whole vocabulary (FR-Spec, arXiv 2502.14856, which likewise leaves the drafter as
it was trained).

V tokens in the vocabulary, R of them drafted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

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
