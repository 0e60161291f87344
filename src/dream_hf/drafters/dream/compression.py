"""Which of the prompt's tokens the drafter keeps (paper, section 3.3; all ways but ranking by attention are beyond it)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...runtime.alignment import left_aligned


@dataclass(frozen=True)
class DrafterText:
    """What a drafter reads of a text, each row's kept tokens at its left end, in order.

    Args:
        embeds (`torch.Tensor` of shape `(B, K, H)`): Embeddings, images merged.
        features (`torch.Tensor` of shape `(B, K, H)`): The target's last features of the same tokens.
        positions (`torch.LongTensor` of shape `(B, K)`): Their positions in the whole text.
        order (`torch.LongTensor` of shape `(B, K)`): Their columns in the text they were taken from.
        counts (`torch.LongTensor` of shape `(B,)`): How many entries of each row matter.
    """

    embeds: torch.Tensor
    features: torch.Tensor
    positions: torch.Tensor
    order: torch.Tensor
    counts: torch.Tensor

    def to(self, device: torch.device) -> DrafterText:
        """The same on a device."""
        return DrafterText(
            self.embeds.to(device),
            self.features.to(device),
            self.positions.to(device),
            self.order.to(device),
            self.counts.to(device),
        )


def compress_text(
    embeds: torch.Tensor,  # (B, T, H)
    features: torch.Tensor,  # (B, T, H)
    real: torch.Tensor,  # (B, P + T) bool
    is_visual: torch.Tensor,  # (B, T) bool
    keep_ratio: float,
    importance: str,
    received: torch.Tensor | None = None,  # (B, T)
) -> DrafterText:
    """Leave out padding and the visual tokens of least importance; the same for decoding and training.

    Args:
        embeds, features (`torch.Tensor` of shape `(B, T, H)`): What the target made of the text's last T tokens.
        real (`torch.BoolTensor` of shape `(B, P + T)`): False at padding, in the P tokens before these as well.
        is_visual (`torch.BoolTensor` of shape `(B, T)`): True at visual tokens.
        keep_ratio (`float`): Share of the visual tokens to keep; 0 for none.
        importance (`str`): Which ones, as `DreamConfig.visual_importance` says.
        received (`torch.Tensor` of shape `(B, T)`, *optional*): Attention each token receives from the prompt's queries in the
            target's last layer. Where tokens are ranked by it and it was not measured, all are kept.

    Returns:
        `DrafterText`
    """
    num_tokens = features.shape[1]
    positions = (real.long().cumsum(-1) - 1)[:, -num_tokens:]
    keep = real = real[:, -num_tokens:]
    if keep_ratio == 0.0:
        keep = real & ~is_visual
    elif keep_ratio < 1.0 and importance in ("uniform", "pool"):
        runs, ends = even_runs(is_visual & real, keep_ratio)
        keep = real & (~is_visual | ends)
        if importance == "pool":
            embeds, features = (mean_of_runs(states, runs) for states in (embeds, features))
    elif keep_ratio < 1.0:
        ranking = novelty(features, is_visual) if importance == "novelty" else received
        if ranking is not None:
            keep = real & tokens_to_keep(ranking, is_visual & real, keep_ratio)
    order, counts = left_aligned(keep)
    num_kept = counts.tolist()
    order = order[:, : max(num_kept)]
    if min(num_kept) < num_tokens:  # else all are where they belong, and nothing is copied
        embeds, features = (
            states.gather(1, order[..., None].expand(-1, -1, states.shape[-1])) for states in (embeds, features)
        )
        positions = positions.gather(1, order)
    return DrafterText(embeds, features, positions, order, counts)


def novelty(features: torch.Tensor, is_visual: torch.Tensor, num_compared: int = 2**22) -> torch.Tensor:
    """How unlike each visual token is to those before it: 1 less its largest cosine similarity to one of them.

    Of several alike (a background, say) the first is new, the others are not. It takes no attention maps.

    Args:
        features (`torch.Tensor` of shape `(B, T, H)`): The target's last features.
        is_visual (`torch.BoolTensor` of shape `(B, T)`): True at visual tokens.
        num_compared (`int`): Pairs of tokens that are compared at a time.

    Returns:
        `torch.Tensor` of shape `(B, T)`: Between 0 and 2; 2 at the first visual token, and 0 where there is none.
    """
    order, counts = left_aligned(is_visual)
    order = order[:, : int(counts.max())]
    visual = features.gather(1, order[..., None].expand(-1, -1, features.shape[-1]))
    visual = visual.to(torch.promote_types(visual.dtype, torch.float32))
    directions = torch.nn.functional.normalize(visual, dim=-1)  # (B, V, H)
    found = directions.new_zeros(is_visual.shape)
    places = torch.arange(order.shape[1], device=order.device)
    size = max(1, num_compared // max(order.numel(), 1))
    for start in range(0, len(places), size):
        some, before = places[start : start + size], places[: start + size]
        likeness = directions[:, start : start + size] @ directions[:, : start + size].mT
        nearest = likeness.masked_fill_(before >= some[:, None], -1.0).amax(-1)
        found.scatter_(1, order[:, some], 1.0 - nearest)
    return found.masked_fill_(~is_visual, 0.0)


def tokens_to_keep(importance: torch.Tensor, is_visual: torch.Tensor, keep_ratio: float) -> torch.Tensor:
    """Keep all text and, of each row's visual tokens, the most important.

    Args:
        importance (`torch.Tensor` of shape `(B, T)`): Of every token; that of visual ones counts.
        is_visual (`torch.BoolTensor` of shape `(B, T)`): True at visual tokens.
        keep_ratio (`float`): Share of the visual tokens to keep, rounded up.

    Returns:
        `torch.BoolTensor` of shape `(B, T)`: True at tokens to keep.
    """
    quota = (is_visual.sum(-1, keepdim=True) * keep_ratio - 1e-6).ceil()
    ranking = importance.masked_fill(~is_visual, -math.inf).argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(ranking).scatter_(
        1, ranking, torch.arange(ranking.shape[1], device=ranking.device).expand_as(ranking)
    )
    return ~is_visual | (ranks < quota)


def even_runs(is_visual: torch.Tensor, keep_ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut each row's visual tokens into as many even runs as are kept (SpecVLM, arXiv 2509.11815, pools such runs).

    Args:
        is_visual (`torch.BoolTensor` of shape `(B, T)`): True at visual tokens.
        keep_ratio (`float`): Share of the visual tokens to keep, rounded up.

    Returns:
        `tuple`: The run of each visual token, -1 at others, and where the last token of each run is, (B, T) each.
    """
    num_visual = is_visual.sum(-1, keepdim=True)
    quota = (num_visual * keep_ratio - 1e-6).ceil().long()
    places = is_visual.long().cumsum(-1)  # from 1 on
    runs = (places * quota + num_visual - 1) // num_visual.clamp(min=1) - 1
    following = (places + 1) * quota + num_visual - 1
    ends = is_visual & ((following // num_visual.clamp(min=1) - 1 > runs) | (places == num_visual))
    return runs.masked_fill(~is_visual, -1), ends


def mean_of_runs(states: torch.Tensor, runs: torch.Tensor) -> torch.Tensor:
    """Put the mean of each run in place of its states (B, T, H); those of no run, -1 in `runs` (B, T), stay as they are."""
    num_runs = int(runs.max()) + 1
    if not num_runs:
        return states
    wide = runs.masked_fill(runs < 0, num_runs)[..., None]
    exact = states.to(torch.promote_types(states.dtype, torch.float32))
    shape = (states.shape[0], num_runs + 1)
    sums = exact.new_zeros(*shape, states.shape[2]).scatter_add_(1, wide.expand_as(exact), exact)
    sizes = exact.new_zeros(*shape, 1).scatter_add_(1, wide, torch.ones_like(exact[..., :1]))
    means = (sums / sizes.clamp(min=1)).to(states.dtype)
    return torch.where(runs[..., None] < 0, states, means.gather(1, wide.expand_as(states)))
