"""Who sees what when the drafter attends, in memory that grows with the text and not with its square.

B rows, h heads of queries, g of keys and values, T queries, K keys, d `head_dim`. A query that sees nothing gets `unseen`,
(B, h, 1, d) or what expands to it; it is None where every query sees something.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ..runtime.few_queries import aligned_count, attend_by_products, products_pay
from .masked_attention import (
    SINK_COLUMNS,
    aligned_bias,
    attend_masked,
    attend_own,
    dtype_of_attention,
    in_chunks,
    in_two_parts,
    mask_rows,
    with_sink,
)


class Visibility(ABC):
    """Which of K keys each of T queries sees."""

    may_show_nothing: ClassVar[bool] = True  # whether some query may see no key

    @abstractmethod
    def mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """True where a key is seen, (B or 1, T, K)."""

    @abstractmethod
    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, unseen: Tensor | None, scale: float, dropout: float
    ) -> Tensor:
        """Attention of queries (B, h, T, d) to keys and values (B, g, K, d): (B, h, T, d)."""


@dataclass(frozen=True)
class Listed(Visibility):
    """Any pattern: `visible` (B, T, K) is True where a key is seen."""

    visible: Tensor

    def mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        return self.visible

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, unseen: Tensor | None, scale: float, dropout: float
    ) -> Tensor:
        return attend_masked(queries, keys, values, self.visible, unseen, scale, dropout)


@dataclass(frozen=True)
class Biased(Visibility):
    """Any pattern in which each query sees something, as numbers that are made once for all blocks.

    Args:
        bias (`torch.Tensor` of shape `(B, 1, T, columns)`): 0 where a key is seen, else -inf; there may be fewer keys, or
            more, which are not seen.
    """

    may_show_nothing = False
    bias: Tensor

    def mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        return pad(self.bias[:, 0] == 0, (0, num_keys - self.bias.shape[-1]))  # which may cut

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, unseen: Tensor | None, scale: float, dropout: float
    ) -> Tensor:
        num_columns = min(self.bias.shape[-1], keys.shape[2])
        if not dropout and products_pay(queries, keys):
            num_columns = min(aligned_count(num_columns), keys.shape[2])
            bias = pad(self.bias, (0, num_columns - self.bias.shape[-1]), value=-torch.inf)  # which may cut
            return attend_by_products(queries, keys[:, :, :num_columns], values[:, :, :num_columns], bias, scale)
        return scaled_dot_product_attention(
            queries,
            keys[:, :, :num_columns],
            values[:, :, :num_columns],
            attn_mask=self.bias[..., :num_columns],
            scale=scale,
            dropout_p=dropout,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )


@dataclass(frozen=True)
class FromStart(Visibility):
    """A text from its start, with nothing before it: query t sees the first t + 1 keys, or those but the last `behind`.

    Padding behind a row's text needs no mask, since nothing real sees it.
    """

    behind: int = 0

    def mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        columns = torch.arange(max(num_queries, num_keys), device=device)
        return (columns[:num_keys] <= columns[:num_queries, None] - self.behind)[None]

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, unseen: Tensor | None, scale: float, dropout: float
    ) -> Tensor:
        num_seeing = queries.shape[2] - self.behind
        parts = []
        if self.behind:
            assert unseen is not None  # the first queries see nothing
            parts.append(unseen.to(values.dtype).expand(*queries.shape[:2], self.behind, values.shape[3]))
        if num_seeing > 0:  # each of these sees its own key and those before it
            attended = scaled_dot_product_attention(
                queries[:, :, self.behind :],
                keys[:, :, :num_seeing],
                values[:, :, :num_seeing],
                is_causal=True,
                scale=scale,
                dropout_p=dropout,
                enable_gqa=queries.shape[1] != keys.shape[1],
            )
            parts.append(attended)
        return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[-1].dtype) for part in parts], dim=2)


@dataclass(frozen=True)
class Prefixes(Visibility):
    """Text behind other text, or with gaps: a query sees the first `counts` keys, of those the `real` ones.

    Args:
        counts (`torch.LongTensor` of shape `(B or 1, T)`): How many keys from the first on.
        real (`torch.BoolTensor` of shape `(B, K)`, *optional*): False at padding.
        is_self_seen (`bool`): Queries see the last of these keys in any case, so that padding has a softmax.
    """

    counts: Tensor
    real: Tensor | None = None
    is_self_seen: bool = False

    def mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        columns, counts = torch.arange(num_keys, device=device), self.counts.to(device)[..., None]
        visible = columns < counts
        if self.real is not None:
            visible = visible & self.real[:, None, :num_keys]
            if self.is_self_seen:
                visible = visible | (columns == counts - 1)
        return visible

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, unseen: Tensor | None, scale: float, dropout: float
    ) -> Tensor:
        num_keys = keys.shape[2]

        def attend_some(some: slice) -> Tensor:
            part = Prefixes(self.counts[:, some], self.real, self.is_self_seen)
            chosen = queries[:, :, some]
            mask = part.mask(chosen.shape[2], num_keys, keys.device)
            return attend_masked(chosen, keys, values, mask, unseen, scale, dropout)

        return in_chunks(attend_some, queries.shape[2], mask_rows(queries, num_keys))


@dataclass(frozen=True)
class OwnChains(Visibility):
    """Chains of drafts, one below each of M places in a text: a query sees verified keys and its own chain's.

    Of the keys the first K belong to the text, then come M of each depth up to `depth`, the queries' own.

    Args:
        counts (`torch.LongTensor` of shape `(B, M)`): How many of the text's keys each query sees.
        depth (`int`): How many drafts each chain has.
    """

    may_show_nothing = False
    counts: Tensor
    depth: int

    def mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        columns = torch.arange(num_keys - self.depth * num_queries, device=device)
        own = torch.eye(num_queries, dtype=torch.bool, device=device).repeat(1, self.depth)
        return torch.cat([columns < self.counts[..., None], own.expand(len(self.counts), -1, -1)], dim=-1)

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, unseen: Tensor | None, scale: float, dropout: float
    ) -> Tensor:
        """The chain's keys are attended to first, then the text's together with what came of it.

        That is one more key: a sink whose score is the log-sum-exp of the chain's, so that the share it gets is the chain's.
        Dropout takes a chain as a whole.
        """
        dtype = dtype_of_attention(queries)
        queries, keys, values = queries.to(dtype), keys.to(dtype), values.to(dtype)
        num_verified = keys.shape[2] - self.depth * queries.shape[2]
        sinks, of_chains = attend_own(queries, keys[:, :, num_verified:], values[:, :, num_verified:], scale)
        queries = torch.cat([queries, in_two_parts(sinks / scale, dtype)], dim=-1)
        keys = with_sink(keys[:, :, :num_verified], 2)
        values = with_sink(values[:, :, :num_verified], 1)

        def attend_some(some: slice) -> Tensor:
            mask = torch.arange(num_verified + 1, device=keys.device) <= self.counts[:, some, None]
            return attend_masked(queries[:, :, some], keys, values, mask, None, scale, dropout)

        attended = in_chunks(attend_some, queries.shape[2], mask_rows(queries, num_verified + 1))
        of_text, share = attended[..., :-SINK_COLUMNS], attended[..., -SINK_COLUMNS, None]
        return of_text + share * of_chains.to(attended.dtype)


@dataclass(frozen=True)
class DraftMasks:
    """Who sees what: `tokens` (B, T, K) for self-attention, `features` (B, T, F) for cross-attention, True where visible.

    Either may be a [`Visibility`] instead, which takes less memory for text that does not branch.
    """

    tokens: Tensor | Visibility
    features: Tensor | Visibility

    def visibilities(self) -> Visibilities:
        """The same, for the blocks."""
        return Visibilities(*(Listed(m) if isinstance(m, Tensor) else m for m in (self.tokens, self.features)))


@dataclass(frozen=True)
class Visibilities:
    """What the tokens see of the tokens and of the features."""

    tokens: Visibility
    features: Visibility


def shown_columns(sees: Tensor) -> Visibilities:
    """What tokens see by one [`bias_of`] columns, (B, T, columns): column c stands for token c and for feature c - 1.

    Every token sees its own column, which is not the first: so it sees a token and a feature.
    """
    bias = sees.unsqueeze(1)
    return Visibilities(*(Biased(aligned_bias(part)) for part in (bias, bias[..., 1:])))


def visibility_of(mask: Tensor | Visibility | None, rows: Tensor) -> Visibility:
    """What `rows` (1, T), counted from the start of the text, see: by a mask (B, T, K), or all before them and themselves."""
    if isinstance(mask, Tensor):
        return Listed(mask)
    if mask is None:
        return Prefixes(rows + 1) if int(rows[0, 0]) else FromStart()
    return mask


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores for a mask that is True where something is seen: 0 there, else -inf."""
    return mask.to(dtype).log()


def text_visibilities(
    attention_mask: Tensor | None,  # (B, past_tokens + num_tokens)
    num_tokens: int,
    num_features: int,
    past_tokens: int = 0,
    past_features: int = 0,
    device: torch.device | None = None,
) -> Visibilities:
    """Of text that does not branch: tokens see tokens up to themselves, and the features of positions below theirs."""
    all_tokens, all_features = past_tokens + num_tokens, past_features + num_features
    if all_features >= all_tokens:
        raise ValueError(
            f"`target_features` brings the features to {all_features} for {all_tokens} tokens; the last token "
            "has not been through the target, so there must be at least one feature fewer than tokens."
        )
    real = None
    if attention_mask is not None:
        if attention_mask.shape[-1] != all_tokens:
            raise ValueError(
                f"`attention_mask` has {attention_mask.shape[-1]} columns for {all_tokens} tokens; it must cover "
                "the tokens in the cache as well."
            )
        real = attention_mask.to(device=device, dtype=torch.bool)
        if not (real[:, 1:] & ~real[:, :-1]).any():  # all padding is behind the text, where no token sees it
            real = None
    if real is None and not past_tokens and num_features == num_tokens - 1:
        return Visibilities(FromStart(), FromStart(behind=1))
    counts = torch.arange(past_tokens + 1, all_tokens + 1, device=device)[None]
    return Visibilities(Prefixes(counts, real, is_self_seen=True), Prefixes(counts - 1, real))
