"""`MTPDrafter`: the head that a target's checkpoint carries beside the target, passed to `generate(assistant_model=...)`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel

from ...decoding.drafter import Drafter, Needs, Prefill
from ...decoding.settings import DraftSettings
from ...targets.attending_layer import AttendingLayer
from ..fit import check_identity, check_place, check_top_k, check_weights, describe_target
from ..vocabulary import sorted_token_ids
from .modeling import MTPModel
from .session import MTPSession

WIRINGS = {"image_rows": ("merged", "token"), "row_positions": ("feature", "token")}  # the first is the default


class MTPDrafter(MTPModel, Drafter):
    """Drafts with a multi-token prediction head: `load_drafter` reads it out of the target's own checkpoint. No training.

    It reads the target's features after the final norm, and has one layer of the target's family, which attends; embedding and
    head are the target's. Below the first level it reads what it made itself. Its forwards are not compiled, whatever `compile`
    says; the target's are.

    Args:
        parts (`AttendingLayer`): What its layer is made of.
        target (`Mapping`): The target, as `describe_target` describes it.
        wiring (`Mapping`, *optional*): What no checkpoint says. `image_rows` is what is read where a token stands for a piece
            of a picture: `"merged"`, what the target's towers made of it, or `"token"`, the embedding of the placeholder.
            `row_positions` is where rows stand: at the position of their `"feature"` or of their `"token"`, which differ by
            more than one beside pictures.
        settings (`DraftSettings`, *optional*): How to draft.
    """

    def __init__(
        self,
        parts: AttendingLayer,
        target: Mapping[str, Any],
        wiring: Mapping[str, str] | None = None,
        settings: DraftSettings | None = None,
    ):
        super().__init__(parts)
        self.wiring, self.config.target = wired(wiring or {}), dict(target)
        for name, value in asdict(settings or DraftSettings()).items():
            setattr(self.config, name, value)

    @property
    def settings(self) -> DraftSettings:
        """As its config says."""
        return DraftSettings.of(self.config)

    @property
    def needs(self) -> Needs:
        """The last features; positions and pictures as they entered the target."""
        return Needs(layers=(-1,), embeds=self.wiring["image_rows"] == "merged", positions=self.has_planes)

    def check(self, target: PreTrainedModel, settings: DraftSettings) -> None:
        """Refuse another target, settings beyond its vocabulary, and damaged weights."""
        drafter: Any = self
        check_identity(drafter, describe_target(target.config))
        if self.draft_token_ids is None:
            check_top_k(settings, self.config.vocab_size, "the target's `vocab_size`")
        else:
            check_top_k(settings, len(self.draft_token_ids), "the number of tokens in `draft_token_ids`")
        check_weights(drafter)
        check_place(target, drafter)

    def start(self, prefill: Prefill, settings: DraftSettings) -> MTPSession:
        """Read a prompt with the target's features."""
        return MTPSession(self, prefill, settings)

    def with_wiring(self, **wiring: str) -> MTPDrafter:
        """The same drafter, its weights shared, wired in another way."""
        other = copy.copy(self)
        other.wiring = wired({**self.wiring, **wiring})
        return other

    def set_draft_vocabulary(self, token_ids: Sequence[int] | torch.Tensor | None) -> None:
        """Draft these tokens only from now on, with those rows of the target's head, as [`DreamDrafter.set_draft_vocabulary`].

        The head is most of what a level reads.

        Args:
            token_ids (`Sequence[int]` or `torch.LongTensor` of shape `(R,)`, *optional*): The tokens, in any order, as
                `choose_draft_vocabulary` chooses them; `None` for the whole vocabulary again.

        Raises:
            ValueError: No whole numbers, none at all, repeats, or tokens that the target does not have.
        """
        vocab_size = self.config.vocab_size
        self.draft_token_ids = None if token_ids is None else sorted_token_ids(token_ids, vocab_size).to(self.device)


def wired(wiring: Mapping[str, Any]) -> dict[str, str]:
    """All that can be said of how a head is wired, by default what vLLM does.

    Raises:
        ValueError: A name or a value that is none of `WIRINGS`.
    """
    if unknown := sorted(wiring.keys() - WIRINGS.keys()):
        raise ValueError(
            f"`wiring` names {', '.join(unknown)}; what can be said of an MTP head is {', '.join(WIRINGS)}."
        )
    for name, value in wiring.items():
        if value not in WIRINGS[name]:
            raise ValueError(f"`{name}` ({value!r}) must be one of {', '.join(WIRINGS[name])}.")
    return {name: wiring.get(name, values[0]) for name, values in WIRINGS.items()}
