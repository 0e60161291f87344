"""`DFlashDrafter`: a published DFlash drafter, passed to `generate(assistant_model=...)`."""

from __future__ import annotations

from transformers.modeling_utils import PreTrainedModel

from ...decoding.drafter import Drafter, Needs, Prefill
from ...decoding.settings import DraftSettings
from ..fit import check_place, check_reading, check_weights, describe_target
from .modeling import DFlashModel
from .session import DFlashSession


class DFlashDrafter(DFlashModel, Drafter):
    """Drafts the tokens of a whole block in one forward (DFlash, arXiv 2602.06036), and the best tree of what they may be.

    It reads the target's features of some layers; embedding and head are its own or the target's. A tree is as deep as a block
    at most, whatever `tree_depth` says. Its forwards are not compiled, whatever `compile` says; the target's are.
    """

    @property
    def settings(self) -> DraftSettings:
        """As its config says."""
        return DraftSettings.of(self.config)

    @property
    def needs(self) -> Needs:
        """The features of its layers."""
        return Needs(layers=self.config.layers_of((self.config.target or {}).get("num_hidden_layers", 0)))

    def check(self, target: PreTrainedModel, settings: DraftSettings) -> None:
        """Refuse a target that this drafter was not made for, settings beyond its vocabulary, and damaged weights."""
        check_reading(self, describe_target(target.config))
        self.config.check_width(settings)
        check_weights(self)
        check_place(target, self)

    def start(self, prefill: Prefill, settings: DraftSettings) -> DFlashSession:
        """Read a prompt's features."""
        return DFlashSession(self, prefill, settings)
