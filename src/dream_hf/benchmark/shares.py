"""Where the time goes: in the target's forwards, in the drafter's, or in neither."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..data.prompts import PromptEncoder
from ..decoding import loop as generation
from ..decoding.target_forward import CompiledForwards, Forwards
from ..drafters.dream.drafter import DreamDrafter
from ..drafters.dream.state import CompiledDrafterState, DrafterState
from ..drafters.levels import TargetHead
from .measure import measure, synchronize
from .methods import Method
from .tasks import Prompt

HOOKED_LEVELS = 3  # how deep below the target modules are watched that `generate()` may call by themselves


class OwnerClock:
    """Time by owner, "target" or "drafter". What runs inside a call that is counted belongs to that call's owner."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = {"target": 0.0, "drafter": 0.0}
        self.depth = 0
        self.start = 0.0

    def enter(self, *_: Any) -> None:
        """A call begins."""
        if self.depth == 0:
            synchronize(self.device)
            self.start = time.perf_counter()
        self.depth += 1

    def leave(self, owner: str, *_: Any) -> None:
        """A call of `owner` ends."""
        self.depth -= 1
        if self.depth == 0:
            synchronize(self.device)
            self.seconds[owner] += time.perf_counter() - self.start

    def timed(self, function: Callable, owner: str) -> Callable:
        """`function`, counted for `owner`."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            try:
                return function(*args, **kwargs)
            finally:
                self.leave(owner)

        return call

    def watch(self, module: nn.Module, owner: str) -> list[Any]:
        """Hooks that count a module's calls for `owner`."""
        after = functools.partial(self.leave, owner)
        return [
            module.register_forward_pre_hook(self.enter),
            module.register_forward_hook(lambda *_: after(), always_call=True),
        ]


@contextmanager
def watching(target: Any, assistant: Any = None) -> Iterator[OwnerClock]:
    """Clock the forwards of both models while in the block; `assistant` is what drafts, if anything does."""
    clock = OwnerClock(target.device)
    with ExitStack() as stack:
        if isinstance(assistant, DreamDrafter):
            _watch_functions(stack, clock, target)
        else:
            handles = [
                handle for module in _upper_modules(target, HOOKED_LEVELS) for handle in clock.watch(module, "target")
            ]
            if isinstance(assistant, nn.Module):
                handles += clock.watch(assistant, "drafter")
            for handle in handles:
                stack.callback(handle.remove)
        yield clock


def _watch_functions(stack: ExitStack, clock: OwnerClock, target: Any) -> None:
    """
    Clock what the DREAM loop calls. Hooks on modules would not do: drafters with hooks decode more slowly, and compiled
    forwards have none.

    The target's embedding and head, where the drafter borrows them, are at work for the drafter.
    """

    stack.callback(setattr, generation, "TargetHead", generation.TargetHead)
    generation.TargetHead = clocked_head(lambda function: clock.timed(function, "drafter"))  # type: ignore[assignment, misc]
    owners: list[tuple[type, str, str]] = [
        (Forwards, "__call__", "target"),
        (CompiledForwards, "__call__", "target"),
        (DrafterState, "_forward", "drafter"),
        (CompiledDrafterState, "_compiled_level", "drafter"),
    ]
    for owner_class, name, owner in owners:
        stack.callback(setattr, owner_class, name, vars(owner_class)[name])
        setattr(owner_class, name, clock.timed(function_to_clock(owner_class, name), owner))
    stack.callback(target.__dict__.pop, "_prefill", None)
    target._prefill = clock.timed(target._prefill, "target")


def clocked_head(timed: Callable[[Callable], Callable]) -> Callable[..., TargetHead]:
    """What makes a [`TargetHead`] with both functions put through `timed`, which must name what it wraps."""

    def make(embed: Callable, logits: Callable, *rest: Any, **named: Any) -> TargetHead:
        return TargetHead(timed(embed), timed(logits), *rest, **named)

    return make


def function_to_clock(owner: Any, name: str) -> Callable:
    """A function as it is to be clocked. Compiled levels get the head's own functions: clocks would be compiled along, anew."""
    function: Callable = getattr(owner, name)
    if function is not CompiledDrafterState._compiled_level:
        return function

    @functools.wraps(function)
    def level(state: DrafterState, head: Any, *args: Any) -> Any:
        return function(state, replace(head, embed=head.embed.__wrapped__, logits=head.logits.__wrapped__), *args)

    return level


def time_shares(
    target: Any, encoder: PromptEncoder, method: Method, prompts: Sequence[Prompt], max_new_tokens: int
) -> dict[str, float]:
    """Shares of the greedy decoding time of `prompts`; of runs of their own, because clocking every forward costs time."""
    drafter = method.arguments.get("assistant_model")
    total, spent = 0.0, {"target": 0.0, "drafter": 0.0}
    for prompt in prompts:
        inputs = encoder.encode([(prompt.messages, prompt.images)])
        with (
            method.ready(target, inputs, 0.0, max_new_tokens) as arguments,
            watching(target, drafter) as clock,
        ):
            total += measure(target, inputs, arguments).seconds
        for owner, seconds in clock.seconds.items():
            spent[owner] += seconds
    shares = {owner: seconds / total for owner, seconds in spent.items()}
    return {**shares, "rest": 1.0 - sum(shares.values())}


def _upper_modules(module: nn.Module, levels: int) -> Iterator[nn.Module]:
    yield module
    if levels and not isinstance(module, nn.ModuleList):
        for child in module.children():
            yield from _upper_modules(child, levels - 1)
