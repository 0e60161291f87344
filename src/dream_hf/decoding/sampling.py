"""The target's choice of tokens along a drafted tree: what plain decoding does with each token, in the same order.

Logits processors on the true prefix, then argmax or a draw, then the stopping criteria. Nothing is asked about a text that
has ended, or about a drafted token that was not chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.logits_process import LogitsProcessorList

from ..runtime.counts import Counts
from .acceptance import Acceptance, accept_greedy, sample
from .outputs import Recorder
from .sequences import Sequences
from .stopping import Stopping
from .tree import DraftTree

# These look at scores only, each row by itself; all nodes of a tree can go through them at once.
PREFIX_FREE = frozenset(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
    )
)

# These hold something for each row of the batch, and so have to be shown all of it.
BATCH_BOUND = frozenset(
    getattr(logits_process, name)
    for name in (
        "RepetitionPenaltyLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
    )
)

# All of transformers' own that look at each row by itself and remember nothing. Others may remember what they were asked
# (a user's own, guidance), call a user's function (allowed tokens by prefix) or read a clock.
PURE = (
    PREFIX_FREE
    | BATCH_BOUND
    | {
        getattr(logits_process, name)
        for name in (
            "MinLengthLogitsProcessor",
            "MinNewTokensLengthLogitsProcessor",
            "NoRepeatNGramLogitsProcessor",
            "SequenceBiasLogitsProcessor",
            "NoBadWordsLogitsProcessor",
            "ForcedBOSTokenLogitsProcessor",
            "ForcedEOSTokenLogitsProcessor",
            "ExponentialDecayLengthPenalty",
            "SuppressTokensAtBeginLogitsProcessor",
            "WatermarkLogitsProcessor",
            "TopHLogitsWarper",
        )
    }
    | {getattr(stopping_criteria, name) for name in ("EosTokenCriteria", "MaxLengthCriteria", "StopStringCriteria")}
)

# transformers' own processors that remember every token they were asked about.
STATEFUL = frozenset(
    getattr(logits_process, name)
    for name in ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")
)


def is_pure(judge: Any) -> bool:
    """Whether rows of different lengths may be put before a logits processor or stopping criterion one after the other."""
    return type(judge) in PURE


@dataclass(frozen=True)
class Accepted:
    """What each row keeps of a tree, and was appended to its text.

    Args:
        path (`torch.LongTensor` of shape `(B, P)`): From the root to the last accepted node; 0 beyond `counts[b]`.
        tokens (`torch.LongTensor` of shape `(B, P)`): The token chosen after each of them.
        counts (`Counts`): How many of both are row b's.
    """

    path: torch.Tensor
    tokens: torch.Tensor
    counts: Counts

    def last_tokens(self, roots: torch.Tensor) -> torch.Tensor:
        """The last token of each row, (B, 1): that of `roots` (B, 1) where nothing was gained."""
        counts = self.counts.on(roots.device)[:, None]
        return torch.cat([roots, self.tokens], dim=1).gather(1, counts)


@dataclass(frozen=True)
class Sampler:
    """How the target picks tokens.

    Args:
        processors (`LogitsProcessorList`): As prepared by `generate()`.
        do_sample (`bool`): Draw from the processed distribution instead of taking its maximum.
        in_step (`bool`): Let all rows gain equally many tokens, so that they are judged together, once for each token.
    """

    processors: LogitsProcessorList
    do_sample: bool
    in_step: bool = False

    def process(self, prefixes: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Processed scores (n, V) from logits (n, V) in float32 and what precedes them, (n, length)."""
        return self.processors(prefixes, logits)  # type: ignore[arg-type]

    def pick(self, scores: torch.Tensor) -> torch.Tensor:
        """Tokens (...) from processed scores (..., V)."""
        return sample(scores.softmax(-1)) if self.do_sample else scores.argmax(-1)

    def verify(
        self,
        tree: DraftTree,
        logits: torch.Tensor,
        sequences: Sequences,
        stopping: Stopping,
        recorder: Recorder,
        look_ahead: Callable[[Acceptance], None] = lambda acceptance: None,
    ) -> Accepted:
        """Choose along the tree, from logits (B, N, V) in float32; append to `sequences` what each row gains up to its end.

        Where all is chosen at once, `look_ahead` hears of it before the host does, which has to wait.
        """
        if not all(type(processor) in PREFIX_FREE for processor in self.processors):
            return _Walk(self, tree, logits, sequences, stopping, recorder).run()
        scores = logits
        if self.processors:
            scores = self.process(tree.tokens.view(-1, 1), logits.flatten(0, 1)).view_as(logits)
        choices = self.pick(scores)
        if stopping.others or self.in_step:
            return _ChosenWalk(self, tree, logits, sequences, stopping, recorder, scores, choices).run()
        acceptance = accept_greedy(tree, choices)
        arriving = acceptance.fetch()
        look_ahead(acceptance)
        return _accept(acceptance, arriving(), scores, logits, sequences, stopping, recorder)


def _accept(
    acceptance: Acceptance,
    gained: list[list[int]],  # its tokens, on the host
    scores: torch.Tensor,  # (B, N, V)
    logits: torch.Tensor,  # (B, N, V)
    sequences: Sequences,
    stopping: Stopping,
    recorder: Recorder,
) -> Accepted:
    """Keep what follows from choices that nobody has to be asked about."""
    starts = list(sequences.lengths)
    kept = [
        0 if stopping.is_resting(row) else stopping.cut(row, starts[row], tokens) for row, tokens in enumerate(gained)
    ]
    is_all = all(count == len(tokens) for count, tokens in zip(kept, gained, strict=True))
    counts = Counts(kept, acceptance.lengths if is_all else None)
    sequences.extend(acceptance.tokens, counts)
    path, tokens = acceptance.path[:, : max(counts)], acceptance.tokens[:, : max(counts)]
    if recorder.wants_choices:
        for row, count in enumerate(counts):
            for step, node in enumerate(path[row, :count].tolist()):
                index = starts[row] + step - sequences.prompt_length
                recorder.add_choice(index, [row], scores[row, node][None], logits[row, node][None])
    return Accepted(path, tokens, counts)


@dataclass
class _Walk:
    """Plain decoding's loop over the nodes of a verified tree: process, choose, append, ask the criteria, go on.

    All rows that have reached a length are served together, and are all that processors and criteria are shown; in step
    these are shown the whole batch, in which rows that have ended are padded, as in plain decoding.
    """

    sampler: Sampler
    tree: DraftTree
    logits: torch.Tensor  # (B, N, V)
    sequences: Sequences
    stopping: Stopping
    recorder: Recorder

    def __post_init__(self) -> None:
        num_rows = len(self.sequences.lengths)
        self.all_rows = range(num_rows)
        self.is_bound = any(type(processor) in BATCH_BOUND for processor in self.sampler.processors)
        self.nodes = {row: 0 for row in self.all_rows if not self.stopping.is_resting(row)}  # where walking rows stand
        self.paths: list[list[int]] = [[] for _ in self.all_rows]
        self.gained: list[list[int]] = [[] for _ in self.all_rows]

    def run(self) -> Accepted:
        """Walk until every row has ended or left its tree; in step, until one has left its tree."""
        children, lengths = self.tree.children(), self.sequences.lengths
        is_walking = bool(self.nodes)
        while is_walking:
            length = min(lengths[row] for row in self.nodes)
            rows = sorted(row for row in self.nodes if lengths[row] == length)
            tokens = self.choose(rows, length)
            self.sequences.append(rows, tokens)
            scores = self.recorder.scores if self.recorder.wants_scores else None
            self.stopping.look(self.sequences, rows, tokens, self.all_rows if self.sampler.in_step else rows, scores)
            num_left = 0
            for row, token in zip(rows, tokens, strict=True):
                node = self.nodes.pop(row)
                self.paths[row].append(node)
                self.gained[row].append(token)
                child = children[row].get((node, token))
                if self.stopping.is_resting(row):
                    continue
                if child is None:
                    num_left += 1
                else:
                    self.nodes[row] = child
            is_walking = bool(self.nodes) and not self.stopping.is_done(self.sequences)
            if self.sampler.in_step and num_left:
                break
        return self._accepted()

    def choose(self, rows: list[int], length: int) -> list[int]:
        """The token that comes next in each of `rows`, which have `length` tokens; the scores are recorded."""
        shown: Sequence[int] = self.all_rows if self.sampler.in_step or self.is_bound else rows
        logits = self._at_nodes(self.logits, shown)
        scores = self.sampler.process(self.prefixes(length, shown), logits.clone())
        walking = set(rows)
        asked = [place for place, row in enumerate(shown) if row in walking]
        if self.recorder.wants_choices:
            self.recorder.add_choice(length - self.sequences.prompt_length, rows, scores[asked], logits[asked])
        if len(asked) < len(shown):  # the others may have nothing left to choose from
            is_asked = torch.tensor([row in walking for row in shown], device=scores.device)
            scores = torch.where(is_asked[:, None], scores, logits)
        picked = self.sampler.pick(scores).tolist()
        return [picked[place] for place in asked]

    def prefixes(self, length: int, rows: Sequence[int]) -> torch.Tensor:
        """What precedes the next token of `rows`, (n, length); rows that are shorter and not asked about are filled."""
        prefixes = self.sequences.at(length, rows)
        is_filled = self.is_bound and not self.sampler.in_step
        return prefixes.clamp(min=0) if is_filled else prefixes  # a padding token of -1 is no index

    def _at_nodes(self, values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Of values (B, N, ...) those at the nodes where `rows` stand, (n, ...)."""
        nodes = [self.nodes.get(row, 0) for row in rows]
        where = torch.tensor([list(rows), nodes], device=values.device)
        return values[where[0], where[1]]

    def _accepted(self) -> Accepted:
        counts = [len(tokens) for tokens in self.gained]
        padded = [[row + [0] * (max(counts) - len(row)) for row in values] for values in (self.paths, self.gained)]
        path, tokens = torch.tensor(padded, device=self.tree.tokens.device)
        return Accepted(path, tokens, Counts(counts))


@dataclass
class _ChosenWalk(_Walk):
    """A walk along choices that are known for all nodes; criteria are still asked token by token."""

    scores: torch.Tensor  # (B, N, V)
    choices: torch.Tensor  # (B, N)

    @cached_property
    def _tokens(self) -> list[list[int]]:
        return self.choices.tolist()

    def choose(self, rows: list[int], length: int) -> list[int]:
        if self.recorder.wants_choices:
            scores, logits = self._at_nodes(self.scores, rows), self._at_nodes(self.logits, rows)
            self.recorder.add_choice(length - self.sequences.prompt_length, rows, scores, logits)
        return [self._tokens[row][self.nodes[row]] for row in rows]
