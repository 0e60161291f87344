"""What `generate(..., return_dict_in_generate=True)` returns, gathered along the accepted paths."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..compat import CACHE

logger = logging.getLogger(__name__)

Layers = tuple[torch.Tensor, ...]


@dataclass
class DreamGenerateOutput(GenerateDecoderOnlyOutput):
    """`GenerateDecoderOnlyOutput` with what was gained.

    Args:
        accepted_lengths (`torch.LongTensor` of shape `(B, steps)`): Tokens gained by each verification, bonus included,
            padded with -1. The prefill, which yields the first token, is no entry; tokens cut by a stop or a length
            limit do not count. Tau is the mean of the valid entries.
        drafted_lengths (`torch.LongTensor` of shape `(B, steps)`): Drafted tokens in each verified tree, the root not
            counted, padded alike.
    """

    accepted_lengths: torch.LongTensor | None = None
    drafted_lengths: torch.LongTensor | None = None


@dataclass
class Recorder:
    """Collects per-token outputs. Entries of a row that ended before others are zeros.

    Args:
        config (`GenerationConfig`): Says what to collect.
        batch_size (`int`): Rows.
        windows (`Sequence[int | None]`): Sliding window of each decoder layer.
    """

    config: GenerationConfig
    batch_size: int
    windows: Sequence[int | None]
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    hidden_states: list[Layers] = field(default_factory=list)
    attentions: list[Layers] = field(default_factory=list)
    accepted: list[list[int]] = field(default_factory=list)
    drafted: list[list[int]] = field(default_factory=list)

    @property
    def wants_scores(self) -> bool:
        """Whether `scores` are returned, and seen by stopping criteria."""
        return bool(self.config.return_dict_in_generate and self.config.output_scores)

    @property
    def wants_choices(self) -> bool:
        """Whether it is recorded what tokens were chosen from."""
        return bool(self.config.return_dict_in_generate and (self.config.output_scores or self.config.output_logits))

    @property
    def wants_states(self) -> bool:
        """Whether hidden states or attentions are recorded."""
        return bool(
            self.config.return_dict_in_generate and (self.config.output_hidden_states or self.config.output_attentions)
        )

    def add_prefill(self, scores: torch.Tensor, logits: torch.Tensor, outputs: Any) -> None:
        """Record the first token: processed and raw scores (B, V), and the prefill's outputs."""
        if not self.config.return_dict_in_generate:
            return
        if self.config.output_scores:
            self.scores.append(scores)
        if self.config.output_logits:
            self.logits.append(logits)
        if self.config.output_hidden_states:
            self.hidden_states.append(outputs.hidden_states)
        if self.config.output_attentions:
            self.attentions.append(outputs.attentions)

    def add_choice(self, index: int, rows: Sequence[int], scores: torch.Tensor, logits: torch.Tensor) -> None:
        """Record what the new token `index` of `rows` was chosen from: processed and raw scores (n, V), a row for each."""
        if self.config.output_scores:
            self._put(self.scores, index, rows, scores)
        if self.config.output_logits:
            self._put(self.logits, index, rows, logits)

    def add_states(
        self, outputs: Any, path: torch.Tensor, starts: Sequence[int], counts: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Record hidden states and attentions along the paths (B, P); `lengths[b]` slots preceded the tree."""
        if not self.wants_states:
            return
        longest = max(lengths)
        for row, count in enumerate(counts):
            for step in range(count):
                nodes = path[row, : step + 1]
                if self.config.output_hidden_states:
                    states = tuple(layer[row, nodes[-1:]] for layer in outputs.hidden_states)
                    self._put_layers(self.hidden_states, states, starts[row] + step, row)
                if self.config.output_attentions and not any(layer is not None for layer in outputs.attentions):
                    # The implementation shows none: the same blanks as in plain decoding.
                    missing = starts[row] + step + 1 - len(self.attentions)
                    self.attentions += [outputs.attentions] * missing
                elif self.config.output_attentions:
                    maps = tuple(
                        _plain_attention(layer[row], nodes, lengths[row], longest, window)
                        for layer, window in zip(outputs.attentions, self.windows, strict=True)
                    )
                    self._put_layers(self.attentions, maps, starts[row] + step, row)

    def add_step(self, kept: Sequence[int], num_drafted: int, is_resting: Sequence[bool]) -> None:
        """Record tokens gained and drafted by one verification."""
        self.accepted.append([-1 if resting else count for count, resting in zip(kept, is_resting, strict=True)])
        self.drafted.append([-1 if resting else num_drafted for resting in is_resting])

    def result(self, sequences: torch.Tensor, num_new: int, cache: Cache) -> DreamGenerateOutput | torch.Tensor:
        """What `generate()` returns, for `sequences` whose last `num_new` columns are new."""
        if logger.isEnabledFor(logging.INFO):
            logger.info(self._summary())
        if not self.config.return_dict_in_generate:
            return sequences
        fields: dict[str, Any] = {
            name: tuple(getattr(self, name)[:num_new]) if getattr(self.config, f"output_{name}") else None
            for name in ("scores", "logits", "hidden_states", "attentions")
        }
        fields[CACHE] = cache
        return DreamGenerateOutput(
            sequences=sequences,  # type: ignore[arg-type]
            accepted_lengths=self._table(self.accepted),  # type: ignore[arg-type]
            drafted_lengths=self._table(self.drafted),  # type: ignore[arg-type]
            **fields,
        )

    def _summary(self) -> str:
        """What was gained, in a line."""
        gains = [gain for step in self.accepted for gain in step if gain > 0]
        if not gains:
            return "no step was taken"
        drafted = sum(number for step in self.drafted for number in step if number > 0) / len(gains)
        return (
            f"{sum(gains)} tokens in {len(self.accepted)} steps of {self.batch_size} rows: tau {sum(gains) / len(gains):.2f} "
            f"of {drafted:.1f} drafted"
        )

    def _table(self, steps: list[list[int]]) -> torch.Tensor:
        return torch.tensor(steps, dtype=torch.long, device="cpu").view(len(steps), self.batch_size).T

    def _put(self, entries: list[torch.Tensor], index: int, rows: Sequence[int], values: torch.Tensor) -> None:
        while len(entries) <= index:
            entries.append(values.new_zeros(self.batch_size, values.shape[1]))
        entries[index][list(rows)] = values

    def _put_layers(self, entries: list[Layers], values: Layers, index: int, row: int) -> None:
        while len(entries) <= index:
            entries.append(tuple(value.new_zeros(self.batch_size, *value.shape) for value in values))
        for entry, value in zip(entries[index], values, strict=True):
            entry[row] = value


def _plain_attention(
    attention: torch.Tensor, nodes: torch.Tensor, length: int, longest: int, window: int | None
) -> torch.Tensor:
    """A node's attention (heads, 1, K) to the keys plain decoding would have had, from a tree's (heads, N, columns).

    `nodes` leads from the root to the node; `length` verified slots precede the tree in this row, `longest` in some row.
    """
    num_nodes, num_columns = attention.shape[1:]
    first_slot = longest + num_nodes - num_columns  # the slot of the first column
    tree_column = length - first_slot
    start = 0 if window is None else max(length + len(nodes) - window - first_slot, 0)
    node = attention[:, nodes[-1:]]
    return torch.cat([node[..., start:tree_column], node[..., tree_column + nodes]], dim=-1)
