"""What a DREAM drafter refuses to draft for, and why, before any work is done."""

from __future__ import annotations

from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ...decoding.settings import DraftSettings
from ..fit import check_identity, check_place, check_weights, describe_target
from ..vocabulary import check_draft_vocabulary
from .modeling import DreamModel

logger = logging.get_logger(__name__)


def check_dream(drafter: DreamModel, target: PreTrainedModel, settings: DraftSettings) -> None:
    """Raise a `ValueError` for a target that the drafter was not made for, or a drafter that cannot draft."""
    check_fit(drafter, target)
    config = drafter.config
    config.check_drafting()
    config.check_width(settings)
    check_draft_vocabulary(drafter.draft_token_ids, config.draft_vocab_size, config.vocab_size)
    check_weights(drafter)
    check_place(target, drafter)


def check_fit(drafter: DreamModel, target: PreTrainedModel) -> None:
    """Refuse a target of another shape than the drafter's, or another one than it was trained for."""
    text_config = target.config.get_text_config(decoder=True)
    for name in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(drafter.config, name), getattr(text_config, name)
        if ours != theirs:
            raise ValueError(
                f"The drafter's `{name}` ({ours}) does not fit the target's ({theirs}). Load the drafter that was trained "
                "for this target, or make one with `DreamDrafter.for_target(target)`."
            )
    check_identity(drafter, describe_target(target.config))
