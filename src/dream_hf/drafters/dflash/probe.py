"""The wiring of a published DFlash checkpoint, found out by asking the target: whoever foretells it best is wired right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..fit import describe_target
from ..probe import NUM_TOKENS, Probe, probe_wirings
from ..published_fields import num_layers_of, read_fields
from ..published_model import placed, refusing
from .loading import VERDICT, load_dflash
from .published import alternatives, read_wiring, renamed


def probe_dflash(
    source: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    target: Any,
    inputs: Sequence[Mapping[str, Any]] | None = None,
    num_tokens: int = NUM_TOKENS,
) -> Probe:
    """Try the wirings that the weights allow, one change at a time from the best one so far, until none does better.

    Args:
        source, config, tensors, target: As for [`load_dflash`].
        inputs (`Sequence[Mapping]`, *optional*): Prompts of one row, as for `generate()`; by default the target writes texts of
            its own.
        num_tokens (`int`): How many tokens of the target's decide.

    Raises:
        ValueError: As [`load_dflash`] and [`probe_wirings`].
    """
    load = partial(load_dflash, source, config, placed(tensors, target), target)  # all drafters share the weights
    with refusing(source, VERDICT):
        fields, ours = read_fields(config), renamed(tensors)
        start = read_wiring(fields, ours, describe_target(target.config))
    others = partial(alternatives, config=fields, num_drafter_layers=num_layers_of(ours), target=target.config)
    return probe_wirings(source, start, others, load, target, inputs, num_tokens)
