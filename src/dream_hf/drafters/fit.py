"""Whether a drafter of any kind fits a target, and what a target is known by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers.utils import logging

if TYPE_CHECKING:  # configs are described while transformers' models are being imported
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedModel

    from ..decoding.settings import DraftSettings

logger = logging.get_logger(__name__)

_checked_weights: WeakKeyDictionary[PreTrainedModel, tuple[int, ...]] = WeakKeyDictionary()


def describe_target(target_config: PreTrainedConfig) -> dict[str, Any]:
    """Identity of a target as kept in the `target` of a drafter's config."""
    text = target_config.get_text_config(decoder=True)
    return {
        "model_type": target_config.model_type,
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "num_hidden_layers": text.num_hidden_layers,
        "name": getattr(target_config, "_name_or_path", "") or None,
        "revision": getattr(target_config, "_commit_hash", None),
    }


def check_identity(drafter: PreTrainedModel, actual: dict[str, Any]) -> None:
    """Refuse a target, as [`describe_target`] describes it, that is not the one the drafter was trained for."""
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


def check_reading(drafter: Any, actual: dict[str, Any]) -> None:
    """Refuse a target whose features a published drafter cannot read, or whose tokens it does not know.

    Args:
        drafter (`PreTrainedModel`): Its config is a [`LayerConfig`].
        actual (`dict`): The target, as [`describe_target`] describes it.
    """
    config, ids = drafter.config, drafter.draft_token_ids
    for ours, name in ((config.target_hidden_size, "hidden_size"), (config.vocab_size, "vocab_size")):
        if ours != actual[name]:
            raise ValueError(
                f"The drafter was made for a target with `{name}` {ours}, and this one's is {actual[name]}. Load the "
                "drafter that was trained for this target."
            )
    if max(config.feature_layers) > actual["num_hidden_layers"]:
        raise ValueError(
            f"The drafter reads the layers {config.feature_layers} (`feature_layers`) of a target that has "
            f"{actual['num_hidden_layers']}. Load the drafter that was trained for this target."
        )
    if "num_hidden_layers" not in (config.target or {}):
        raise ValueError(
            "The drafter's config has no `target`, so nobody knows which of its `feature_layers` is the last. Set "
            "`config.target = {'num_hidden_layers': ...}`, or load it with `load_drafter`."
        )
    check_identity(drafter, actual)
    if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        raise ValueError(
            f"`draft_token_ids` reach from {int(ids.min())} to {int(ids.max())}; tokens lie in [0, "
            f"{config.vocab_size}), the drafter's `vocab_size`. The checkpoint's `d2t` was missing or is damaged."
        )


def check_top_k(settings: DraftSettings, size: int | None, what: str) -> None:
    """Refuse settings that want more children of a node than there are tokens; `what` says which tokens."""
    if size is not None and settings.tree_top_k > size:
        raise ValueError(f"`tree_top_k` ({settings.tree_top_k}) must not exceed {what} ({size}).")


def check_place(model: PreTrainedModel, drafter: PreTrainedModel) -> None:
    """Warn where the drafter has another dtype than the target, or lies on a device that the target has no part on."""
    devices = {str(model.device), *map(str, getattr(model, "hf_device_map", {}).values())}
    place = str(drafter.device)
    if drafter.dtype == model.dtype and (place in devices or place.removeprefix("cuda:") in devices):
        return
    logger.warning_once(
        f"The drafter is on {place} in {drafter.dtype} and the target on {model.device} in {model.dtype}: the output is exact "
        "all the same, and drafting slower than it could be. Load the drafter with "
        "`load_drafter(..., target)` or `from_pretrained(..., dtype=target.dtype, device_map=target.device)`, or write "
        "`drafter.to(target.device, target.dtype)`."
    )


def check_weights(drafter: PreTrainedModel) -> None:
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
