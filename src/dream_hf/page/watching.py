"""A drafter whose steps are told: the tree that was drafted, and what the target kept of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..decoding.drafter import Drafter, DrafterAround, DraftSession, Prefill, Verified
from ..decoding.settings import DraftSettings
from ..decoding.tree import DraftTree


@dataclass(frozen=True)
class Step:
    """
    One step of the first row.

    Args:
        tokens (`list[int]`): Token of every node of the tree, the root first; that alone where nothing was drafted.
        parents (`list[int]`): Each node's parent; the root is its own.
        gained (`list[int]`): Tokens gained: those of the accepted path below the root, and one of the target's own.
    """

    tokens: list[int]
    parents: list[int]
    gained: list[int]

    @property
    def path(self) -> list[int]:
        """The nodes that were kept, from the root on."""
        children: dict[tuple[int, int], int] = {}
        for node in range(1, len(self.tokens)):
            children.setdefault((self.parents[node], self.tokens[node]), node)
        kept = [0]
        for token in self.gained[:-1]:
            if (kept[-1], token) not in children:  # the text was cut short
                break
            kept.append(children[kept[-1], token])
        return kept


class WatchedDrafter(DrafterAround):
    """
    Another drafter, whose every step is told to a listener.

    Args:
        drafter (`Drafter`): The other; shared, not copied.
        listener (`Callable`): Gets each [`Step`], in the thread that decodes. What it raises ends the decoding.
    """

    def __init__(self, drafter: Drafter, listener: Callable[[Step], None]):
        super().__init__(drafter)
        self.listener = listener

    def start(self, prefill: Prefill, settings: DraftSettings) -> DraftSession:
        return _WatchedSession(super().start(prefill, settings), self.listener, int(prefill.first_tokens[0, 0]))


class _WatchedSession(DraftSession):
    def __init__(self, session: DraftSession, listener: Callable[[Step], None], root: int):
        self.session, self.listener = session, listener
        self.root = root
        self.tree: DraftTree | None = None

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        self.tree = self.session.draft(root_tokens, max_depth)
        return self.tree

    def read(self, verified: Verified) -> None:
        self.session.read(verified)
        gained = verified.tokens[0, : verified.counts[0]].tolist()
        tree, self.tree = self.tree, None
        tokens, parents = ([self.root], [0]) if tree is None else (tree.tokens[0].tolist(), tree.parents[0].tolist())
        self.root = gained[-1] if gained else self.root
        self.listener(Step(tokens, parents, gained))

    def suspend(self) -> DraftSession | None:
        return self.session.suspend()

    def close(self) -> None:
        self.session.close()
