"""Everything that is refused, and why, before any work is done."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.integrations import is_fsdp_managed_module
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..compat import CACHE
from ..drafters.dream.configuration import describe_target
from ..drafters.dream.drafter import DreamDrafter
from ..drafters.vocabulary import check_draft_vocabulary
from ..runtime.compilation import Settings, chosen_settings, missing_compiler, uncompilable
from ..runtime.kv_cache import unsupported_layer
from ..targets.suitability import rereads, unsuitable
from ..targets.target import Target, unwrap
from ..targets.tree_masks import check_exchangeable, takes_tree_masks

logger = logging.get_logger(__name__)

# Families that build their masks from a 2D one only, and cannot take those prepared for a cache of fixed size where the
# text model has several kinds of layers (PaliGemma 2).
MASK_BOUND = ("paligemma",)

_checked_weights: WeakKeyDictionary[DreamDrafter, tuple[int, ...]] = WeakKeyDictionary()


def check_request(model: PreTrainedModel, drafter: Any, generation_config: GenerationConfig) -> None:
    """Refuse a `generate()` call that speculative decoding with this drafter cannot serve.

    Raises:
        TypeError: `drafter` is not a [`DreamDrafter`].
        ValueError: Any other reason; the message names the argument, its value and the remedy.
    """
    if not isinstance(drafter, DreamDrafter):
        raise TypeError(
            f"`drafter` is a `{type(drafter).__name__}`; pass a `DreamDrafter`, for example "
            "`DreamDrafter.from_pretrained(...)`."
        )
    check_target(model, drafter)
    target = Target(model)
    check_exchangeable(target.decoder, target.text_config)
    _check_whole(model)
    _check_strategy(generation_config)
    drafter.config.check_drafting()
    check_draft_vocabulary(drafter.draft_token_ids, drafter.config.draft_vocab_size, drafter.config.vocab_size)
    _check_weights(drafter)
    _check_place(model, drafter)


def check_target(model: PreTrainedModel, drafter: DreamDrafter) -> None:
    """Refuse a target that trees cannot be verified on, or that the drafter was not made for."""
    reason = unsuitable(model)
    if reason is not None:
        raise ValueError(reason)
    text_config = model.config.get_text_config(decoder=True)
    for name in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(drafter.config, name), getattr(text_config, name)
        if ours != theirs:
            raise ValueError(
                f"The drafter's `{name}` ({ours}) does not fit the target's ({theirs}). Load the drafter that was trained "
                "for this target, or make one with `DreamDrafter.for_target(target)`."
            )
    _check_identity(drafter, describe_target(model.config))


def check_length(model: PreTrainedModel, prompt_length: int, max_length: int | None) -> None:
    """Refuse a text, of `prompt_length` up to `max_length` tokens, that plain decoding writes in a way trees cannot."""
    reason = rereads(model, prompt_length, max_length)
    if reason is not None:
        raise ValueError(reason)


def check_chains(model: PreTrainedModel) -> None:
    """Refuse a target whose tokens depend on those drafted behind them, in forwards that are not ours."""
    if Target(model).length_dependent_rotaries:
        raise ValueError(
            f"The rotary angles of `{type(model).__name__}` depend on the text's length (`rope_type` dynamic or longrope), "
            "and in transformers' assisted decoding drafted tokens count. Use `custom_generate=dream_generate`."
        )


def check_cache(cache: Any) -> None:
    """Refuse a cache that accepted paths cannot be kept in."""
    if not isinstance(cache, Cache):
        raise ValueError(f"`{CACHE}` is a `{type(cache).__name__}`; pass a `DynamicCache`, or leave it out.")
    layer = unsupported_layer(cache)
    if layer is not None or cache.offloading:
        raise ValueError(
            f"`{CACHE}` ({type(cache).__name__}, {layer or 'offloaded'}) cannot take back rejected tokens. Pass a "
            "`DynamicCache(config=model.config)`, or leave it out."
        )


def compile_settings(
    target: Target, drafter: DreamDrafter, generation_config: GenerationConfig, synced_gpus: bool
) -> Settings | None:
    """How the target's forwards are to be compiled; None where they are not, with a warning if they were meant to be."""
    config = generation_config.compile_config
    settings = chosen_settings(drafter.config.compile, config)  # type: ignore[arg-type]
    if settings is None or generation_config.disable_compile:
        return None
    reason = missing_compiler(settings, target.model.device) or uncompilable(target.model)
    if target.rescaled_attentions:
        reason = f"`{type(target.model).__name__}` scales queries by cache slot, which needs hooks in a tree"
    elif target.length_dependent_rotaries:
        reason = (
            f"`{type(target.model).__name__}` has rotary angles that depend on the text's length, which needs hooks"
        )
    elif target.model.config.model_type in MASK_BOUND and hasattr(target.text_config, "layer_types"):
        reason = (
            f"`{type(target.model).__name__}` cannot take masks that are made beforehand for several kinds of layers"
        )
    elif target.text_config._attn_implementation == "flex_attention":
        reason = '`attn_implementation="flex_attention"` compiles by itself'
    elif not takes_tree_masks(target.text_config._attn_implementation):
        reason = (
            f"`attn_implementation={target.text_config._attn_implementation!r}` takes no tree masks, and what stands in for "
            'it is not compiled; load the target with `attn_implementation="sdpa"`'
        )
    elif generation_config.output_attentions:
        reason = "`output_attentions=True` wants attention to the filled part of the cache"
    elif synced_gpus:
        reason = "`synced_gpus=True` needs forwards that keep their hooks"
    if reason is None:
        return settings
    logger.warning_once(f"Decoding runs uncompiled: {reason}.")
    return None


def _check_whole(model: PreTrainedModel) -> None:
    """Refuse a target whose embedding or head is spread over processes (FSDP, DeepSpeed ZeRO-3).

    Drafting uses both as often as this process's own texts want, and each use would wait for all other processes.
    """
    parts = [unwrap(model), model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [weight for part in parts[1:] for weight in part.parameters(recurse=False)]
    if any(hasattr(weight, "ds_id") for weight in weights):
        kind = "DeepSpeed ZeRO-3"
    elif any(is_fsdp_managed_module(part) for part in parts) or _is_spread_by_fsdp2(model, weights):
        kind = "FSDP"
    else:
        return
    raise ValueError(
        f"The target's embedding and head are spread over processes ({kind}), and `assistant_model` needs them whole, at other "
        "times in each process. Load the target whole in every process, or generate without `assistant_model`."
    )


def _is_spread_by_fsdp2(model: PreTrainedModel, weights: list[torch.Tensor]) -> bool:
    """Whether one of `weights` is a piece under FSDP2; under tensor parallelism too they are, and there all processes decode
    the same texts."""
    if not torch.distributed.is_available() or all(type(weight) is torch.nn.Parameter for weight in weights):
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    return any(isinstance(weight, DTensor) for weight in weights) and any(
        isinstance(module, FSDPModule) for module in model.modules()
    )


def _check_strategy(generation_config: GenerationConfig) -> None:
    if generation_config.use_cache is False:
        raise ValueError("`use_cache=False` cannot be combined with a drafter; leave `use_cache` out.")
    if generation_config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"`cache_implementation={generation_config.cache_implementation!r}` cannot take back rejected tokens; leave it out."
        )
    for name in ("num_beams", "num_return_sequences"):
        if (getattr(generation_config, name) or 1) > 1:
            raise ValueError(
                f"`{name}={getattr(generation_config, name)}` cannot be combined with a drafter; set it to 1"
                + (" and repeat the prompt in the batch instead." if name == "num_return_sequences" else ".")
            )


def _check_identity(drafter: DreamDrafter, actual: dict[str, Any]) -> None:
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


def _check_place(model: PreTrainedModel, drafter: DreamDrafter) -> None:
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


def _check_weights(drafter: DreamDrafter) -> None:
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
