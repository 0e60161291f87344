"""`MTPDrafter`: the head that a target's checkpoint carries beside the target, passed to `generate(assistant_model=...)`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from ...decoding.drafter import Drafter, Needs, Prefill
from ...decoding.settings import DraftSettings
from ...targets.attending_layer import AttendingLayer
from ..fit import check_identity, check_place, check_top_k, check_weights, describe_target
from ..paired_session import PairedSession
from .modeling import MTPModel

IMAGE_ROWS = ("merged", "token")


class MTPDrafter(MTPModel, Drafter):
    """Drafts with a multi-token prediction head: `load_drafter` reads it out of the target's own checkpoint. No training.

    It reads the target's features after the final norm, and has one layer of the target's family, which attends; embedding and
    head are the target's. Below the first level it reads what it made itself. Its forwards are not compiled, whatever `compile`
    says; the target's are.

    Args:
        parts (`AttendingLayer`): What its layer is made of.
        target (`Mapping`): The target, as `describe_target` describes it.
        image_rows (`str`): What is read where a token stands for a piece of a picture. `"merged"`: what the target's towers
            made of that piece. `"token"`: the embedding of the placeholder.
        settings (`DraftSettings`, *optional*): How to draft.
    """

    def __init__(
        self,
        parts: AttendingLayer,
        target: Mapping[str, Any],
        image_rows: str = "merged",
        settings: DraftSettings | None = None,
    ):
        super().__init__(parts)
        if image_rows not in IMAGE_ROWS:
            raise ValueError(f"`image_rows` ({image_rows!r}) must be one of {', '.join(IMAGE_ROWS)}.")
        self.image_rows, self.config.target = image_rows, dict(target)
        for name, value in asdict(settings or DraftSettings()).items():
            setattr(self.config, name, value)

    @property
    def settings(self) -> DraftSettings:
        """As its config says."""
        return DraftSettings.of(self.config)

    @property
    def needs(self) -> Needs:
        """The last features; positions and pictures as they entered the target."""
        return Needs(layers=(-1,), embeds=self.image_rows == "merged", positions=self.has_planes)

    def check(self, target: PreTrainedModel, settings: DraftSettings) -> None:
        """Refuse another target, settings beyond its vocabulary, and damaged weights."""
        drafter: Any = self
        check_identity(drafter, describe_target(target.config))
        check_top_k(settings, self.config.vocab_size, "the target's `vocab_size`")
        check_weights(drafter)
        check_place(target, drafter)

    def start(self, prefill: Prefill, settings: DraftSettings) -> PairedSession:
        """Read a prompt with the target's features."""
        return PairedSession(self, prefill, settings)
