"""What comes of asking a target how well a drafter foretells it, wired one way and another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers.utils import logging

from ..decoding.drafter import Drafter
from .agreement import Agreement, agreements, write_texts

logger = logging.get_logger(__name__)

NUM_TOKENS = 200  # of the target's that decide
POOR = 0.3  # of first tokens: below it a drafter gains next to nothing


@dataclass(frozen=True)
class Trial:
    """One wiring that was tried.

    Args:
        wiring (`dict`): All of it, fields of [`Wiring`]; nothing where there is nothing to tell.
        changes (`dict`): Where it differs from what the config says.
        agreement (`Agreement`): How well it foretells the target.
        num_changes (`int`): How many things are different: one may be said by several fields.
    """

    wiring: dict[str, Any]
    changes: dict[str, Any]
    agreement: Agreement
    num_changes: int = 0

    @property
    def rank(self) -> tuple[float, int, float]:
        """What makes a wiring better: tokens that are gained; in a draw fewer changes, then the probability of the target's."""
        return round(self.agreement.gain, 2), -self.num_changes, self.agreement.log_prob


@dataclass(frozen=True)
class Probe:
    """All wirings that were tried, the best first, and the drafter wired that way."""

    trials: list[Trial]
    drafter: Drafter

    @property
    def best(self) -> Trial:
        """The wiring that foretells the target best; the config's where none does better."""
        return self.trials[0]

    @property
    def is_poor(self) -> bool:
        """Whether even the best foretells little."""
        return self.best.agreement.shares[0] < POOR

    def table(self) -> str:
        """A line for each wiring: agreement by levels, tokens a step of a chain, and what differs from the config."""
        levels = range(1, len(self.best.agreement.shares) + 1)
        lines = [" ".join([*(f"level {level}" for level in levels), "tokens/step", " wiring"])]
        for trial in self.trials:
            shares = " ".join(f"{share:7.1%}" for share in trial.agreement.shares)
            changes = ", ".join(f"{name} {value}" for name, value in trial.changes.items()) or "as the config says"
            lines.append(f"{shares} {trial.agreement.gain:11.2f}  {changes}")
        return "\n".join(lines)


def probe_as_it_is(
    source: str,
    drafter: Drafter,
    target: Any,
    inputs: Sequence[Mapping[str, Any]] | None = None,
    num_tokens: int = NUM_TOKENS,
) -> Probe:
    """How well a drafter foretells a target, where there is one way to wire it.

    Raises:
        TypeError: A drafter that has no log-probabilities.
        ValueError: As [`write_texts`].
    """
    [agreement] = agreements(target, [drafter], write_texts(target, inputs, num_tokens))
    return tell(source, Probe([Trial({}, {}, agreement)], drafter))


def tell(source: str, probe: Probe) -> Probe:
    """Log what was found, and warn where even the best is poor."""
    logger.info(f"Wirings of {source!r}:\n{probe.table()}")
    if probe.is_poor:
        logger.warning(
            f"The drafter {source!r} foretells {probe.best.agreement.shares[0]:.0%} of the target's tokens, however it "
            "is wired, and will gain little. Was it made for this very target?"
        )
    return probe


def probe_wirings(
    source: str,
    start: Any,
    alternatives: Callable[[Any], Sequence[Mapping[str, Any]]],
    load: Callable[[Mapping[str, Any]], Drafter],
    target: Any,
    inputs: Sequence[Mapping[str, Any]] | None = None,
    num_tokens: int = NUM_TOKENS,
) -> Probe:
    """Try the wirings that the weights allow, one change at a time from the best one so far, until none does better.

    Args:
        source (`str`): Where the checkpoint comes from, for messages.
        start (`PublishedWiring`): As its config says.
        alternatives (`Callable`): Changes of a wiring that are worth trying.
        load (`Callable`): From a whole wiring, field by field, to a drafter; a `ValueError` where weights or target do not
            allow it.
        target, inputs, num_tokens: As for [`write_texts`].

    Raises:
        ValueError: As [`write_texts`], or as `load` where no wiring is allowed.
    """
    tried: dict[Any, Trial] = {}
    texts = None
    best, previous = start, None
    while best != previous:
        wirings = dict.fromkeys((best, *(replace(best, **change) for change in alternatives(best))))
        drafters = _loaded(load, [wiring for wiring in wirings if wiring not in tried])
        texts = texts or write_texts(target, inputs, num_tokens)  # not before something could be loaded
        num_changes = tried[best].num_changes if best in tried else 0
        for wiring, agreement in zip(drafters, agreements(target, list(drafters.values()), texts), strict=True):
            changes = _differences(start, wiring)
            tried[wiring] = Trial(asdict(wiring), changes, agreement, num_changes + (wiring != best))
        best, previous = max(tried, key=lambda wiring: tried[wiring].rank), best
    trials = sorted(
        tried.values(), key=lambda trial: trial.rank, reverse=True
    )  # the first tried stays so among equals
    return tell(source, Probe(trials, load(asdict(best))))


def _loaded(load: Callable[[Mapping[str, Any]], Drafter], wirings: Sequence[Any]) -> dict[Any, Drafter]:
    """Drafters by wiring, of those that the weights and the target allow.

    Raises:
        ValueError: Not one is allowed; why the first is not.
    """
    drafters: dict[Any, Drafter] = {}
    reasons = []
    for wiring in wirings:
        try:
            drafters[wiring] = load(asdict(wiring))
        except ValueError as error:
            reasons.append(error)
    if reasons and not drafters:
        raise reasons[0]
    return drafters


def _differences(start: Any, wiring: Any) -> dict[str, Any]:
    before = asdict(start)
    return {name: value for name, value in asdict(wiring).items() if value != before[name]}
