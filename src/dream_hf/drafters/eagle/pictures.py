"""What a drafter's rows read of pictures: ViSpec's compression (arXiv 2509.15235), and MSD's rows past `fc` (arXiv 2505.14260).

An image row is one whose token stands for a piece of a picture. B rows of a batch, T rows of text, Q learned queries, H width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration import EagleConfig


class Pictures(NamedTuple):
    """What pictures make of rows.

    Args:
        rows (`torch.BoolTensor` of shape `(B, T)`, *optional*): True at rows whose embedding enters the layers as it is.
        context (`torch.Tensor` of shape `(B, T or 1, H)`, *optional*): What text reads of the last picture before it.
    """

    rows: Tensor | None = None
    context: Tensor | None = None

    def part(self, part: slice) -> Pictures:
        """The same of some of the rows."""
        rows = None if self.rows is None else self.rows[:, part]
        is_same = self.context is None or self.context.shape[1] == 1
        return Pictures(rows, self.context if is_same else self.context[:, part])  # type: ignore[index]


NO_PICTURES = Pictures()


class ImageAdaptor(nn.Module):
    """Learned queries that look at all embeddings of a picture, without positions: Q vectors out of any number."""

    def __init__(self, config: EagleConfig):
        super().__init__()
        heads, size = config.num_attention_heads, config.num_attention_heads * config.head_dim  # type: ignore[operator]
        queries = torch.randn(config.num_image_queries, heads, config.head_dim)  # type: ignore[arg-type]
        self.queries = nn.Parameter(config.initializer_range * queries)
        self.k_proj = nn.Linear(config.hidden_size, size, bias=config.has_image_bias)
        self.v_proj = nn.Linear(config.hidden_size, size, bias=config.has_image_bias)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, embeds: Tensor) -> Tensor:
        """(N, H) -> (Q, H)."""
        num_heads, head_dim = self.queries.shape[1:]
        keys, values = (
            torch.unflatten(project(embeds), -1, (num_heads, head_dim)) for project in (self.k_proj, self.v_proj)
        )
        scores = torch.einsum("qhd,nhd->hqn", self.queries, keys) / head_dim**0.5
        return self.o_proj(torch.einsum("hqn,nhd->qhd", scores.softmax(-1), values).flatten(1))


@dataclass(frozen=True)
class CompressedRows:
    """Rows of which those of pictures are replaced by few.

    Args:
        embeds (`torch.Tensor` of shape `(B, T, H)`): Embeddings; at kept image rows what stands for the picture.
        is_kept (`torch.BoolTensor` of shape `(B, T)`): False at image rows that nothing stands for.
        context (`torch.Tensor` of shape `(B, T, H)`): What text reads of the last picture before it.
    """

    embeds: Tensor
    is_kept: Tensor
    context: Tensor


def compressed(adaptor: ImageAdaptor, embeds: Tensor, is_image: Tensor, context: Tensor) -> CompressedRows:
    """Put all but the last of Q vectors in the place of a picture's last rows; the last one is for all text behind it.

    Args:
        adaptor (`ImageAdaptor`): What makes the vectors.
        embeds (`torch.Tensor` of shape `(B, T, H)`): Embeddings of the tokens that the rows read, pictures merged.
        is_image (`torch.BoolTensor` of shape `(B, T)`): The image rows; a picture is a run of them.
        context (`torch.Tensor` of shape `(B, 1, H)`): What text reads of pictures before these rows.
    """
    embeds, context, is_kept = embeds.clone(), context.expand_as(embeds).clone(), ~is_image
    for row, first, stop in runs(is_image):
        summary = adaptor(embeds[row, first:stop])
        num_queries = len(summary) - 1
        num_kept = min(num_queries, stop - first)
        embeds[row, stop - num_kept : stop] = summary[num_queries - num_kept : num_queries]
        is_kept[row, stop - num_kept : stop] = True
        context[row, stop:] = summary[-1]
    return CompressedRows(embeds, is_kept, context)


def runs(flags: Tensor) -> Iterator[tuple[int, int, int]]:
    """Runs of True in (B, T), from left to right: the row of the batch, the first place and the one behind the last."""
    changes = nn.functional.pad(flags.int(), (1, 1)).diff()  # (B, T + 1)
    firsts, stops = (changes == 1).nonzero().tolist(), (changes == -1).nonzero().tolist()
    for (row, first), (_, stop) in zip(firsts, stops, strict=True):
        yield row, first, stop
