"""Losses per position, pure; only `masked_mean` reduces (paper 3.2.1, and acceptance-direct losses beyond it)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Elements of one (positions, vocabulary) matrix in float32: 256 MiB.
MAX_LOGITS = 2**26


# -- features ---------------------------------------------------------------------------------------------------------


def smooth_l1(drafted: Tensor, features: Tensor, beta: float = 1.0) -> Tensor:  # (..., H), (..., H) -> (...,)
    """
    Mean over the width of `0.5 * d**2 / beta` where the difference `d` is below `beta`, else of `|d| - 0.5 * beta`.

    Used on the final and on the selected intermediate features (paper 3.2.1). Large features count for much: see
    [`normalize_features`].
    """
    return F.smooth_l1_loss(_upcast(drafted), _upcast(features), reduction="none", beta=beta).mean(-1)


def normalize_features(features: Tensor, eps: float = 1e-6) -> Tensor:  # (..., H) -> (..., H)
    """
    Features at root mean square 1 in every position, in float32 or better.

    A target's intermediate features are often tens of times larger than its final ones; comparing both sides
    normalised keeps their loss from drowning the others, at the price of not learning their length.
    """
    features = _upcast(features)
    return features * torch.rsqrt(features.square().mean(-1, keepdim=True) + eps)


# -- distributions: p the target's, q the drafter's, both as log-probabilities (..., V) in float32 or wider ---------


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:  # -> (...,)
    """KL(target || drafter), `sum_x p(x) * (log p(x) - log q(x))`. Tokens the target rules out count nothing."""
    lowest = torch.finfo(log_p.dtype).min  # instead of -inf, which times a probability of 0 is not a number
    return (log_p.exp() * (log_p.clamp_min(lowest) - log_q.clamp_min(lowest))).sum(-1)


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:  # -> (...,)
    """
    `0.5 * sum_x |p(x) - q(x)|`: the chance that speculative sampling rejects a token drawn from the drafter (Leviathan
    et al. 2023, theorem 3.5). Its gradient fades where the two barely overlap; mix it with KL, or see
    [`negative_log_acceptance`].
    """
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def negative_log_acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:  # -> (...,)
    """`-log sum_x min(p(x), q(x))`: minus the log of the chance of acceptance, so that its gradient does not fade."""
    return -torch.minimum(log_p, log_q).logsumexp(-1)


DISTRIBUTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": kl_divergence,
    "tv": total_variation,
    "nla": negative_log_acceptance,
}


def distribution_losses(
    drafted: Tensor,  # (N, H)
    features: Tensor,  # (N, H)
    head: Callable[[Tensor], Tensor],
    names: Sequence[str],
    max_logits: int = MAX_LOGITS,
    own_head: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """
    Compare the tokens that a drafter and its target predict, without ever holding all logits.

    Positions go through `head` in chunks, forward and backward, so that memory does not grow with N times the
    vocabulary (2,000 answer tokens of a 262k vocabulary are 2 GB per copy in float32, and a loss needs several).

    Args:
        drafted (`torch.Tensor` of shape (N, H)): The drafter's final features; gradients flow into these only.
        features (`torch.Tensor` of shape (N, H)): The target's final features of the same positions.
        head (`Callable`): The target's LM head, (n, H) -> logits (n, V), soft-capping and scaling included.
        names (`Sequence[str]`): Which of "kl", "tv" and "nla".
        max_logits (`int`): Most elements of one chunk's logits.
        own_head (`Callable`, *optional*): Makes the drafter's logits, of the same V tokens; by default `head` does.

    Returns:
        `dict[str, torch.Tensor]`: For each name the loss of every position, (N,).
    """
    if len(drafted) == 0:
        return {name: drafted.sum(-1) for name in names}  # nothing, yet part of the graph

    def losses_of(drafted: Tensor, features: Tensor) -> Tensor:  # (n, H), (n, H) -> (names, n)
        with torch.no_grad():
            log_p = _upcast(head(features)).log_softmax(-1)
        log_q = _upcast((own_head or head)(drafted)).log_softmax(-1)
        return torch.stack([DISTRIBUTION_LOSSES[name](log_p, log_q) for name in names])

    with torch.no_grad():
        vocab_size = head(features[:1]).shape[-1]
    chunk_size = max(1, max_logits // vocab_size)
    if len(drafted) <= chunk_size:
        losses = losses_of(drafted, features)
    else:
        chunks = zip(drafted.split(chunk_size), features.split(chunk_size), strict=True)
        parts = [checkpoint(losses_of, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        losses = torch.cat(parts, dim=1)
    return dict(zip(names, losses, strict=True))


# -- reduction --------------------------------------------------------------------------------------------------------


def masked_mean(values: Tensor, mask: Tensor, num_items: Tensor | int | None = None) -> Tensor:  # (...,), (...,) -> ()
    """
    Sum `values` where `mask` holds, over `num_items`.

    Args:
        values (`torch.Tensor`): One loss per position; what stands outside the mask may be anything, NaN included.
        mask (`torch.Tensor`): Which positions count, bool, same shape.
        num_items (`int` or `torch.Tensor`, *optional*):
            Answer tokens of the *global* batch: all processes and accumulation steps together, so that every answer
            token weighs the same however rows were spread. By default those of `mask`.
    """
    total = values.masked_fill(~mask, 0.0).sum()
    return total / (mask.sum().clamp(min=1) if num_items is None else num_items)


def step_weights(num_steps: int, decay: float) -> list[float]:
    """Weights of the steps of a rollout, `decay**k` for step k (HASS, EAGLE-3)."""
    return [decay**step for step in range(num_steps)]


def _upcast(values: Tensor) -> Tensor:
    """`values` in float32, or in their own type where that is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
