"""The wiring of a published EAGLE checkpoint, found out by asking the target: whoever foretells it best is wired right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ..agreement import agreements, write_texts
from ..fit import describe_target
from ..probe import NUM_TOKENS, Probe, Trial, tell
from ..published_fields import read_fields
from .doubts import alternatives
from .drafter import EagleDrafter
from .loading import load_eagle
from .published import Wiring, read_wiring


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
        ValueError: As [`load_eagle`] and [`write_texts`].
    """
    fields, names = read_fields(config), set(tensors)
    start = read_wiring(fields, names, describe_target(target.config)["num_hidden_layers"])
    placed = {  # once, so that all drafters share them
        name: tensor.to(target.device, target.dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }
    load = partial(load_eagle, source, config, placed, target)
    has_pictures = any("pixel_values" in prompt for prompt in inputs or ())
    tried: dict[Wiring, Trial] = {}
    texts = None
    best, previous = start, None
    while best != previous:
        changes = alternatives(best, fields, names, target.config, has_pictures)
        wirings = dict.fromkeys((best, *(replace(best, **change) for change in changes)))
        drafters = _loaded(load, [wiring for wiring in wirings if wiring not in tried])
        texts = texts or write_texts(target, inputs, num_tokens)  # not before something could be loaded
        found = zip(drafters, agreements(target, list(drafters.values()), texts), strict=True)
        tried |= {wiring: Trial(asdict(wiring), _differences(start, wiring), agreement) for wiring, agreement in found}
        best, previous = max(tried, key=lambda wiring: tried[wiring].rank), best
    trials = sorted(tried.values(), key=lambda trial: trial.rank, reverse=True)
    return tell(source, Probe(trials, load(asdict(best))))


def _loaded(load: Callable[[dict[str, Any]], EagleDrafter], wirings: Sequence[Wiring]) -> dict[Wiring, EagleDrafter]:
    """Drafters by wiring, of those that the weights and the target allow.

    Raises:
        ValueError: Not one is allowed; why the first is not.
    """
    drafters: dict[Wiring, EagleDrafter] = {}
    reasons = []
    for wiring in wirings:
        try:
            drafters[wiring] = load(asdict(wiring))
        except ValueError as error:
            reasons.append(error)
    if reasons and not drafters:
        raise reasons[0]
    return drafters


def _differences(start: Wiring, wiring: Wiring) -> dict[str, Any]:
    before = asdict(start)
    return {name: value for name, value in asdict(wiring).items() if value != before[name]}
