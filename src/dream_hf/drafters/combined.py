"""`CombinedDrafter`: one tree out of what several drafters suggest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..decoding.draft_schedule import DraftSchedule
from ..decoding.drafter import Drafter, DraftSession, Needs, Prefill, Verified
from ..decoding.settings import DraftSettings
from ..decoding.tree import DraftTree
from ..runtime.phases import GROWTH, phase
from .best_first import tree_of
from .opinions import Opinion, Panel, agreed_nodes, opinions_of, reach

WORTH_ASKING = 2.0  # times the least probability of a node: what must be left for others


class CombinedDrafter(Drafter):
    """Asks several drafters and verifies the best nodes of all their trees, within one budget.

    What drafters agree on is verified once. The probabilities of the drafter that has been right most often in this text count
    as they are, at first those of the last one; the others share what it leaves, and are not asked where that is too little for
    a node.

    Args:
        drafters (`Sequence[Drafter]`): Whom to ask.
        settings (`DraftSettings`, *optional*): Of the one tree; by default those of the last drafter, without its pauses. Each
            drafter drafts and pauses by its own, and drafts nothing below this one's `tree_min_node_probability`.

    Raises:
        ValueError: No drafter at all.
        TypeError: Something that is none.
    """

    def __init__(self, drafters: Sequence[Drafter], settings: DraftSettings | None = None):
        self.drafters = list(drafters)
        if not self.drafters:
            raise ValueError("`drafters` is empty; name one or more.")
        wrong = next((drafter for drafter in self.drafters if not isinstance(drafter, Drafter)), None)
        if wrong is not None:
            raise TypeError(f"`drafters` has a `{type(wrong).__name__}`, which is no drafter.")
        self._settings = settings

    @property
    def settings(self) -> DraftSettings:
        return self._settings or self.drafters[-1].settings.changed(pause_below=0.0)

    @property
    def needs(self) -> Needs:
        """What any of them needs."""
        all_needs = [drafter.needs for drafter in self.drafters]
        flags = {name: any(getattr(needs, name) for needs in all_needs) for name in _FLAGS}
        layers = tuple(dict.fromkeys(layer for needs in all_needs for layer in needs.layers))
        return Needs(layers=layers, num_likeliest=max(needs.num_likeliest for needs in all_needs), **flags)

    def check(self, target: Any, settings: DraftSettings) -> None:
        """Refuse what any of them refuses."""
        for drafter in self.drafters:
            drafter.check(target, drafter.settings)

    def start(self, prefill: Prefill, settings: DraftSettings) -> CombinedSession:
        return CombinedSession(self, prefill, settings)


_FLAGS = [each.name for each in fields(Needs) if each.type == "bool"]


@dataclass(frozen=True)
class Paused(DraftSession):
    """What an earlier turn left: the sessions that can go on, by drafter, and what was thought of all."""

    drafter: CombinedDrafter
    sessions: list[DraftSession | None]
    panels: list[Panel]


class CombinedSession(DraftSession):
    """The sessions of all drafters, and what is thought of them in each row."""

    def __init__(self, drafter: CombinedDrafter, prefill: Prefill, settings: DraftSettings):
        self.drafter, self.settings, self.end_ids = drafter, settings, prefill.end_ids
        self.budget = settings.changed(tree_min_level_probability=0.0)  # levels were left out by each drafter's own
        self.needs, self.layers = [part.needs for part in drafter.drafters], drafter.needs.layers
        earlier, num_drafters = prefill.earlier, len(drafter.drafters)
        if not isinstance(earlier, Paused) or earlier.drafter is not drafter:
            panels = [Panel(num_drafters) for _ in prefill.first_tokens]
            earlier = Paused(drafter, [None] * num_drafters, panels)
        self.panels = earlier.panels
        self.schedules = [DraftSchedule(part.settings.pause_below) for part in drafter.drafters]
        self.asked: dict[int, list[Opinion]] = {}  # what was thought below the last tokens, of each row
        self.sessions = [
            self._start(part, needs, replace(prefill, earlier=session))
            for part, needs, session in zip(drafter.drafters, self.needs, earlier.sessions, strict=True)
        ]

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        depth = self.settings.tree_depth if max_depth is None else min(self.settings.tree_depth, max_depth)
        asked: dict[int, list[Opinion]] = {}
        self.asked, tree = asked, DraftTree.chain(root_tokens)
        for place in self._by_trust():
            schedule = self.schedules[place]
            if schedule.is_paused:
                continue
            most = depth if schedule.max_depth is None else min(depth, schedule.max_depth)
            tree = self.sessions[place].draft(root_tokens, most)
            asked[place] = opinions_of(tree)
            room = max(opinion.room(depth, self.end_ids) for opinion in asked[place])
            if room < WORTH_ASKING * self.settings.tree_min_node_probability:
                break
        if len(asked) <= 1 and tree.num_nodes <= self.settings.tree_size:
            return tree
        with phase(GROWTH):
            rows = [
                agreed_nodes(opinions, self.budget, depth, self.end_ids)
                for opinions in zip(*asked.values(), strict=True)
            ]
            return tree_of(root_tokens, rows)

    def read(self, verified: Verified) -> None:
        self._judge([tokens[:count] for tokens, count in zip(verified.tokens.tolist(), verified.counts, strict=True)])
        for needs, session in zip(self.needs, self.sessions, strict=True):
            likeliest = None if verified.likeliest is None else verified.likeliest[..., : needs.num_likeliest]
            features = self._part(verified.features, needs)
            session.read(replace(verified, features=features, likeliest=likeliest))

    def _judge(self, gained: list[list[int]]) -> None:
        """Take note of how right those were who were asked, of what was gained in each row."""
        asked, self.asked = self.asked, {}
        for row, (panel, tokens) in enumerate(zip(self.panels, gained, strict=True)):
            panel.judge({place: opinions[row] for place, opinions in asked.items()}, tokens)
        for place, schedule in enumerate(self.schedules):
            if place in asked:
                rows = [(opinion, tokens) for opinion, tokens in zip(asked[place], gained, strict=True) if tokens]
                if rows:  # what it would have gained alone
                    schedule.note([min(reach(opinion, tokens) + 1, len(tokens)) for opinion, tokens in rows])
            elif schedule.is_paused:
                schedule.note(())

    def suspend(self) -> Paused | None:
        sessions = [session.suspend() for session in self.sessions]
        return (
            Paused(self.drafter, sessions, self.panels) if any(session is not None for session in sessions) else None
        )

    def close(self) -> None:
        for session in self.sessions:
            session.close()

    def _by_trust(self) -> list[int]:
        """The places of the drafters, the one that all rows together trust most first."""
        trust = [sum(of_rows) for of_rows in zip(*(panel.trust for panel in self.panels), strict=True)]
        return sorted(range(len(trust)), key=trust.__getitem__, reverse=True)

    def _start(self, drafter: Drafter, needs: Needs, prefill: Prefill) -> DraftSession:
        """One drafter's session, which drafts nothing that the tree has no use for."""
        own = drafter.settings
        least = max(own.tree_min_node_probability, self.settings.tree_min_node_probability)
        prefill = replace(prefill, features=self._part(prefill.features, needs))
        return drafter.start(prefill, own.changed(tree_min_node_probability=least))

    def _part(self, features: torch.Tensor | None, needs: Needs) -> torch.Tensor | None:
        """Of the features (B, T, layers * H) of all layers those that one drafter needs."""
        if features is None or not needs.layers:
            return None
        if needs.layers == self.layers:
            return features
        parts = features.chunk(len(self.layers), dim=-1)
        return torch.cat([parts[self.layers.index(layer)] for layer in needs.layers], dim=-1)
