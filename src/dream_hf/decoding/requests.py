"""Everything that is refused, and why, before any work is done."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.integrations import is_fsdp_managed_module
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from ..compat import CACHE
from ..runtime.compilation import Settings as CompileSettings
from ..runtime.compilation import chosen_settings, missing_compiler, uncompilable
from ..runtime.kv_cache import unsupported_layer
from ..targets.recurrence import keeps_state
from ..targets.suitability import not_in_graphs, rereads, unsuitable
from ..targets.target import Target, unwrap
from ..targets.tree_masks import check_exchangeable
from .drafter import Drafter, DrafterWithSettings
from .settings import DraftSettings

logger = logging.get_logger(__name__)


def check_request(model: PreTrainedModel, drafter: Any, generation_config: GenerationConfig) -> Drafter:
    """Refuse a `generate()` call that speculative decoding with this drafter cannot serve.

    Returns:
        `Drafter`: The drafter, with the settings that hold for this call whatever becomes of its config meanwhile.

    Raises:
        TypeError: `drafter` is no [`Drafter`].
        ValueError: Any other reason; the message names the argument, its value and the remedy.
    """
    if isinstance(drafter, CheckedDrafter) and drafter.target is model:
        return drafter
    drafter = drafter if drafter is None else unwrap(drafter)
    if not isinstance(drafter, Drafter):
        raise TypeError(
            f"`drafter` is a `{type(drafter).__name__}`; pass a drafter, for example "
            "`DreamDrafter.from_pretrained(...)`."
        )
    check_target(model)
    target = Target(model)
    check_exchangeable(target.decoder, target.text_config)
    _check_whole(model)
    _check_strategy(generation_config)
    if drafter.needs.cache and keeps_state(target.text_config):
        raise ValueError(
            f"`{type(target.model).__name__}` keeps a state in some layers, and `{type(drafter).__name__}` drafts in the "
            "target's own cache, where nothing but keys and values can be tried out. Use another drafter."
        )
    settings = drafter.settings
    drafter.check(unwrap(model), settings)
    return CheckedDrafter(drafter, settings, model)


class CheckedDrafter(DrafterWithSettings):
    """A drafter that has been checked with the settings and the target of one call."""

    def __init__(self, drafter: Drafter, settings: DraftSettings, target: PreTrainedModel):
        super().__init__(drafter, settings)
        self.target = target


def check_target(model: PreTrainedModel) -> None:
    """Refuse a target that trees cannot be verified on."""
    reason = unsuitable(model)
    if reason is not None:
        raise ValueError(reason)


def check_length(model: PreTrainedModel, prompt_length: int, max_length: int | None) -> None:
    """Refuse a text, of `prompt_length` up to `max_length` tokens, that plain decoding writes in a way trees cannot."""
    reason = rereads(model, prompt_length, max_length)
    if reason is not None:
        raise ValueError(reason)


def check_chains(model: PreTrainedModel) -> None:
    """Refuse a target whose tokens depend on those drafted behind them, in forwards that are not ours."""
    if model._is_stateful:
        raise ValueError(
            f"`{type(model).__name__}` keeps a state that transformers' assisted decoding cannot take back. Use "
            "`custom_generate=dream_generate`."
        )
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
    target: Target, drafter: Drafter, generation_config: GenerationConfig, synced_gpus: bool
) -> CompileSettings | None:
    """How the target's forwards are to be compiled; None where they are not, with a warning if they were meant to be."""
    compilation = chosen_settings(drafter.settings.compile, generation_config.compile_config)
    if compilation is None or generation_config.disable_compile:
        return None
    reason = missing_compiler(compilation, target.model.device) or uncompilable(target.model) or not_in_graphs(target)
    if reason is None and generation_config.output_attentions:
        reason = "`output_attentions=True` wants attention to the filled part of the cache"
    if reason is None and drafter.needs.cache:
        reason = "the drafter drafts in the target's own cache"
    if reason is None and synced_gpus:
        reason = "`synced_gpus=True` needs forwards that keep their hooks"
    if reason is None:
        return compilation
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
