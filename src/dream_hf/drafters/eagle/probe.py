"""The wiring of a published EAGLE checkpoint, found out by asking the target: whoever foretells it best is wired right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..fit import describe_target
from ..probe import NUM_TOKENS, Probe, probe_wirings
from ..published_fields import read_fields
from ..published_model import placed
from .doubts import alternatives
from .loading import load_eagle
from .published import read_wiring


def probe_eagle(
    source: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    target: Any,
    inputs: Sequence[Mapping[str, Any]] | None = None,
    num_tokens: int = NUM_TOKENS,
) -> Probe:
    """Try the wirings that the weights allow, one change at a time from the best one so far, until none does better.

    Args:
        source, config, tensors, target: As for [`load_eagle`].
        inputs (`Sequence[Mapping]`, *optional*): Prompts of one row, as for `generate()`. What is read of pictures can be told
            by prompts with pictures only. By default the target writes texts of its own.
        num_tokens (`int`): How many tokens of the target's decide.

    Raises:
        ValueError: As [`load_eagle`] and [`probe_wirings`].
    """
    fields, names = read_fields(config), set(tensors)
    start = read_wiring(fields, names, describe_target(target.config)["num_hidden_layers"])
    has_pictures = any("pixel_values" in prompt for prompt in inputs or ())
    load = partial(load_eagle, source, config, placed(tensors, target), target)  # all drafters share the weights
    others = partial(alternatives, config=fields, names=names, target_config=target.config, has_pictures=has_pictures)
    return probe_wirings(source, start, others, load, target, inputs, num_tokens)
