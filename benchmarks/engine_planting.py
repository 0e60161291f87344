"""Simulated acceptance: the true continuation, planted in drafted trees with given probabilities.

Weights drawn at random say nothing that could be predicted. So the tree is drafted as always and then some of its tokens
are replaced: along one path from the root, as far as this step is meant to get, by what the target will say; and wherever
else the drafter happened to guess right, by a token the target will not say. Shape and cost of the step stay what they are.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from dream_hf.benchmark.measure import synchronize
from dream_hf.decoding.drafter import Drafter, DrafterAround, DraftSession, Prefill, Verified
from dream_hf.decoding.settings import DraftSettings
from dream_hf.decoding.tree import DraftTree
from dream_hf.runtime.phases import phase

PLANTING = "planting"  # a phase that only this benchmark has


def accept_probability(tau: float, depth: int) -> float:
    """The probability p of accepting one more token with 1 + p + p^2 + ... + p^depth = tau, bonus included."""
    if not 1 <= tau <= depth + 1:
        raise ValueError(
            f"`tau` ({tau}) must lie between 1 and {depth + 1}, the most a tree of depth {depth} can gain."
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        expected = sum(middle**level for level in range(depth + 1))
        low, high = (middle, high) if expected < tau else (low, middle)
    return (low + high) / 2


def make_plan(tau: float, depth: int, num_tokens: int, batch: int, seed: int = 0) -> Tensor:
    """How many drafted tokens each step accepts, (batch, steps).

    A token is accepted with the same probability at every depth (if its parent was), such that a step gains `tau` tokens
    in expectation. Draws are stratified, and set right by single tokens, so that every row gains `num_tokens` tokens in
    all, bonus tokens included: rows differ in their order only, and end together.
    """
    num_steps = max(round(num_tokens / tau), 1)
    if not num_steps <= num_tokens <= num_steps * (depth + 1):
        raise ValueError(
            f"`num_tokens` ({num_tokens}) cannot be gained in {num_steps} steps of a tree of depth {depth}."
        )
    probability = accept_probability(tau, depth)
    draws = (torch.arange(num_steps) + 0.5) / num_steps
    reached = probability ** torch.arange(1, depth + 1)
    accepted = (draws[:, None] < reached).sum(-1)
    generator = torch.Generator().manual_seed(seed)
    while (missing := num_tokens - num_steps - int(accepted.sum())) != 0:
        is_open = accepted < depth if missing > 0 else accepted > 0
        step = torch.multinomial(is_open.float(), 1, generator=generator)
        accepted[step] += 1 if missing > 0 else -1
    return torch.stack([accepted[torch.randperm(num_steps, generator=generator)] for _ in range(batch)])


def plant(tree: DraftTree, continuation: Tensor, accepted: Tensor, vocab_size: int) -> DraftTree:
    """The tree such that the target accepts `accepted` (B,) drafted tokens of each row.

    Args:
        tree (`DraftTree`): As drafted; only its tokens change.
        continuation (`torch.LongTensor` of shape `(B, depth + 1)`): The root's token and what follows it.
        accepted (`torch.LongTensor` of shape `(B,)`): How far the target is to follow.
        vocab_size (`int`): For a token that is not the true one.
    """
    rows = torch.arange(tree.tokens.shape[0], device=tree.tokens.device)
    path = tree.ancestors[rows, tree.depths.argmax(-1)]  # to one of the deepest nodes
    is_planted = path & (tree.depths <= accepted[:, None])
    truth = continuation.gather(1, tree.depths)
    others = torch.where(tree.tokens == truth, (truth + 1) % vocab_size, tree.tokens)
    tokens = torch.where(is_planted, truth, others)
    return DraftTree(tokens, tree.parents, tree.depths, tree.ancestors, tree.max_depth)


class PlantingDrafter(DrafterAround):
    """Lets drafts be accepted as planned in one call of `generate()`, the one that generates `texts` anew.

    Args:
        drafter (`Drafter`): Drafts, and reads what is gained.
        texts (`torch.LongTensor` of shape `(B, length)`): The prompts and their greedy continuations.
        prompt_length (`int`): Tokens of a prompt.
        plan (`torch.LongTensor` of shape `(B, steps)`): From [`make_plan`].
        num_skipped (`int`): Steps before `started_at`.
    """

    def __init__(self, drafter: Drafter, texts: Tensor, prompt_length: int, plan: Tensor, num_skipped: int = 0):
        super().__init__(drafter)
        if drafter.settings.pause_below:
            raise ValueError(
                f"`pause_below` ({drafter.settings.pause_below}) must be 0: in a pause steps are taken that are not planned."
            )
        gained = plan + 1
        roots = prompt_length + gained.cumsum(-1) - gained  # (B, steps); the first one comes out of the prefill
        steps = torch.arange(drafter.settings.tree_depth + 1)
        ahead = (roots[..., None] + steps).clamp(max=texts.shape[1] - 1).to(texts.device)
        rows = torch.arange(texts.shape[0], device=texts.device)[:, None, None]
        self.continuations = texts[rows, ahead].transpose(0, 1).contiguous()  # (steps, B, depth + 1)
        self.accepted = plan.T.contiguous().to(texts.device)
        self.num_skipped = num_skipped
        self.num_steps = 0
        self.started_at = 0.0  # when the device had done all before step `num_skipped`

    def start(self, prefill: Prefill, settings: DraftSettings) -> DraftSession:
        vocab_size = prefill.target.text_config.vocab_size
        return _PlantingSession(self, super().start(prefill, settings), vocab_size)


class _PlantingSession(DraftSession):
    """A session of a [`PlantingDrafter`], around one that drafts."""

    def __init__(self, planting: PlantingDrafter, inner: DraftSession, vocab_size: int):
        self.planting, self.inner, self.vocab_size = planting, inner, vocab_size
        self.ahead: tuple[DraftTree, DraftTree] | None = None  # as drafted and as planted, before it is asked for

    def draft(self, root_tokens: Tensor, max_depth: int | None = None) -> DraftTree:
        ahead, self.ahead = self.ahead, None
        if ahead is None:
            self._begin_step(root_tokens.device)
        tree = self.inner.draft(root_tokens)  # a whole one, also where the text ends soon
        return ahead[1] if ahead is not None and tree is ahead[0] else self._plant(tree)

    def _begin_step(self, device: torch.device) -> None:
        planting = self.planting
        if planting.num_steps == planting.num_skipped:
            synchronize(device)
            planting.started_at = time.perf_counter()
        planting.num_steps += 1

    def _plant(self, tree: DraftTree) -> DraftTree:
        planting, step = self.planting, self.planting.num_steps - 1
        if step >= len(planting.accepted):  # some step was accepted less far than planned, which the caller will see
            return tree
        with phase(PLANTING):
            return plant(tree, planting.continuations[step], planting.accepted[step], self.vocab_size)

    def read(self, verified: Verified) -> None:
        self.inner.read(verified)

    @property
    def looks_ahead(self) -> bool:
        return self.inner.looks_ahead

    def look_ahead(self, tokens: Tensor, features: Tensor, counts: Tensor) -> DraftTree:
        self._begin_step(tokens.device)
        drafted = self.inner.look_ahead(tokens, features, counts)
        self.ahead = drafted, self._plant(drafted)
        return self.ahead[1]
