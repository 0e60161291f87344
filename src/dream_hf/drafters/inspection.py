"""What a drafter says, asked for directly: `draft_log_probs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..decoding.drafter import Drafter, DrafterAround, DraftSession, Prefill, Verified
from ..decoding.settings import DraftSettings
from ..decoding.tree import DraftTree
from ..targets.target import Target


def draft_log_probs(
    target: Any, drafter: Drafter, inputs: Mapping[str, Any], first_token: int, path: Sequence[int] = ()
) -> torch.Tensor:
    """What a drafter says below a prompt and the token after it, and then along `path`, drafted on its own features.

    Args:
        target (`PreTrainedModel`): The target.
        drafter (`Drafter`): A drafter that grows trees level by level.
        inputs (`Mapping`): A prompt of one row, as for `generate()`.
        first_token (`int`): The token after the prompt.
        path (`Sequence[int]`): The tokens after that one.

    Returns:
        `torch.Tensor` of shape `(len(path) + 1, V)`: Log-probabilities, relative to what the drafter may draft; -inf for all
        other tokens. The first row is of what follows `first_token`.

    Raises:
        TypeError: A drafter that has no log-probabilities.
        ValueError: More than one row, or tokens that the target does not have.
    """
    input_ids, vocab_size = inputs["input_ids"], Target(target).text_config.vocab_size
    if input_ids.shape[0] != 1:
        raise ValueError(f"`inputs` has {input_ids.shape[0]} rows; pass one.")
    first_token, path = int(first_token), [int(token) for token in path]
    for token in (first_token, *path):
        if not 0 <= token < vocab_size:
            raise ValueError(f"`first_token` and `path` must lie in [0, {vocab_size}); one of them is {token}.")
    asking = _Asking(drafter, first_token, path, vocab_size)
    # The drafter is asked when the target has read the prompt, which must not end with the very first token.
    target.generate(**inputs, assistant_model=asking, max_new_tokens=2, min_new_tokens=2, do_sample=False, num_beams=1)
    assert asking.answer is not None
    return asking.answer


class _Asking(DrafterAround):
    """A drafter that is asked one question and drafts nothing."""

    def __init__(self, drafter: Drafter, first_token: int, path: list[int], vocab_size: int):
        super().__init__(drafter)
        self.first_token, self.path, self.vocab_size = first_token, path, vocab_size
        self.answer: torch.Tensor | None = None

    def start(self, prefill: Prefill, settings: DraftSettings) -> DraftSession:
        first_tokens = torch.full_like(prefill.first_tokens, self.first_token)
        session = self.inner.start(replace(prefill, first_tokens=first_tokens), settings)
        self.answer = log_probs_along(session, self.path, self.vocab_size)
        return _Silent()


class _Silent(DraftSession):
    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        return DraftTree.chain(root_tokens)

    def read(self, verified: Verified) -> None:
        pass


def log_probs_along(session: Any, path: list[int], vocab_size: int) -> torch.Tensor:
    """What a session says below the last token and along `path`, (len(path) + 1, V), as [`draft_log_probs`] gives it.

    Raises:
        TypeError: It has no log-probabilities.
    """
    if getattr(session, "levels", None) is None:
        raise TypeError(f"`{type(session).__name__}` does not grow trees by levels, so it has no log-probabilities.")
    levels = session.levels()
    ids = levels.head.token_ids
    num_drafted = vocab_size if ids is None else len(ids)
    level = levels.first_level(len(path) + 1, num_drafted)
    found = [level]
    for depth, token in enumerate(path, start=1):
        place = torch.full_like(level.best_tokens[:, :1], token)  # whether the drafter would have drafted it or not
        level = level._replace(best_tokens=place, best_scores=torch.zeros_like(level.best_scores[:, :1]))
        level = levels.next_level(level, [0], depth, num_drafted)
        found.append(level)
    levels.forget_levels()
    answer = torch.full((len(found), vocab_size), -torch.inf, device=level.scores.device)
    for row, level in enumerate(found):
        answer[row, level.tokens[0]] = level.scores[0].float()
    return answer
