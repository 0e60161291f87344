"""A drafter of random legal trees: what it drafts is no drafter's work, and the output has to be right all the same."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from dream_hf.decoding.drafter import Drafter, DraftSession, Prefill, Verified
from dream_hf.decoding.settings import DraftSettings
from dream_hf.decoding.tree import DraftTree


class FuzzDrafter(Drafter):
    """Trees with repeated siblings, rows with nothing, levels beyond the room that is left and end tokens in the middle.

    Args:
        token_ids: what is drawn from; no picture's placeholders, which a target may take for pictures.
        truth: (B, length) what the target will write; some drafted tokens are taken from it, so that paths get accepted.
        favourites: tokens that are drawn often: ends above all.
        seed: of everything.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        truth: Tensor | None = None,
        favourites: Sequence[int] = (),
        seed: int = 0,
        settings: DraftSettings | None = None,
    ):
        self.token_ids, self.favourites, self.seed = list(token_ids), list(favourites), seed
        self.truth = None if truth is None else truth.tolist()
        self._settings = settings or DraftSettings(tree_depth=7, tree_size=13)
        self.num_drafts = 0

    @property
    def settings(self) -> DraftSettings:
        return self._settings

    def start(self, prefill: Prefill, settings: DraftSettings) -> FuzzSession:
        return FuzzSession(self, prefill, settings)


class FuzzSession(DraftSession):
    """Knows how long each row is, and nothing else."""

    def __init__(self, drafter: FuzzDrafter, prefill: Prefill, settings: DraftSettings):
        self.drafter, self.settings = drafter, settings
        self.random = random.Random(drafter.seed)
        self.lengths = [prefill.token_ids.shape[1] + 1] * len(prefill.first_tokens)

    def draft(self, root_tokens: Tensor, max_depth: int | None = None) -> DraftTree:
        self.drafter.num_drafts += 1
        num_nodes = self.random.randint(1, self.settings.tree_size)
        rows = [self._row(row, token, num_nodes) for row, token in enumerate(root_tokens[:, 0].tolist())]
        tokens, parents = (torch.tensor(part, device=root_tokens.device) for part in zip(*rows, strict=True))
        return DraftTree.from_parents(tokens, parents, num_nodes)

    def read(self, verified: Verified) -> None:
        self.lengths = [length + count for length, count in zip(self.lengths, verified.counts, strict=True)]

    def suspend(self) -> FuzzSession:
        return self

    def _row(self, row: int, root: int, num_nodes: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of the root and `num_nodes` nodes."""
        if self.random.random() < 0.15:  # nothing
            return [root] * (num_nodes + 1), [0] * (num_nodes + 1)
        is_chain = self.random.random() < 0.3
        tokens, parents, depths = [root], [0], [0]
        for node in range(1, num_nodes + 1):
            parent = node - 1 if is_chain else self.random.randrange(node)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            tokens.append(self._token(row, depths[node], tokens))
        return tokens, parents

    def _token(self, row: int, depth: int, others: list[int]) -> int:
        chance, place = self.random.random(), self.lengths[row] + depth - 1
        truth = self.drafter.truth
        if truth is not None and chance < 0.7 and place < len(truth[row]):
            return truth[row][place]
        if chance < 0.8:
            return self.random.choice(others)
        if chance < 0.9 and self.drafter.favourites:
            return self.random.choice(self.drafter.favourites)
        return self.random.choice(self.drafter.token_ids)
