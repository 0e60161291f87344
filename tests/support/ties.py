"""The rule of ties, for float32 and bfloat16: another token than plain decoding's is right only where rounding chose.

What rounding does is measured, not assumed: plain decoding's logits are compared with those that the same weights give in
float64 for the same text. At the first difference the drafted run's logits must be as near to the float64 logits as plain
decoding's are, and neither run may have seen the two candidates further apart than such errors. Faults in masks or
positions are far larger, and CPUs may round as they like.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from double import doubled
from families import Inputs, Target
from nodes import force
from torch import Tensor

MORE_ERROR = 2.0  # times the largest error of plain decoding's in the row
GAP = 1.0  # times the same


@dataclass(frozen=True)
class Difference:
    """Where a row parts from plain decoding's; logits' errors are root mean squares over the vocabulary."""

    row: int
    step: int
    tokens: tuple[int, int]
    gap: float  # between the two tokens' logits, in the run that saw them further apart
    error: float  # of the run's logits at this step
    rounding: float  # largest error of plain decoding's logits in this row

    @property
    def is_tie(self) -> bool:
        return self.error <= MORE_ERROR * self.rounding and self.gap <= GAP * self.rounding


def differences(target: Target, inputs: Inputs, plain: Any, out: Any) -> list[Difference]:
    """The first difference of every row that has one; what follows it is another text.

    Both outputs hold `logits`, of all steps, before processors.
    """
    num_new = len(plain.logits)
    if torch.equal(plain.sequences, out.sequences):
        return []
    reference = exact_logits(target, inputs, plain.sequences)  # (N, B, V)
    roundings = error(torch.stack(plain.logits), reference)  # (N, B)
    found = []
    for row, (ours, theirs) in enumerate(zip(plain.sequences[:, -num_new:], out.sequences[:, -num_new:], strict=True)):
        if torch.equal(ours, theirs):
            continue
        step = int((ours != theirs).nonzero()[0])
        tokens = int(ours[step]), int(theirs[step])
        gaps = [run.logits[step][row, tokens[0]] - run.logits[step][row, tokens[1]] for run in (plain, out)]
        off = float(error(out.logits[step][row], reference[step, row]))
        gap = max(abs(float(each)) for each in gaps)
        found.append(Difference(row, step, tokens, gap, off, float(roundings[:, row].max())))
    return found


def exact_logits(target: Target, inputs: Inputs, sequences: Tensor) -> Tensor:  # (N, B, V)
    """Logits before each new token of `sequences` (B, P + N), with the target's weights in float64."""
    precise = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    return torch.stack(force(doubled(copy.deepcopy(target)), precise, sequences).logits)


def error(logits: Tensor, reference: Tensor) -> Tensor:  # (...)
    """Root mean square over the vocabulary of logits' (..., V) distance from float64's."""
    return (logits - reference).square().mean(-1).sqrt()


def assert_only_ties(target: Target, inputs: Inputs, plain: Any, out: Any) -> None:
    found = differences(target, inputs, plain, out)
    assert all(each.is_tie for each in found), found
