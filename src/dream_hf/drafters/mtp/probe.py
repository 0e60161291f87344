"""How an MTP head is wired, found out by asking the target: whoever foretells it best is wired right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from ..agreement import agreements, write_texts
from ..probe import NUM_TOKENS, Probe, Trial, tell
from .drafter import WIRINGS, MTPDrafter


def probe_mtp(
    source: str,
    drafter: MTPDrafter,
    target: Any,
    inputs: Sequence[Mapping[str, Any]] | None = None,
    num_tokens: int = NUM_TOKENS,
) -> Probe:
    """Try all ways to wire a head; text alone is the same in all of them, so that they are tried on pictures only.

    Args:
        source (`str`): Where it comes from, for messages.
        drafter (`MTPDrafter`): The head as it is wired by default.
        target, inputs, num_tokens: As for [`probe_drafter`].

    Raises:
        ValueError: As [`write_texts`].
    """
    wirings = [drafter.wiring]
    if any("pixel_values" in prompt for prompt in inputs or ()):
        found = (dict(zip(WIRINGS, values, strict=True)) for values in product(*WIRINGS.values()))
        wirings += [wiring for wiring in found if wiring != drafter.wiring]
    drafters = [drafter.with_wiring(**wiring) for wiring in wirings]
    trials = []
    for wiring, agreement in zip(
        wirings, agreements(target, drafters, write_texts(target, inputs, num_tokens)), strict=True
    ):
        changes = {name: value for name, value in wiring.items() if value != drafter.wiring[name]}
        trials.append(Trial(wiring, changes, agreement, len(changes)))
    trials.sort(key=lambda trial: trial.rank, reverse=True)  # what was tried first stays first among equals
    return tell(source, Probe(trials, drafter.with_wiring(**trials[0].wiring)))
