"""What a DREAM drafter refuses to draft for, and why, before any work is done."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ...decoding.settings import DraftSettings
from ..vocabulary import check_draft_vocabulary
from .configuration import describe_target
from .modeling import DreamModel

logger = logging.get_logger(__name__)

_checked_weights: WeakKeyDictionary[DreamModel, tuple[int, ...]] = WeakKeyDictionary()


def check_dream(drafter: DreamModel, target: PreTrainedModel, settings: DraftSettings) -> None:
    """Raise a `ValueError` for a target that the drafter was not made for, or a drafter that cannot draft."""
    check_fit(drafter, target)
    config = drafter.config
    config.check_drafting()
    config.check_width(settings)
    check_draft_vocabulary(drafter.draft_token_ids, config.draft_vocab_size, config.vocab_size)
    _check_weights(drafter)
    _check_place(target, drafter)


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
    _check_identity(drafter, describe_target(target.config))


def _check_identity(drafter: DreamModel, actual: dict[str, Any]) -> None:
    expected = drafter.config.target or {}
    for name in ("model_type", "hidden_size", "vocab_size", "num_hidden_layers"):
        if expected.get(name) is not None and expected[name] != actual[name]:
            raise ValueError(
                f"The drafter was trained for another target: its `config.target['{name}']` is {expected[name]!r}, this "
                f"target's is {actual[name]!r}. Load the drafter made for this target, or train one."
            )
    if expected.get("name") and actual["name"] and expected["name"] != actual["name"]:
        logger.warning_once(
            f"The drafter was trained for {expected['name']!r} and drafts for {actual['name']!r}. The output is exact all "
            "the same; fewer drafted tokens may be accepted."
        )


def _check_place(model: PreTrainedModel, drafter: DreamModel) -> None:
    """Warn where the drafter has another dtype than the target, or lies on a device that the target has no part on."""
    devices = {str(model.device), *map(str, getattr(model, "hf_device_map", {}).values())}
    place = str(drafter.device)
    if drafter.dtype == model.dtype and (place in devices or place.removeprefix("cuda:") in devices):
        return
    logger.warning_once(
        f"The drafter is on {place} in {drafter.dtype} and the target on {model.device} in {model.dtype}: the output is exact "
        "all the same, and drafting slower than it could be. Load the drafter with `DreamDrafter.from_pretrained(..., "
        "dtype=target.dtype, device_map=target.device)`, or write `drafter.to(target.device, target.dtype)`."
    )


def _check_weights(drafter: DreamModel) -> None:
    """Refuse NaN and infinite weights, looking again only after a weight has changed."""
    versions = tuple(0 if weight.is_inference() else weight._version for weight in drafter.parameters())
    if _checked_weights.get(drafter) == versions:
        return
    sums = [weight.detach().float().sum().cpu() for weight in drafter.parameters()]
    if sums and not torch.stack(sums).isfinite().all():
        bad = [name for name, weight in drafter.named_parameters() if not weight.detach().isfinite().all()]
        if bad:
            raise ValueError(
                f"The drafter has weights that are NaN or infinite (first: `{bad[0]}`, {len(bad)} in all). Its file is "
                "damaged or its training diverged; load another checkpoint."
            )
    _checked_weights[drafter] = versions
